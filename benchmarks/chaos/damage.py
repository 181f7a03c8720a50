"""`python -m benchmarks.chaos.damage [--cases 500] [--seed N]`: do readers survive what no writer wrote?

A tiny run of two ranks is copied for every case, its newest checkpoint (at times the one before too) or another of its
files is mutated so that manifests agree, and the copy is given to six commands as processes: evaluate, verify, export,
sample, report, and training that goes on. Each must come to the undisturbed result, by the checkpoint before with a
warning, or refuse in words (exit code 2, or FAIL of verify). A traceback, a hang, or another result without a word is a
fault: exit code 1, with the numbers of the cases, which `--first K --cases 1` repeats.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chaos.mutations import NO_RECORD, mutate_checkpoint, mutate_run
from benchmarks.measuring import parser, wide_console
from common.exits import EXIT_PREEMPTED
from common.files import sha256_of
from pretrain.checkpoints.folder import LATEST, name_of
from pretrain.run_folder import METRICS
from pretrain.runtime.endings import leave_exit
from tests.support.commands import Command
from tests.support.ranks import run_ranks
from tests.support.tiny import make_text, run_to_end, text_config

LIMIT_S = 60.0  # after which a command hangs
# Bytes of addresses that a command may have; DeepSpeed takes 2 GB for a bucket. What reads a device would take all.
MEMORY = 2**34
OLDER, NEWER, STEPS = 2, 4, 6
RIGHT, OLD, REFUSED, TAKEN = "right", "the one before, told", "refused in words", "as it now says"
FAULTS = TRACEBACK, HANG, SILENT = ("traceback", "hang", "wrong without a word")
COMMANDS = ("evaluate", "verify", "export", "sample", "report", "resume")
LAYOUT = ("parallel.zero=1", "parallel.vocab=1")  # of the one process that goes on


@dataclass(frozen=True)
class Fault:
    """One command of one case that ended as none may."""

    case: int
    mutation: str
    command: str
    outcome: str
    said: str  # its last line


class Damage:
    """A base folder with an undisturbed run, and what the commands make of copies of it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.outcomes: dict[str, Counter[str]] = {command: Counter() for command in COMMANDS}
        self.faults: list[Fault] = []
        self.truths: dict[str, dict[int, Any]] = {command: {} for command in COMMANDS}  # by the checkpoint it is of
        base.mkdir(parents=True, exist_ok=True)
        make_text(base / "data")
        run_ranks(_train, 2, base, base=base)
        self.whole = base / "run"
        shutil.copy(self.whole / "config.yaml", base / "config.yaml")
        checkpoints = self.whole / "checkpoints"
        shutil.rmtree(checkpoints / name_of(STEPS))  # as if killed before it
        (checkpoints / LATEST).write_text(f"{name_of(NEWER)}\n")
        leave_exit(self.whole, "job", EXIT_PREEMPTED, "SIGTERM", NEWER)
        for step in (NEWER, OLDER):
            run = self._copy("truth")
            if step == OLDER:
                shutil.rmtree(run / "checkpoints" / name_of(NEWER))
                (run / "checkpoints" / LATEST).write_text(f"{name_of(OLDER)}\n")
            for command, done in self._commands(run, run):
                assert done is not None and done.returncode == 0, (command, done)
                self.truths[command][step] = result_of(command, done, run)

    def case(self, number: int, seed: int) -> str:
        """Mutates a copy and gives it to every command; returns what was mutated."""
        rng = random.Random(f"{seed} {number}")
        run = self._copy("case")
        newest = run / "checkpoints" / name_of(NEWER)
        of_checkpoint = rng.random() < 0.7
        told = mutate_checkpoint(newest, rng) if of_checkpoint else mutate_run(run, rng)
        if of_checkpoint and rng.random() < 0.25:
            told += f"; before it {mutate_checkpoint(newest.with_name(name_of(OLDER)), rng)}"
        subject = newest if of_checkpoint and rng.random() < 0.3 else run
        for command, done in self._commands(run, subject):
            outcome = self._judge(command, done, run, believed=not of_checkpoint and NO_RECORD not in told)
            self.outcomes[command][outcome] += 1
            if outcome in FAULTS:
                lines = [] if done is None else (done.stderr or done.stdout).strip().splitlines()
                self.faults.append(Fault(number, told, command, outcome, lines[-1] if lines else ""))
        return told

    def _copy(self, name: str) -> Path:
        shutil.rmtree(self.base / name, ignore_errors=True)
        return shutil.copytree(self.whole, self.base / name / "run")

    def _commands(self, run: Path, subject: Path) -> Iterator[tuple[str, subprocess.CompletedProcess[str] | None]]:
        """Each command's name, and how it ended; None: it did not. Training goes on last: it changes the run."""
        words: dict[str, tuple[object, ...]] = {
            "evaluate": ("pretrain.evaluate", subject, "--json"),
            "verify": ("pretrain.verify", run, "--steps", 1, *LAYOUT),
            "export": ("pretrain.export", subject, "--out", run.parent / "exported"),
            "sample": ("pretrain.sample", subject, "--seed", 1, "--tokens", 8),
            "report": ("pretrain.report", run, "--json"),
            "resume": ("pretrain", self.base / "config.yaml", f"run={run}", *LAYOUT),
        }
        for command in COMMANDS:
            program, *arguments = map(str, words[command])
            started = Command("-m", program, *arguments)
            try:
                code = started.wait(LIMIT_S)
                yield command, subprocess.CompletedProcess(started.args, code, started.stdout, started.stderr)
            except subprocess.TimeoutExpired:
                yield command, None
            finally:
                started.kill()

    def _judge(self, command: str, done: subprocess.CompletedProcess[str] | None, run: Path, believed: bool) -> str:
        """`believed`: a config or records that say something else are taken at their word."""
        if done is None:
            return HANG
        if "Traceback (most recent call last)" in done.stderr:
            return TRACEBACK
        if done.returncode == 2 and "error: " in done.stderr:
            return REFUSED
        if done.returncode == 1 and command == "verify" and done.stdout.startswith("FAIL: "):
            return REFUSED
        if done.returncode != 0:
            return TRACEBACK
        step = OLDER if f"not going on from {name_of(NEWER)}" in done.stderr else NEWER
        if result_of(command, done, run) == self.truths[command][step]:
            return RIGHT if step == NEWER else OLD
        warned = METRICS in done.stderr  # of a line that was left out
        return TAKEN if warned or (believed and command != "resume") else SILENT


