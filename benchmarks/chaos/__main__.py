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

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from pretrain.checkpoints import folder as checkpoint
from pretrain.checkpoints.folder import DRAFT, LATEST
from pretrain.metrics import read_records

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = ("one rank", "all ranks", "launch", "deepspeed")
MOMENTS = ("start", "training", "draft", "publication", "deletion")
HARMS = ("truncate", "flip", "remove")

TOLERANCE = 2e-5  # of a loss in float32, when the layout changes
EVERY = 2  # steps between two checkpoints
SEQUENCES = 8  # per step
POLL_S = 2e-4
MOMENT_S = 3.0  # after which a kill no longer waits for its moment
ORPHAN_S = 0.5  # that the ranks of a killed launcher may train on
END_S = 120.0  # for a job to end whose ranks or whose deepspeed were killed
START_S = 300.0  # for a job's first step


class Fault(Exception):
    """Something that must not happen, in words."""


@dataclass(frozen=True)
class Layout:
    """What may change from one restart to the next."""

    ranks: int = 2
    zero: int = 1
    vocab: int = 2
    micro_batch: int = 4

    def arguments(self) -> list[str]:
        settings = (
            f"parallel.zero={self.zero}",
            f"parallel.vocab={self.vocab}",
            f"train.micro_batch={self.micro_batch}",
        )
        return ["--num-gpus", str(self.ranks), *settings]

    @staticmethod
    def drawn(rng: random.Random) -> Layout:
        ranks = rng.choice((1, 2))
        micro_batch = rng.choice([size for size in (1, 2, 4, 8) if size * ranks <= SEQUENCES])
        return Layout(ranks, rng.randrange(4), rng.choice((1, ranks)), micro_batch)


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


# ---- a job and its processes


