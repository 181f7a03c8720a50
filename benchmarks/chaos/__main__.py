"""`python -m benchmarks.chaos [--kills 50] [--layouts] [--damage] [--seed N]`: does a run survive being killed?

A tiny model is trained twice on two ranks under the real launcher: once undisturbed, once killed with SIGKILL again and
again and restarted until it is done. Both must end alike: every logged loss, batch fingerprint and held-out score, bit
for bit where the layout never changed (the last checkpoint's tensors too), to 2e-5 with `--layouts`. After every kill
each published checkpoint must be whole, and the newest no older than before.

Who is killed: one rank, all ranks, our launcher (then its orphans), or one of deepspeed's two. When: while it starts,
while it trains, in a checkpoint's draft, at its publication, in a deletion. `--damage` harms the newest checkpoint
between kills, never the only whole one. Prints PASS (exit code 0) or the first difference (1).
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.chaos.judge import Fault, Watchdog, check_end, compare
from benchmarks.chaos.kills import MOMENTS, SEQUENCES, START_S, VICTIMS, Launched, Layout, aftermath, names, strike
from benchmarks.measuring import parser, wide_console
from benchmarks.processes import ROOT
from pretrain.checkpoints.folder import DRAFT

TOLERANCE = 2e-5  # of a loss in float32, when the layout changes
EVERY = 2  # steps between two checkpoints


@dataclass(frozen=True)
class Kill:
    """One kill and what it cost."""

    victim: str
    moment: str
    met: bool  # False: the moment did not come in time, and the kill came at once
    lost: int  # steps trained after the newest whole checkpoint
    left: tuple[str, ...]  # drafts and half deletions that lay there afterwards


@dataclass
class Report:
    """What happened; `fault` is None if all went well."""

    steps: int
    kills: list[Kill] = field(default_factory=list)
    harmed: Counter[str] = field(default_factory=Counter)
    orphans: int = 0  # ranks that outlived their launcher and were killed
    again: int = 0  # steps trained twice
    whole_s: float = 0.0
    seconds: float = 0.0
    worst: float | None = None  # greatest difference of a loss
    fault: str | None = None


def config_of(folder: Path, steps: int) -> dict[str, Any]:
    """A tiny run. Adam's epsilon is large, so that rounding, which every layout does otherwise, does not grow."""
    return {
        "run": str(folder / "whole"),
        "data": {
            "path": str(folder / "data"),
            "source": {"kind": "embedded"},
            "tokenizer": {"vocab_size": 384, "train_bytes": 300_000},
            "limit_documents": 80,
            "val_fraction": 0.05,
        },
        "model": {"seq_len": 16, "layers": 2, "heads": 2, "dim": 32, "dropout": 0.0},
        "train": {"steps": steps, "tokens_per_step": 16 * SEQUENCES, "micro_batch": 4, "precision": "float32"},
        "optim": {"lr": 2e-3, "warmup_steps": 4, "eps": 1e-4},
        "checkpoint": {"every": EVERY, "keep": 2},
        "logging": {"every": 1, "tensorboard": False},
    }


