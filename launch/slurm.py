"""An sbatch script that runs a job, has it saved before its time is over, and queues it again until it is done.

In the allocation the script calls `overtone run --launcher slurm`, so that layout, exports and exit codes are those of
any other job. Options and signals: https://slurm.schedmd.com/sbatch.html.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import command
from common.checkout import python_path
from common.errors import ConfigError
from common.exits import EXIT_PREEMPTED
from common.files import replace_file, writing
from common.numbers import divisors, listed
from launch.exports import exported
from launch.hosts import CPU_RANKS, Placement
from pretrain.runtime.claim import Holder, hold, new_job

if TYPE_CHECKING:
    from pretrain.config import RunConfig

SCRIPT = "slurm.sh"  # in the run folder
LATEST_SIGNAL_S = 65535  # before the end of the time, by Slurm's documentation
TIME = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}")
OWN_OPTIONS = {  # sbatch's options that are not to be given by --sbatch, and what to use instead
    "nodes": "--nodes",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "chdir": "nothing: the job runs where the script is made",
    "output": "nothing: it goes to the run folder",
    "error": "nothing: it goes to the run folder",
    "open-mode": "nothing: a job that is queued again appends",
    "signal": "checkpoint.grace_s",
    "requeue": "nothing: it is on",
    "no-requeue": "nothing: a job goes on after a preemption",
    "array": "one run folder for each job",
    "ntasks": "nothing: there is one launcher on each node",
    "ntasks-per-node": "nothing: there is one launcher on each node",
    "wrap": "nothing: there is a script",
}
SHARING = {"exclusive", "oversubscribe", "cpus-per-task", "cpus-per-gpu", "mem", "mem-per-cpu", "mem-per-gpu"}


def parser() -> argparse.ArgumentParser:
    """CONFIG, what to ask Slurm for, and whether to submit the script."""
    made = command.parser(
        "slurm",
        "Check a config, its data and the layout, then write an sbatch script into the run folder, and submit it if "
        "asked to. The job saves before its time is over, and whenever it is told to stop, and is queued again until "
        "it is done.",
        [
            "configs/gpt2-124m-untied.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --submit",
            "configs/quickstart.yaml --nodes 1 --sbatch qos=high train.steps=100",
        ],
        "0 done; 2 bad input, or Slurm refuses the script",
    )
    command.add_config(made, "gpt2-124m-untied")
    made.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes to ask for")
    made.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="G",
        help=f"GPUs to ask for on each node, with a rank for each (default: {CPU_RANKS} ranks on its cores, no GPU)",
    )
    made.add_argument("--time", metavar="T", help="limit of one start, as Slurm writes it: 24:00:00 or 3-12")
    made.add_argument("--partition", metavar="P", help="Slurm's partition (default: the cluster's)")
    made.add_argument("--account", metavar="A", help="Slurm's account (default: the user's)")
    made.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="one more option for sbatch, without its dashes, such as qos=high; may be repeated",
    )
    command.add_allow_code(made)
    made.add_argument("--submit", action="store_true", help="also submit the script")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the script, and submits it if asked to; exit code 2 if it cannot run so, or Slurm refuses it."""
    return command.run(queue, command.parse(parser(), argv))


def queue(asked: argparse.Namespace) -> None:
    """Writes the script into the run folder and, if asked to, submits it.

    Args:
        asked: by `parser`.
    Raises:
        ConfigError: the job cannot run so, another one trains in its folder, or Slurm does not take it. Nothing is
            written unless all is right here.
    """
    from launch.invocation import check
    from pretrain.config import load

    cfg = load(asked.config, asked.overrides)
    options = options_of(asked, cfg)
    ranks = asked.gpus_per_node or CPU_RANKS
    _check_size(cfg, asked.nodes, ranks)
    check(cfg, Placement({f"node {k}": ranks for k in range(asked.nodes)}))
    if cfg.resume != "auto":
        raise ConfigError(
            f"resume={cfg.resume}: a job that is queued again would not go on from its own newest checkpoint. Set "
            "resume=auto, which starts afresh where there is none"
        )
    if asked.submit and shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: sbatch is not found on this machine; run this where jobs are submitted, or leave --submit out "
            "and give the script to sbatch there"
        )
    words = [*asked.overrides, *([command.ALLOW_CODE] if asked.allow_different_code else [])]
    text = script(asked.config, words, cfg.run.absolute(), options, ranks)
    path = cfg.run / SCRIPT
    with hold(cfg.run, Holder(new_job(), launcher=False)), writing(cfg.run):
        replace_file(path, text)
    where = "GPUs" if asked.gpus_per_node else "cores; --gpus-per-node asks for GPUs"
    lead = f"it is told to save {lead_s(cfg)} s before its time is over"
    print(f"{path}: {asked.nodes} nodes with {ranks} ranks on each (on its {where}); {lead}")
    if not asked.submit:
        print(f"submit it with: sbatch {shlex.quote(str(path))}")
        return
    submitted = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if submitted.returncode:
        raise ConfigError(f"sbatch does not take {path}: {submitted.stderr.strip()}")
    print(f"{submitted.stdout.strip()}; its output: {cfg.run / 'slurm-JOB.out'}")