def result_of(command: str, done: subprocess.CompletedProcess[str], run: Path) -> Any:
    """What a command came to, without what tells copies apart."""
    if command in ("evaluate", "report"):
        return done.stdout.replace(str(run), "RUN") if command == "report" else _figures(done.stdout)
    if command == "export":
        return [sha256_of(run.parent / "exported" / "model.safetensors")]
    if command == "resume":
        return [line["loss"] for line in _records(run) if line["kind"] == "train" and line["step"] > OLDER]
    return done.stdout


def _figures(text: str) -> Any:
    found = json.loads(text)
    return {key: value for key, value in found.items() if key != "checkpoint"}


def _records(run: Path) -> list[dict[str, Any]]:
    found = []
    for line in (run / METRICS).read_bytes().splitlines() if (run / METRICS).is_file() else ():
        with suppress(ValueError, RecursionError):  # one that is none
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and {"kind", "step", "loss"} <= record.keys()]


def _train(base: Path) -> None:
    layout: dict[str, Any] = {"parallel__zero": 3, "parallel__vocab": 2, "model__layers": 1}
    often: dict[str, Any] = {"checkpoint__every": 2, "checkpoint__keep": 9, "logging__every": 1}
    run_to_end(text_config(base, train__steps=STEPS, **often, **layout))


def tell(damage: Damage, console: Console) -> None:
    """Prints the outcomes by command, and the faults."""
    columns = (RIGHT, OLD, REFUSED, TAKEN, *FAULTS)
    table = Table("command", *columns)
    for command, counts in damage.outcomes.items():
        table.add_row(command, *(str(counts[column]) for column in columns))
    console.print(table)
    for fault in damage.faults:
        told = f"case {fault.case}, {fault.command}: {fault.outcome}; {fault.mutation}: {fault.said}"
        console.print(told, markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """The command; 0: no fault, 1: some."""
    command = parser("chaos.damage", __doc__)
    command.add_argument("--cases", type=int, default=500)
    command.add_argument("--first", type=int, default=0, help="number of the first case (default %(default)s)")
    command.add_argument("--seed", type=int, default=1, help="of what is mutated, and how (default %(default)s)")
    command.add_argument("--folder", type=Path, help="a new one, which stays; default: a temporary one")
    args = command.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    console = wide_console(160)
    began = time.monotonic()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="damage-"))).absolute()
    damage = Damage(folder)
    for number in range(args.first, args.first + args.cases):
        told = damage.case(number, args.seed)
        bad = [f"{fault.command}: {fault.outcome}: {fault.said}" for fault in damage.faults if fault.case == number]
        print(f"{number}: {told!r}", *bad, sep="\n  ", file=sys.stderr, flush=True)
    tell(damage, console)
    faulty = len({fault.case for fault in damage.faults})
    console.print(f"seed {args.seed}, {args.cases} cases, {faulty} with a fault, {time.monotonic() - began:.0f} s")
    if args.folder is None:
        shutil.rmtree(folder)
    return 1 if damage.faults else 0


if __name__ == "__main__":
    sys.exit(main())
