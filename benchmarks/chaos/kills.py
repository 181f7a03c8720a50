"""A job that is killed: which of its processes, and at which moment."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos.judge import Fault
from benchmarks.processes import Job, end
from common.processes import kill, members, running_module
from pretrain.checkpoints.folder import DRAFT, LATEST

VICTIMS = ("one rank", "all ranks", "launch", "deepspeed")
MOMENTS = ("start", "training", "draft", "publication", "deletion")
SEQUENCES = 8  # per step
POLL_S = 2e-4
MOMENT_S = 3.0  # after which a kill no longer waits for its moment
ORPHAN_S = 0.5  # that the ranks of a killed launcher may train on
END_S = 120.0  # for a job to end whose ranks or whose deepspeed were killed
START_S = 300.0  # for a job's first step


@dataclass(frozen=True)
class Layout:
    """What may change from one restart to the next."""

    ranks: int = 2
    zero: int = 1
    vocab: int = 2
    micro_batch: int = 4

    def arguments(self) -> list[str]:
        """The words of `overtone run` that ask for it."""
        settings = (
            f"parallel.zero={self.zero}",
            f"parallel.vocab={self.vocab}",
            f"train.micro_batch={self.micro_batch}",
        )
        return ["--num-gpus", str(self.ranks), *settings]

    @staticmethod
    def drawn(rng: random.Random) -> Layout:
        """One that can train SEQUENCES a step."""
        ranks = rng.choice((1, 2))
        micro_batch = rng.choice([size for size in (1, 2, 4, 8) if size * ranks <= SEQUENCES])
        return Layout(ranks, rng.randrange(4), rng.choice((1, ranks)), micro_batch)


class Launched(Job):
    """`overtone run`, the session of processes below it, and what its log says so far."""

    def __init__(self, config: Path, run: Path, layout: Layout, log: Path) -> None:
        words = [sys.executable, "-m", "launch", "run", str(config), *layout.arguments(), f"run={run}"]
        self.folder = run / "checkpoints"
        self.began = time.monotonic()
        self.born: float | None = None  # when its ranks were
        self.start_s: float | None = None  # from then on until it began to train
        self.first_step: int | None = None  # where it stood when it began to train; None: not there yet
        self.step = 0
        self._rest = ""
        self._session: int | None = None
        super().__init__(words, log, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"})
        self._reader = log.open()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._reader.close()

    def read(self) -> None:
        """Takes in what the log says since the last call."""
        before = self.first_step
        *lines, self._rest = (self._rest + self._reader.read()).split("\n")
        for line in lines:
            if progress := re.match(r"step (\d+)/", line):
                self.step = int(progress[1])
            elif resumed := re.match(r"resumed from .*step-(\d+)", line):
                self.first_step = self.step = int(resumed[1])
            elif line.startswith("started in "):
                self.first_step = 0
        if before is None and self.first_step is not None and self.born is not None:
            self.start_s = time.monotonic() - self.born

    def bear(self) -> bool:
        """Waits for the ranks; False if the job ended before there were any."""
        born = self.until(lambda: bool(self.ranks()), START_S, 0.05)
        self.born = time.monotonic()
        return born

    def trains(self, step: int = 0) -> bool:
        """Waits until it trains and has reached a step; False if the job ended first."""
        return self.until(lambda: self.reached(step), START_S) and self.running()

    def reached(self, step: int) -> bool:
        """Whether the log tells, by now, that it trains and has taken so many steps."""
        self.read()
        return self.first_step is not None and self.step >= step

    def members(self) -> list[psutil.Process]:
        """The living processes of the job below `launch`, orphans included."""
        if self._session is None:
            with suppress(psutil.Error, OSError):
                children = psutil.Process(self.process.pid).children()
                self._session = next((child.pid for child in children if os.getsid(child.pid) == child.pid), None)
        return members(self._session) if self._session else []

    def ranks(self) -> list[psutil.Process]:
        """Its living ranks; none before deepspeed has started them."""
        return running_module(self.members(), "pretrain")

    def victims(self, who: str, rng: random.Random) -> list[psutil.Process]:
        """The processes that a kill of this kind ends."""
        if who == "launch":
            return [psutil.Process(self.process.pid)]
        if who == "deepspeed":
            left = self.members()
            outer = [process for process in left if process.pid == self._session]
            return [rng.choice(outer + running_module(left, "deepspeed.launcher.launch"))]
        return self.ranks() if who == "all ranks" else [rng.choice(self.ranks())]

    def kill(self) -> None:
        """Ends whatever is left of it, orphans too."""
        left = self.members()
        end(self.process)
        kill(left)
        psutil.wait_procs(left, timeout=10)

    def told(self) -> str:
        """The end of the log."""
        return self.said()[-2000:]


# ---- the moment


def names(folder: Path) -> set[str]:
    """What is in a folder; nothing if it is not there."""
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
    """How many files of a draft are not empty."""
    try:
        return sum(entry.stat().st_size > 0 for entry in os.scandir(draft))
    except FileNotFoundError:  # published, or deleted, while we look
        return 0


def strike(job: Launched, who: str, moment: str, rng: random.Random, start_s: float, wait_steps: int) -> bool | None:
    """Kills at the moment; returns whether the moment was met, None if the job ended before."""
    if not job.bear():
        return None
    if moment == "start":
        met = not job.until(lambda: job.reached(0), rng.uniform(0, start_s), 0.02)
        if not job.running():
            return None
        targets = job.victims(who, rng)
    else:
        if not job.trains():
            return None
        assert job.first_step is not None
        targets = job.victims(who, rng)
        if not job.trains(job.first_step + wait_steps):
            return None
        if moment == "training":
            time.sleep(rng.uniform(0, 0.2))
            met = True
        else:
            met = job.until(watch(moment, job.folder, rng), MOMENT_S, POLL_S)
    if not job.running():
        return None
    kill(targets)
    return met


def aftermath(job: Launched, who: str, steps: int) -> int:
    """The job's end after a kill: by itself, but for the orphans of a killed launcher, whose number is returned.

    Raises:
        Fault: it does not end, leaves processes, or claims success.
    """
    if who == "launch":
        job.process.wait()
        orphans = job.ranks()
        psutil.wait_procs(orphans, timeout=ORPHAN_S)
        outlived = sum(process.is_running() for process in orphans)
        job.kill()
        job.read()
        return outlived
    try:
        code = job.process.wait(END_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"{END_S:.0f} s after {who} was killed, the launcher still runs:\n{job.told()}") from None
    job.read()
    if left := job.members():
        raise Fault(f"the launcher left processes after {who} was killed: {left}")
    if code == 0 and job.step < steps:
        raise Fault(f"exit code 0 at step {job.step} of {steps} after {who} was killed")
    return 0
