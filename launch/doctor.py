"""`overtone doctor [CONFIG] [--hostfile H]`: what would keep a job from running on these hosts, and the remedy.

One table with a row for each host, then a line for each problem. The last check is a real one: an all-reduce between
the hosts, started as a job is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common import command
from common.errors import ConfigError
from common.variables import LINK_MARK
from launch.hosts import Placement, unfit
from launch.probe import facts, more_facts, nearest
from launch.reach import Facts, ask
from launch.run import add_hosts, placement_of
from pretrain.runtime.agreement import REMEDIES, differences

if TYPE_CHECKING:
    from rich.table import Table

    from pretrain.config import RunConfig

SKEW_S = 1.0  # that a clock may be off
LEAST_FREE_BYTES = 10 * 2**30  # on the disk of the run folder
LINK_S = 120.0  # for the all-reduce, from its start to its end


def parser() -> argparse.ArgumentParser:
    """CONFIG, which may be left out, and the options that choose hosts."""
    made = command.parser(
        "doctor",
        "Examine this machine, or the hosts of a hostfile: versions, data, disks, clocks, network. The last check is a "
        "real all-reduce between the hosts.",
        ["", "configs/gpt2-124m-untied.yaml --hostfile hosts"],
        "0 nothing is wrong; 1 a problem was found; 2 bad input",
    )
    command.add_config(made, optional="YAML file, to examine its data and its run folder too")
    add_hosts(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Examines the hosts; exit code 1 for a problem, 2 for bad input."""
    return command.run(_examine, command.parse(parser(), argv))


def _examine(asked: argparse.Namespace) -> int:
    from pretrain.config import load

    words = [] if asked.config is None else [asked.config, *asked.overrides]
    return doctor(placement_of(asked), load(words[0], words[1:]) if words else None, words)


def doctor(placement: Placement, cfg: RunConfig | None, config: Sequence[str] = ()) -> int:
    """Examines the hosts of a placement, prints what it finds, and returns 0 if nothing is wrong, else 1.

    Args:
        cfg: for the checks of the data and of the run folder; None: they are left out.
        config: its path and settings, which each host reads for itself.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    answers, skews, problems = examine(placement, cfg, config)
    console.print(_table(answers, skews, cfg is not None))
    problems += skewed(skews) + compared(placement, answers, cfg is not None)
    if not any(isinstance(answer, str) for answer in answers.values()):
        link = measure(placement, answers)
        problems += link.get("problems", [])
        if "latency_s" in link:
            rate, latency = link["bytes_per_s"] / 1e9, link["latency_s"] * 1e6
            between = f"{len(answers)} hosts" if len(answers) > 1 else "ranks of this machine"
            console.print(f"all-reduce between {between} by {link['interface']}: {rate:.2f} GB/s, {latency:.0f} us")
    for problem in problems:
        console.print(f"[bold]problem[/bold] {problem}", highlight=False, soft_wrap=True)
    if not problems:
        console.print("no problem found")
    return 1 if problems else 0


def examine(
    placement: Placement, cfg: RunConfig | None, config: Sequence[str] = ()
) -> tuple[dict[str, Facts | str], dict[str, float], list[str]]:
    """What every host says of itself or why it says nothing, its clock's skew in seconds, and the problems so far."""
    run, data = (cfg.run, cfg.data.path) if cfg else (Path(), Path())
    above = nearest(run)
    token = above / f".doctor-{uuid.uuid4().hex}"  # a host that sees it shares the run folder's disk
    writable = True
    try:
        token.touch()
    except OSError:  # the host's own facts tell why
        writable = False
    try:
        if placement.hostfile is None:
            here = {**facts(), **more_facts(run, data, token.name, config)}
            return {host: here for host in placement.ranks}, dict.fromkeys(placement.ranks, 0.0), []
        words = ["-m", "launch.probe", str(run), str(data), token.name, *config]
        with ThreadPoolExecutor(64) as pool:
            timed = dict(zip(placement.ranks, pool.map(lambda host: _timed(host, words), placement.ranks), strict=True))
    finally:
        if writable:
            token.unlink(missing_ok=True)
    answers = {host: answer for host, (answer, _) in timed.items()}
    skews = {host: skew for host, (_, skew) in timed.items()}
    return answers, skews, [answer for answer in answers.values() if isinstance(answer, str)]


def _timed(host: str, words: Sequence[str]) -> tuple[Facts | str, float]:
    """A host's answer, and by how much its clock is surely off: beyond the moments of question and answer."""
    asked = time.time()
    answer = ask([host], words)[host]
    answered = time.time()
    if isinstance(answer, str):
        return answer, 0.0
    return answer, min(answer["time"] - asked, 0.0) + max(answer["time"] - answered, 0.0)


def _table(answers: Mapping[str, Facts | str], skews: Mapping[str, float], with_config: bool) -> Table:
    from rich.table import Table

    columns = ["host", "python", "torch", "deepspeed", "NCCL", "driver", "GPUs", "free MiB", "cores", "revision"]
    table = Table(*columns, "sources", "skew s", "energy", *(["data", "free GiB", "run folder"] if with_config else []))
    for host, answer in answers.items():
        if isinstance(answer, str):
            table.add_row(host, "no answer")
            continue
        versions, common = answer["versions"], answer["common"]
        nccl = next((version for name, version in versions.items() if "nccl" in name), None)
        memory = str(min(answer["gpu_free_mib"])) if answer["gpu_free_mib"] else None
        code = common.get("code", {})
        cells = [host, versions["python"], versions.get("torch"), versions.get("deepspeed"), nccl]
        cells += [answer["driver"].splitlines()[0] if answer["driver"] else None, str(answer["gpus"]), memory]
        cells += [str(answer["cores"]), (code.get("revision") or "")[:9], (code.get("sources") or "")[:9]]
        cells += [f"{skews[host]:.1f}", answer["energy"]]
        if with_config:
            data = "bad" if answer["data"] else common.get("data", {}).get("fingerprint", "")[:9]
            shared = "shared" if answer["shares_run"] else "local"
            cells += [data, f"{answer['free_bytes'] / 2**30:.0f}", shared]
        table.add_row(*(cell or "-" for cell in cells))
    return table