def plans(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Victims and moments in random order, every pair once before one comes again."""
    while True:
        deck = list(itertools.product(VICTIMS, MOMENTS))
        rng.shuffle(deck)
        yield from deck


def chaos(
    folder: Path,
    kills: int = 50,
    seed: int = 1,
    layouts: bool = False,
    damage: bool = False,
    say: Callable[[str], object] = print,
) -> Report:
    """Trains undisturbed in `folder/whole` and under kills in `folder/cut`, and compares.

    Args:
        folder: an empty one; data, logs and both runs stay in it.
        kills: how many, if the run does not end before.
        seed: of the victims, moments, layouts and harms; when exactly a kill comes is up to the machine.
        layouts: draw ranks, ZeRO stage, vocabulary ranks and micro-batch anew at every start.
        damage: harm the newest checkpoint after every second kill, on average.
    """
    report = Report(steps=16 * kills + 40)
    began = time.monotonic()
    try:
        _chaos(folder, kills, random.Random(seed), layouts, damage, say, report)
    except Fault as fault:
        report.fault = str(fault)
    report.seconds = time.monotonic() - began
    return report


def _chaos(
    folder: Path,
    kills: int,
    rng: random.Random,
    layouts: bool,
    damage: bool,
    say: Callable[[str], object],
    report: Report,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config, steps = folder / "config.yaml", report.steps
    config.write_text(yaml.safe_dump(config_of(folder, steps)))
    prepare = [sys.executable, "-m", "data", "prepare", str(config)]
    prepared = subprocess.run(prepare, cwd=ROOT, capture_output=True, text=True)
    if prepared.returncode:
        raise Fault(f"the data could not be prepared: {prepared.stderr}")
    start_s = _undisturbed(config, folder, report)
    say(f"{steps} steps undisturbed: {report.whole_s:.0f} s")

    run = folder / "cut"
    guard, plan = Watchdog(run / "checkpoints"), plans(rng)
    stood = 0  # the last step that was trained before the last kill
    for attempt in itertools.count():
        layout = Layout.drawn(rng) if layouts else Layout()
        met = None
        with Launched(config, run, layout, folder / f"cut-{attempt}.log") as job:
            if len(report.kills) < kills:
                who, moment = next(plan)
                met = strike(job, who, moment, rng, start_s, wait_steps=rng.randrange(8))
            if met is None:
                _unkilled(job, layout)
            else:
                report.orphans += aftermath(job, who, steps)
        start_s = min(start_s, job.start_s or start_s)
        if job.first_step is not None:
            report.again += max(0, stood - job.first_step)
            stood = job.step
        if met is None:
            if len(report.kills) < kills:
                say(f"the run was done after {len(report.kills)} of {kills} kills")
            break
        whole = guard.whole()
        lost = 0 if job.first_step is None else max(0, stood - guard.newest)
        left = tuple(sorted(path.name for path in guard.folder.glob(f"{DRAFT}*")))
        report.kills.append(Kill(who, moment, met, lost, left))
        harm = guard.harm(rng) if damage and rng.random() < 0.5 else None
        report.harmed.update([harm] if harm else [])
        say(
            f"kill {len(report.kills)}: {who}, {moment}{'' if met else ' (not met)'}, step {stood}, newest whole "
            f"{whole[-1].name if whole else 'none'}{f', {harm} it' if harm else ''}"
        )
    check_end(guard.folder, steps)
    report.worst = compare(folder / "whole", run, steps, TOLERANCE if layouts else 0.0)


def _unkilled(job: Launched, layout: Layout) -> None:
    """Waits for the end of a start that nobody kills."""
    try:
        code = job.process.wait(START_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"no end {START_S:.0f} s after the last kill:\n{job.told()}") from None
    job.read()
    if code:
        raise Fault(f"a start with {layout} ended with exit code {code}, unkilled:\n{job.told()}")


def _undisturbed(config: Path, folder: Path, report: Report) -> float:
    """Trains without a kill; returns the seconds between the ranks' birth and the start of training."""
    with Launched(config, folder / "whole", Layout(), folder / "whole.log") as job:
        job.bear()
        job.trains()
        code = job.process.wait()
        report.whole_s = time.monotonic() - job.began
        if code:
            raise Fault(f"the undisturbed run ended with exit code {code}:\n{job.told()}")
    check_end(folder / "whole" / "checkpoints", report.steps)
    return job.start_s or 0.0


def tell(report: Report, console: Console) -> None:
    """Prints the kills by victim and moment, what they cost, and PASS or the fault."""
    table = Table("killed", *MOMENTS, "all", "moment met", "steps lost, most")
    for who in (*VICTIMS, "all"):
        mine = [kill for kill in report.kills if who in (kill.victim, "all")]
        counts = [sum(kill.moment == moment for kill in mine) for moment in MOMENTS]
        cells = [*counts, len(mine), sum(kill.met for kill in mine), max((kill.lost for kill in mine), default=0)]
        table.add_row(who, *(str(cell) for cell in cells))
    met = [sum(kill.met and kill.moment == moment for kill in report.kills) for moment in MOMENTS]
    table.add_row("moment met", *(str(count) for count in met), "", "", "")
    console.print(table)
    drafts = sum(any(name.startswith(f"{DRAFT}step-") for name in kill.left) for kill in report.kills)
    halves = sum(any(name.startswith(f"{DRAFT}old-") for name in kill.left) for kill in report.kills)
    facts = {
        "restarts": len(report.kills),
        "steps of the run": report.steps,
        "steps lost, sum": sum(kill.lost for kill in report.kills),
        "steps trained twice": report.again,
        "kills that left a draft": drafts,
        "kills that left a half deletion": halves,
        "ranks orphaned, then killed": report.orphans,
        "checkpoints harmed": ", ".join(f"{how} {count}" for how, count in report.harmed.items()) or "none",
        "greatest difference of a loss": "not compared" if report.worst is None else f"{report.worst:.1e}",
        "seconds": f"{report.seconds:.0f}, undisturbed run {report.whole_s:.0f}",
    }
    for name, value in facts.items():
        console.print(f"{name}: {value}")
    console.print("PASS" if report.fault is None else f"FAIL: {report.fault}", markup=False)


def main(argv: list[str] | None = None) -> int:
    """The command; 0: the run survived, 1: it did not."""
    command = parser("chaos", __doc__)
    command.add_argument("--kills", type=int, default=50)
    command.add_argument("--seed", type=int, help="default: a random one, printed")
    command.add_argument("--layouts", action="store_true", help="another layout at every start")
    command.add_argument("--damage", action="store_true", help="harm checkpoints between kills")
    command.add_argument("--folder", type=Path, help="an empty one, which stays; default: a temporary one")
    args = command.parse_args(argv)
    if args.folder is not None and names(args.folder):
        command.error(f"--folder {args.folder}: it is not empty")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the job is ended on the way out
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    console = wide_console(120)
    console.print(f"seed {seed}")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    report = chaos(folder, args.kills, seed, args.layouts, args.damage, lambda text: print(text, flush=True))
    tell(report, console)
    if report.fault is None and args.folder is None:
        shutil.rmtree(folder)
    else:
        console.print(f"data, logs and runs: {folder}")
    return 0 if report.fault is None else 1


if __name__ == "__main__":
    sys.exit(main())