class Job:
    """`python -m launch run`, the session of processes below it, and what its log says so far."""

    def __init__(self, config: Path, run: Path, layout: Layout, log: Path) -> None:
        words = [sys.executable, "-m", "launch", "run", str(config), *layout.arguments(), f"run={run}"]
        self.folder, self.log = run / "checkpoints", log
        self.began = time.monotonic()
        self.born: float | None = None  # when its ranks were
        self.start_s: float | None = None  # from then on until it began to train
        self.first_step: int | None = None  # where it stood when it began to train; None: not there yet
        self.step = 0
        self._rest = ""
        self._session: int | None = None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
        with log.open("wb") as out:
            self.launch = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self._reader = log.open()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._reader.close()

    def running(self) -> bool:
        return self.launch.poll() is None

    def read(self) -> None:
        """Takes in what the log says since the last call."""
        before = self.first_step
        *lines, self._rest = (self._rest + self._reader.read()).split("\n")
        for line in lines:
            if found := re.match(r"step (\d+)/", line):
                self.step = int(found[1])
            elif found := re.match(r"resumed from .*step-(\d+)", line):
                self.first_step = self.step = int(found[1])
            elif line.startswith("started in "):
                self.first_step = 0
        if before is None and self.first_step is not None and self.born is not None:
            self.start_s = time.monotonic() - self.born

    def bear(self) -> bool:
        """Waits for the ranks; False if the job ended before there were any."""
        born = self.until(lambda: bool(self.ranks()), START_S, 0.05)
        self.born = time.monotonic()
        return born

    def until(self, met: Callable[[], bool], seconds: float, poll_s: float = 0.005) -> bool:
        """Waits until something is so; False if the time is over or the job ended first."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            if met():
                return True
            time.sleep(poll_s)
        return False

    def reached(self, step: int) -> bool:
        self.read()
        return self.first_step is not None and self.step >= step

    def members(self) -> list[psutil.Process]:
        """The living processes of the job below `launch`, orphans included."""
        if self._session is None:
            with suppress(psutil.Error, OSError):
                below = psutil.Process(self.launch.pid).children()
                self._session = next((one.pid for one in below if os.getsid(one.pid) == one.pid), None)
        found = []
        for process in psutil.process_iter() if self._session else ():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self._session and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return self._running_module("pretrain")

    def victims(self, who: str, rng: random.Random) -> list[psutil.Process]:
        """The processes that a kill of this kind ends."""
        if who == "launch":
            return [psutil.Process(self.launch.pid)]
        if who == "deepspeed":
            outer = [one for one in self.members() if one.pid == self._session]
            return [rng.choice(outer + self._running_module("deepspeed.launcher.launch"))]
        return self.ranks() if who == "all ranks" else [rng.choice(self.ranks())]

    def _running_module(self, module: str) -> list[psutil.Process]:
        """Those that run `-m module`, without what they forked, which has the same command line."""
        found = {}
        for process in self.members():
            with suppress(psutil.Error):
                if ("-m", module) in itertools.pairwise(process.cmdline()):
                    found[process.pid] = (process, process.ppid())
        return [process for process, parent in found.values() if parent not in found]

    def end(self) -> None:
        """Kills whatever is left of it."""
        left = self.members()
        self.launch.kill()
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        self.launch.wait()

    def told(self) -> str:
        """The end of the log."""
        return self.log.read_text()[-2000:]


# ---- the moment


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()


def watch(moment: str, folder: Path, rng: random.Random) -> Callable[[], bool]:
    """A question to ask again and again: has the moment come?"""
    before = names(folder)
    if moment == "deletion":
        return lambda: any(name.startswith(f"{DRAFT}old-") for name in names(folder))
    if moment == "draft":
        least = rng.choice((0, 1, 2, 3))  # files in it that are not empty
        return lambda: any(filled(folder / name) >= least for name in names(folder) if name.startswith(f"{DRAFT}step-"))
    pointer = folder / LATEST
    if rng.random() < 0.5 and pointer.exists():
        named = pointer.read_text()
        return lambda: pointer.read_text() != named
    return lambda: any(name.startswith("step-") for name in names(folder) - before)


def filled(draft: Path) -> int:
    try:
        return sum(entry.stat().st_size > 0 for entry in os.scandir(draft))
    except FileNotFoundError:  # published, or deleted, while we look
        return 0


def strike(job: Job, who: str, moment: str, rng: random.Random, start_s: float, wait_steps: int) -> bool | None:
    """Kills at the moment; returns whether the moment was met, None if the job ended before."""
    if not job.bear():
        return None
    if moment == "start":
        pause = rng.uniform(0, start_s)
        met = not job.until(lambda: job.reached(0), pause, 0.02)
        if not job.running():
            return None
        targets = job.victims(who, rng)
    else:
        if not job.until(lambda: job.reached(0), START_S):
            return None
        assert job.first_step is not None
        targets = job.victims(who, rng)
        first = job.first_step + wait_steps
        if not job.until(lambda: job.reached(first), START_S):
            return None
        if moment == "training":
            time.sleep(rng.uniform(0, 0.2))
            met = True
        else:
            met = job.until(watch(moment, job.folder, rng), MOMENT_S, POLL_S)
    if not job.running():
        return None
    for process in targets:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return met


def aftermath(job: Job, who: str, report: Report, steps: int) -> None:
    """The job's end after a kill: by itself, but for the orphans of a killed launcher.

    Raises:
        Fault: it does not end, leaves processes, or claims success.
    """
    if who == "launch":
        job.launch.wait()
        orphans = job.ranks()
        psutil.wait_procs(orphans, timeout=ORPHAN_S)
        report.orphans += sum(process.is_running() for process in orphans)
        job.end()
        job.read()
        return
    try:
        code = job.launch.wait(END_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"{END_S:.0f} s after {who} was killed, the launcher still runs:\n{job.told()}") from None
    job.read()
    if left := job.members():
        raise Fault(f"the launcher left processes after {who} was killed: {left}")
    if code == 0 and job.step < steps:
        raise Fault(f"exit code 0 at step {job.step} of {steps} after {who} was killed")


# ---- checkpoints


class Watchdog:
    """What must hold between two runs: published checkpoints are whole, and the newest whole one is never older."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = 0  # step of the newest whole checkpoint
        self._harmed: dict[str, int] = {}  # name -> time of the folder's last change, in ns

    def whole(self) -> list[Path]:
        """The whole checkpoints, oldest first.

        Raises:
            Fault: another is not, and nobody harmed it; or the newest was lost.
        """
        found = []
        for path in checkpoint.checkpoints(self.folder):
            if self._harmed.get(path.name) == path.stat().st_mtime_ns:
                continue
            if wrong := checkpoint.damage(path):
                raise Fault(f"a published checkpoint is not whole: {wrong}")
            found.append(path)
        newest = checkpoint.step_of(found[-1]) if found else 0
        if newest < self.newest:
            raise Fault(f"the newest whole checkpoint was step {self.newest} and is step {newest}")
        self.newest = newest
        return found

    def harm(self, rng: random.Random) -> str | None:
        """Truncates, changes or removes a file of the newest whole checkpoint; None if it is the only one."""
        whole = self.whole()
        if len(whole) < 2:
            return None
        *_, before, victim = whole
        file = rng.choice(sorted(path for path in victim.iterdir() if path.stat().st_size))
        how = rng.choice(HARMS)
        if how == "remove":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            at = rng.randrange(len(content))
            if how == "truncate":
                del content[at:]
            else:
                content[at] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        os.utime(victim)
        self._harmed[victim.name] = victim.stat().st_mtime_ns
        self.newest = checkpoint.step_of(before)
        return how