def options_of(asked: argparse.Namespace, cfg: RunConfig) -> dict[str, str | None]:
    """sbatch's options by name, without their dashes; None: an option without a value. Raises ConfigError."""
    extra = dict(_option(text) for text in asked.sbatch)
    for name, least in (("nodes", asked.nodes), ("gpus_per_node", asked.gpus_per_node)):
        if least is not None and least < 1:
            remedy = "; leave it out to train on cores" if name == "gpus_per_node" else ""
            raise ConfigError(f"--{name.replace('_', '-')} {least}: expected 1 or more{remedy}")
    lead = lead_s(cfg)
    if lead > LATEST_SIGNAL_S:
        most = LATEST_SIGNAL_S - (lead - math.ceil(cfg.checkpoint.grace_s))
        raise ConfigError(f"checkpoint.grace_s={cfg.checkpoint.grace_s}: Slurm can tell a job {most} s before at most")
    if asked.time is not None and seconds_of(asked.time) <= lead:
        raise ConfigError(
            f"--time {asked.time}: the job is told to save {lead} s before its time is over (checkpoint.grace_s="
            f"{cfg.checkpoint.grace_s:g}, and {cfg.checkpoint.stop_s - cfg.checkpoint.grace_s:g} s); ask for more time"
        )
    run = str(cfg.run.absolute()).replace("%", "%%")  # % begins a pattern there
    options: dict[str, str | None] = {"job-name": cfg.run.absolute().name, "nodes": str(asked.nodes)}
    options["ntasks-per-node"] = "1"
    if asked.gpus_per_node:
        options["gpus-per-node"] = str(asked.gpus_per_node)
    if not SHARING & extra.keys():  # a rank's share of cores and memory is a node's
        options |= {"exclusive": None, "mem": "0"}
    options |= {name: vars(asked)[name] for name in ("time", "partition", "account") if vars(asked)[name] is not None}
    options |= {"chdir": os.getcwd(), "output": f"{run}/slurm-%j.out", "open-mode": "append"}
    options |= {"requeue": None, "signal": f"USR1@{lead}"}
    return options | extra


def _option(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if name in OWN_OPTIONS:
        raise ConfigError(f"--sbatch {text}: {name} is set by Overtone itself: use {OWN_OPTIONS[name]}")
    if not re.fullmatch("[a-z]+(-[a-z]+)*", name) or len(name) == 1:
        raise ConfigError(f"--sbatch {text}: expected a long option of sbatch without its dashes, such as qos=high")
    return name, value if equals else None


def lead_s(cfg: RunConfig) -> int:
    """Seconds before the end of its time at which a job is told to save."""
    return math.ceil(cfg.checkpoint.stop_s)


def seconds_of(limit: str) -> int:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ConfigError."""
    if not TIME.fullmatch(limit):
        raise ConfigError(
            f"--time {limit}: expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds, such as 24:00:00"
        )
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _check_size(cfg: RunConfig, nodes: int, ranks: int) -> None:
    """Raises ConfigError, with the possible numbers of nodes, if the run cannot be shared by these."""
    from pretrain.config import check_layout

    try:
        check_layout(cfg, nodes * ranks, ranks)
    except ConfigError as error:
        passes, left = divmod(cfg.sequences_per_step(), cfg.train.micro_batch * ranks)
        possible = [] if left else [nodes for nodes in divisors(passes) if _fits(cfg, nodes, ranks)]
        raise ConfigError(
            f"--nodes {nodes} with {ranks} ranks on each: {error} With {ranks} ranks on each, --nodes can be "
            f"{listed(possible, 'no number')}."
        ) from None


def _fits(cfg: RunConfig, nodes: int, ranks: int) -> bool:
    from pretrain.config import check_layout

    if cfg.sequences_per_step() % (cfg.train.micro_batch * nodes * ranks):
        return False
    with suppress(ConfigError):
        check_layout(cfg, nodes * ranks, ranks)
        return True
    return False


def script(
    config: str, overrides: Sequence[str], run: Path, options: Mapping[str, str | None], ranks_per_node: int
) -> str:
    """The text of the script.

    Args:
        config: path of the config.
        overrides: `key=value` settings and options of `overtone run`.
        run: the run folder, absolute.
        options: by `options_of`.
        ranks_per_node: how many ranks each node runs.
    Raises:
        ConfigError: an option that does not fit on a line.
    """
    launch = shlex.join([sys.executable, "-m", "launch", "run", config, *overrides])
    lines = [
        "#!/bin/bash",
        *(_directive(name, value) for name, value in options.items()),
        "",
        "# shellcheck disable=SC2016  # what is in single quotes is meant as it stands",
        *(f"export {name}={shlex.quote(value)}" for name, value in {**exported(os.environ), **python_path()}.items()),
        "export SLURM_EXPORT_ENV=ALL  # to the nodes, whatever sbatch was told of exports",
        f'hosts={shlex.quote(str(run))}/slurm-"$SLURM_JOB_ID".hosts',
        f'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\\$/ slots={ranks_per_node}/" >"$hosts" || exit',
        f'{launch} --hostfile "$hosts" --launcher slurm',
        "code=$?",
        # A job that is cancelled does not come here: Slurm's SIGTERM ends this shell.
        f'if [ "$code" -eq {EXIT_PREEMPTED} ]; then',
        '    echo "stopped after a save: the job is queued again"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return "".join(line + "\n" for line in lines)


def _directive(name: str, value: str | None) -> str:
    if value is not None and not value.isprintable():
        raise ConfigError(f"--{name}={value!r}: sbatch takes options on one line only; use printable characters")
    return f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}")
