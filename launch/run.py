"""`overtone run CONFIG [key=value ...]`: checks a training job, then runs it with deepspeed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import command
from common.checkout import python_path
from common.errors import ConfigError
from common.output import bear_loss
from common.variables import JOB_VARIABLE

if TYPE_CHECKING:
    from launch.hosts import Placement
    from launch.job import End
    from pretrain.config import RunConfig
    from pretrain.runtime.claim import Claim


def parser() -> argparse.ArgumentParser:
    """CONFIG, where and how to run it, and what to do when it fails."""
    job = command.parser(
        "run",
        "Check a config, its data, the layout and the hosts, then train it with deepspeed. Run again, it goes on from "
        "the newest whole checkpoint.",
        [
            "configs/quickstart.yaml",
            "configs/quickstart.yaml --num-gpus 2 train.steps=100 run=runs/short",
            "configs/gpt2-124m-untied.yaml --hostfile hosts --max-restarts 3 --elastic",
            "configs/gpt2-124m-untied.yaml --hostfile hosts --dry-run",
        ],
        "0 done; 2 bad input; 3 too many non-finite steps; 4 a checkpoint could not be written; 75 stopped by a signal "
        "after a save, the same command goes on; 128 + N: a rank was killed by signal N and none told why, or this "
        "launcher was stopped by it before the ranks started (137: killed by a second signal); others: a rank failed",
    )
    command.add_config(job)
    add_hosts(job)
    job.add_argument(
        "--launcher",
        choices=("pdsh", "openmpi", "slurm", "none"),
        default="pdsh",
        help="how the hosts are reached; none: run the same command on each of them (default %(default)s)",
    )
    job.add_argument("--node-rank", type=int, metavar="K", help="--launcher none: this is host K of them, from 0")
    job.add_argument("--master-port", type=int, metavar="P", help="where the ranks meet (default: a free port)")
    job.add_argument("--max-restarts", type=int, default=0, metavar="N", help="start a failed job again, up to N times")
    job.add_argument("--elastic", action="store_true", help="restarts go without hosts that do not answer")
    command.add_allow_code(job)
    job.add_argument("--dry-run", action="store_true", help="check everything, print the deepspeed command, and stop")
    return job


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job to its end; its exit code, as `--help` lists them."""
    bear_loss()
    return command.run(_run, command.parse(parser(), argv))


def add_hosts(job: argparse.ArgumentParser) -> None:
    """Options that choose hosts and ranks, for `placement_of`."""
    job.add_argument("--hostfile", type=Path, metavar="H", help="use its hosts: a line `HOST slots=N` for each")
    job.add_argument("--include", default="", metavar="S", help="only these hosts and slots: node1@node2:0,2")
    job.add_argument("--exclude", default="", metavar="S", help="all but these hosts and slots")
    job.add_argument("--num-nodes", type=int, metavar="N", help="only the first N hosts of the hostfile")
    job.add_argument(
        "--num-gpus", type=int, metavar="N", help="ranks on each host (default: every GPU; 2 where none is)"
    )


def placement_of(asked: argparse.Namespace) -> Placement:
    """Where the ranks go, by the options of `add_hosts`. Raises ConfigError."""
    from launch.hosts import place

    return place(asked.hostfile, asked.num_gpus, include=asked.include, exclude=asked.exclude, hosts=asked.num_nodes)