def compared(placement: Placement, answers: Mapping[str, Facts | str], with_config: bool) -> list[str]:
    """The problems of the hosts that answered, each with its remedy."""
    hosts = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
    drivers = {host: answer["driver"].splitlines()[:1] for host, answer in hosts.items()}
    problems = unfit(placement, hosts)
    problems += _odd("the driver", drivers, "install the same driver")
    gpus = {host: answer["gpus"] for host, answer in hosts.items()}
    problems += _odd("the number of GPUs", gpus, "look at `nvidia-smi -L` there")
    problems += _apart({host: answer["common"] for host, answer in hosts.items()})
    for host, answer in hosts.items():
        problems += _own_problems(host, answer, with_config)
    return problems


def _apart(common: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What hosts do not have in common with the most, as their ranks would find it."""
    problems = [f"{host}: {facts['problem']}" for host, facts in common.items() if "problem" in facts]
    told = {host: facts for host, facts in common.items() if "problem" not in facts}
    counts = Counter(map(str, told.values()))
    usual_first = sorted(told, key=lambda host: -counts[str(told[host])])
    found = differences(usual_first, [told[host] for host in usual_first])
    return problems + [f"{difference} as on {usual_first[0]}; {REMEDIES[difference.part]}" for difference in found]


def _odd(what: str, values: Mapping[str, Any], remedy: str) -> list[str]:
    """Which hosts differ from the most."""
    counts = Counter(map(str, values.values()))
    usual = counts.most_common(1)[0][0] if counts else ""
    return [
        f"{host}: {what} is {value}, but {usual} on {'most hosts' if counts[usual] > 1 else 'others'}; {remedy}"
        for host, value in values.items()
        if str(value) != usual
    ]


def _own_problems(host: str, answer: Facts, with_config: bool) -> list[str]:
    problems = []
    if not answer["compiler"]:
        problems.append(f"{host}: there is no g++, with which DeepSpeed and Overtone build; install it")
    if not answer["ninja"]:
        problems.append(f"{host}: there is no ninja beside {sys.executable}; run `make setup` there")
    if with_config:
        if answer["data"]:
            problems.append(f"{host}: {answer['data']}; copy the prepared folder there, or prepare it there")
        if answer["unwritable"]:
            problems.append(f"{host}: the run folder {answer['unwritable']}")
        elif not answer["shares_run"]:
            problems.append(f"{host}: its run folder is not this machine's; put it on storage that all hosts share")
        if answer["free_bytes"] < LEAST_FREE_BYTES:
            free = answer["free_bytes"] / 2**30
            problems.append(f"{host}: {free:.1f} GiB are free in the run folder; checkpoints need more, make room")
    return problems


def skewed(skews: Mapping[str, float]) -> list[str]:
    """The problems of clocks that are off by more than SKEW_S, from the skews in seconds by host."""
    return [
        f"{host}: its clock is {skew:+.1f} s off; start chrony or ntpd there"
        for host, skew in skews.items()
        if abs(skew) > SKEW_S
    ]


def measure(placement: Placement, answers: Mapping[str, Facts | str]) -> dict[str, Any]:
    """Of an all-reduce between one rank on each host, or two of this machine: `latency_s`, `bytes_per_s` and
    `interface`; or `problems`, in words. Empty where this machine has one GPU.
    """
    from launch import invocation

    facts_by_host = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
    command_of = partial(invocation.command, "", [], module="pretrain.runtime.link")
    if placement.hostfile is None:
        if len(placement.gpus) == 1:
            return {}
        placement = Placement({"localhost": 2}, gpus=placement.gpus[:2])
        return _linked(command_of(placement), invocation.environment(placement))
    one_each = "@".join(f"{host}:0" for host in placement.ranks)
    placement = Placement(dict.fromkeys(placement.ranks, 1), placement.hostfile, chosen=one_each)
    with TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name)
        invocation.write_files(placement, facts_by_host, folder)
        try:
            address, port = invocation.meeting_point(placement, facts_by_host)
        except ConfigError as error:
            return {"problems": [str(error)]}
        words = command_of(placement, address=address, port=port)
        return _linked(words, invocation.environment(placement, facts_by_host, folder=folder))


def _linked(words: Sequence[str], added: Mapping[str, str]) -> dict[str, Any]:
    try:
        ran = subprocess.run(
            words, env={**os.environ, **added}, capture_output=True, text=True, timeout=LINK_S, start_new_session=True
        )
        output, errors = ran.stdout, ran.stderr
    except subprocess.TimeoutExpired:
        output, errors = "", f"no end within {LINK_S:.0f} s"
    reports = [json.loads(line.partition(LINK_MARK)[2]) for line in output.splitlines() if LINK_MARK in line]
    for report in reports:
        if "latency_s" in report:
            return report
    said = [f"{report['host']}: {report['error']}" for report in reports] or [" ".join(errors.split())[-300:]]
    remedy = "open all TCP ports between the hosts, or name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    return {"problems": [f"the ranks could not reduce together ({'; '.join(said)}); {remedy}"]}