def check_end(folder: Path, steps: int) -> None:
    """Raises Fault unless a finished run's checkpoints are in order."""
    found = checkpoint.checkpoints(folder)
    if drafts := sorted(path.name for path in folder.glob(f"{DRAFT}*")):
        raise Fault(f"left over after the end: {', '.join(drafts)}")
    if not found or checkpoint.step_of(found[-1]) != steps:
        raise Fault(f"no checkpoint of the last step {steps}: {[path.name for path in found]}")
    if (named := (folder / LATEST).read_text().strip()) != found[-1].name:
        raise Fault(f"`{LATEST}` names {named}, the newest is {found[-1].name}")
    if wrong := next(filter(None, map(checkpoint.damage, found)), None):
        raise Fault(f"after the end a checkpoint is not whole: {wrong}")


# ---- the comparison


def compare(whole: Path, cut: Path, steps: int, tolerance: float) -> float:
    """The greatest difference of a loss between two runs.

    Raises:
        Fault: the first difference beyond `tolerance`; a step that is missing or there twice; another batch.
    """
    expected, found = read_records(whole), read_records(cut)
    worst = 0.0
    for kind, keys in (("train", ("loss", "batch", "tokens", "lr")), ("eval", ("loss", "bits_per_byte"))):
        a, b = ([record for record in records if record["kind"] == kind] for records in (expected, found))
        if (have := [one["step"] for one in b]) != [one["step"] for one in a]:
            raise Fault(f"{kind} records are of the steps {first_odd(have)}")
        for was, now in zip(a, b, strict=True):
            for key in keys:
                approximate = tolerance and isinstance(was[key], float) and key != "lr"
                apart = abs(was[key] - now[key]) if isinstance(was[key], float) else 0.0
                if (apart > tolerance) if approximate else (was[key] != now[key]):
                    raise Fault(f"{kind}, step {was['step']}: {key} is {now[key]!r}, undisturbed {was[key]!r}")
                worst = max(worst, apart if key == "loss" else 0.0)
    if len([one for one in found if one["kind"] == "train"]) != steps:
        raise Fault(f"there are not {steps} steps in {cut / 'metrics.jsonl'}")
    if not tolerance:
        one, other = (tensors(run / "checkpoints" / checkpoint.name_of(steps)) for run in (whole, cut))
        if wrong := next((name for name in {**one, **other} if one.get(name) != other.get(name)), None):
            raise Fault(f"the last checkpoint's {wrong} is not that of the undisturbed run")
    return worst


def first_odd(steps: Sequence[int]) -> str:
    """Where a sequence of step numbers does not count on."""
    odd = next((k for k, (a, b) in enumerate(itertools.pairwise([0, *steps])) if b != a + 1), None)
    return f"1 to {len(steps)}" if odd is None else f"..., {', '.join(map(str, steps[max(0, odd - 2) : odd + 2]))}, ..."


def tensors(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.name}: {name}": values.tobytes() for path in files for name, values in load_file(path).items()}


# ---- the whole


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
        with Job(config, run, layout, folder / f"cut-{attempt}.log") as job:
            if len(report.kills) < kills:
                who, moment = next(plan)
                met = strike(job, who, moment, rng, start_s, wait_steps=rng.randrange(8))
            else:
                met = None
            if met is None:  # nobody was killed
                try:
                    code = job.launch.wait(START_S)
                except subprocess.TimeoutExpired:
                    raise Fault(f"no end {START_S:.0f} s after the last kill:\n{job.told()}") from None
                job.read()
                if code:
                    raise Fault(f"a start with {layout} ended with exit code {code}, unkilled:\n{job.told()}")
            else:
                aftermath(job, who, report, steps)
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


def _undisturbed(config: Path, folder: Path, report: Report) -> float:
    """Trains without a kill; returns the seconds between the ranks' birth and the start of training."""
    with Job(config, folder / "whole", Layout(), folder / "whole.log") as job:
        job.bear()
        job.until(lambda: job.reached(0), START_S)
        code = job.launch.wait()
        report.whole_s = time.monotonic() - job.began
        if code:
            raise Fault(f"the undisturbed run ended with exit code {code}:\n{job.told()}")
    check_end(folder / "whole" / "checkpoints", report.steps)
    return job.start_s or 0.0


def tell(report: Report, console: Console) -> None:
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Kill a run until it is done.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, help="default: a random one, printed")
    parser.add_argument("--layouts", action="store_true", help="another layout at every start")
    parser.add_argument("--damage", action="store_true", help="harm checkpoints between kills")
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; default: a temporary one")
    args = parser.parse_args(argv)
    if args.folder is not None and names(args.folder):
        parser.error(f"--folder {args.folder}: it is not empty")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the job is ended on the way out
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    console = Console(width=120, highlight=False)
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