def _run(asked: argparse.Namespace) -> int:
    from launch import invocation
    from launch.exports import left_here
    from launch.restart import keep_running
    from pretrain.config import load

    invocation.check_single(asked.launcher)
    cfg = load(asked.config, asked.overrides)
    placement = placement_of(asked)
    invocation.check_launcher(placement, asked.launcher)
    if asked.max_restarts < 0:
        raise ConfigError(f"--max-restarts {asked.max_restarts}: expected 0 or more")
    if asked.max_restarts and cfg.resume != "auto":
        raise ConfigError(
            f"--max-restarts with resume={cfg.resume}: a job that is started again would not go on from its own newest "
            "checkpoint. Set resume=auto; to begin elsewhere, train to the first checkpoint without --max-restarts"
        )
    by_ssh = placement.hostfile is not None and asked.launcher in ("pdsh", "openmpi")
    if asked.elastic and not by_ssh:
        raise ConfigError("--elastic: it chooses among the hosts of a --hostfile, which pdsh or OpenMPI reaches")
    if asked.max_restarts and asked.launcher in ("none", "slurm"):
        raise ConfigError(
            f"--max-restarts: with --launcher {asked.launcher} each host has a launcher of its own, and none sees all "
            "hosts; whatever starts them restarts"
        )
    if asked.master_port is not None and not 0 < asked.master_port < 2**16:
        raise ConfigError(f"--master-port {asked.master_port}: expected a port from 1 to 65535")
    invocation.check(cfg, placement)
    if not asked.dry_run:
        invocation.check_tools(placement, asked.launcher)

    if by_ssh and (stays := left_here(os.environ)):
        told = f"launch: set here and not handed on to other hosts: {', '.join(stays)}"
        print(f"{told}; what the ranks need, list in ~/.deepspeed_env, NAME=VALUE", file=sys.stderr, flush=True)

    def start(placement: Placement) -> End:
        return _start(asked, cfg, placement)

    return keep_running(start, cfg, placement, restarts=asked.max_restarts, elastic=asked.elastic)


def _start(asked: argparse.Namespace, cfg: RunConfig, placement: Placement) -> End:
    """Runs the job once, or prints how, for a dry run."""
    from launch import invocation, job, probe
    from launch.hosts import unfit
    from launch.lease import take
    from launch.reach import answers

    launcher = asked.launcher if placement.hostfile is not None else None
    ranks_words = [*asked.overrides, *([command.ALLOW_CODE] if asked.allow_different_code else [])]
    if launcher == "slurm":
        words = invocation.srun(asked.config, ranks_words, placement, port=asked.master_port)
        print(invocation.one_line(words, python_path()), flush=True)
        if not asked.dry_run:
            os.execvp(words[0], words)  # it hands signals to the launchers on the hosts, and their exit codes back
        return job.DONE
    facts = answers(placement) if launcher in ("pdsh", "openmpi") else {}
    node = None
    if launcher == "none":
        node = asked.node_rank
        if node is None:
            node = 0 if asked.dry_run else invocation.own_node(placement)
        if not 0 <= node < len(placement.ranks):
            raise ConfigError(f"--node-rank {node}: {placement.hostfile} has hosts 0 to {len(placement.ranks) - 1}")
        if not asked.dry_run and (problems := unfit(placement, {list(placement.ranks)[node]: probe.facts()})):
            raise ConfigError("; ".join(problems))
    address, port = invocation.meeting_point(placement, facts) if launcher else (None, None)
    port = asked.master_port or port or invocation.free_port()

    def command_for(node: int | None, claim: Claim | None = None) -> tuple[list[str], dict[str, str]]:
        folder = cfg.run if launcher == "pdsh" else None
        added = invocation.environment(placement, facts, claim=claim, node=node, folder=folder)
        if launcher == "openmpi":
            added |= {"MASTER_ADDR": str(address), "MASTER_PORT": str(port)}
        words = invocation.command(
            asked.config,
            ranks_words,
            placement,
            launcher=launcher or "pdsh",
            address=address,
            port=port,
            node=node or 0,
            folder=cfg.run,
            exports=list(added),
        )
        return words, added

    if asked.dry_run:
        for number, host in enumerate(placement.ranks) if node is not None else [(None, "")]:
            print((f"{host}: " if host else "") + invocation.one_line(*command_for(number)), flush=True)
        return job.DONE
    grace_s = cfg.checkpoint.stop_s
    patience_s = cfg.timeouts.rendezvous_s if node else cfg.timeouts.heartbeat_s + grace_s
    with take(cfg.run, placement, node, patience_s) as claim:
        words, added = command_for(node, claim)
        told = {name: value for name, value in added.items() if name != JOB_VARIABLE}  # given again, it is another job
        print(invocation.one_line(words, told), flush=True)
        if launcher in ("pdsh", "openmpi"):
            invocation.write_files(placement, facts, claim.run, claim=claim)
        return job.run(words, added, claim, placement, node=node, grace_s=grace_s)
