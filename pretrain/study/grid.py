"""A grid of language-model runs that differ in the head, the learning rate and the seed, and in nothing else.

Every head is trained at every learning rate with the first seed. The rate with the best mean of held-out bits/byte then
gets the next seed, until the best one has them all: a rate that was lucky with one seed does not stay the best. A run
is a run folder as any other, made by `overtone run`; what is done is skipped, and what was stopped goes on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_DIVERGED
from common.fields import FilePath, Name, Positive, Seed
from common.files import replace_file
from common.units import clock
from data.prepare import prepare
from model.config import HeadConfig
from pretrain.config import (
    RunConfig,
    check_data,
    dump,
    from_tree,
)
from pretrain.records import Eval
from pretrain.run_folder import RunFolder

LAUNCH = [sys.executable, "-m", "launch", "run"]
MOST_CELLS = 2000
DONE, DIVERGED = "done", "diverged"
NOT_ITS_OWN = {"run": "out", "head": "heads", "train.seed": "seeds", "optim.lr": "lrs"}


class LanguageConfig(BaseModel, extra="forbid", frozen=True):
    """A study. `base` is a run's configuration (see pretrain/config.py) but for what the grid sets."""

    kind: Literal["language"]
    title: Name
    out: FilePath  # the study's folder
    heads: dict[Name, HeadConfig] = Field(min_length=1)
    baseline: str  # one of the heads, which the others are compared with
    lrs: tuple[Positive, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    lr_floor: float = Field(default=0.0, ge=0, le=1)  # the schedule ends at this share of the learning rate
    base: dict[str, Any]

    @field_validator("lrs", "seeds")
    @classmethod
    def _different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{list(values)} has a value twice")
        return values

    @model_validator(mode="after")
    def _names_fit(self) -> LanguageConfig:
        if self.baseline not in self.heads:
            raise ValueError(f"baseline={self.baseline} is none of the heads: {', '.join(self.heads)}")
        for name in self.heads:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"heads.{name}: a name names folders: letters, digits, - and _ alone")
        names = len(self.heads) * len({f"{lr:g}" for lr in self.lrs}) * len(self.seeds)
        if names < (cells := len(self.heads) * len(self.lrs) * len(self.seeds)):
            raise ValueError(f"lrs={list(self.lrs)}: two have the same first six digits, which name their folders")
        if cells > MOST_CELLS:
            raise ValueError(f"{cells:,} combinations of heads, lrs and seeds; a study has at most {MOST_CELLS:,}")
        for key, ours in NOT_ITS_OWN.items():
            section, _, setting = key.rpartition(".")
            given = (self.base.get(section) or {}) if section else self.base
            if not isinstance(given, dict):
                raise ValueError(f"base.{section} must be a mapping of keys to values; it has the settings of a run")
            if setting in given:
                raise ValueError(f"base.{key} is set by the study: use {ours}")
        return self

    def config(self, cell: Cell) -> RunConfig:
        """What a cell trains. Raises ConfigError."""
        tree: dict[str, Any] = {**self.base, "run": str(self.out / "runs" / cell.name)}
        tree["head"] = self.heads[cell.head].model_dump(mode="json")
        tree["train"] = {**(tree.get("train") or {}), "seed": cell.seed}
        tree["optim"] = {**(tree.get("optim") or {}), "lr": cell.lr, "min_lr": cell.lr * self.lr_floor}
        return from_tree(tree)

    def sweep(self) -> list[Cell]:
        """The first seed's cells, all heads of a rate before the next rate: what a machine does to its speed over time
        it does to all heads alike.
        """
        return [Cell(head, lr, self.seeds[0]) for lr in self.lrs for head in self.heads]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    head: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder and its configuration; no two cells of a study share it."""
        return f"{self.head}-lr{self.lr:g}-seed{self.seed}"


def check(study: LanguageConfig) -> None:
    """Raises ConfigError if a run of the study could not be trained, or one that is there was another."""
    for cell in [Cell(c.head, c.lr, seed) for c in study.sweep() for seed in study.seeds]:
        cfg = study.config(cell)
        run = RunFolder(cfg.run)
        if run.config.exists() and dump(run.settings()) != dump(cfg):
            raise ConfigError(
                f"{cfg.run} was trained with other settings than this study's; give the study another `out`, or remove "
                "that folder"
            )


def outcome(cfg: RunConfig) -> str | None:
    """DONE or DIVERGED, as is a run whose last held-out loss is not finite; None for a run that has not ended."""
    ended = RunFolder(cfg.run).exit()
    if ended is None or ended.code not in (0, EXIT_DIVERGED):
        return None
    last = _last_evaluation(cfg)
    return DIVERGED if ended.code or (last and last.loss is None) else DONE


def held_out(cfg: RunConfig) -> float | None:
    """Bits/byte of a run's last evaluation, if it is done."""
    if outcome(cfg) != DONE:
        return None
    last = _last_evaluation(cfg)
    return last.bits_per_byte if last else None


def _last_evaluation(cfg: RunConfig) -> Eval | None:
    """Its record; None if the run left none."""
    return next(reversed(RunFolder(cfg.run).records(Eval)), None)


def chosen_lr(study: LanguageConfig, head: str) -> float | None:
    """The rate with the best mean over its seeds so far, one with a run that diverged after those without; None if
    none has a run that is done.
    """
    rank: dict[float, tuple[int, float]] = {}
    for lr in study.lrs:
        configs = [study.config(Cell(head, lr, seed)) for seed in study.seeds]
        bits = [found for cfg in configs if (found := held_out(cfg)) is not None]
        if bits:
            rank[lr] = sum(outcome(cfg) == DIVERGED for cfg in configs), fmean(bits)
    return min(rank, key=rank.__getitem__) if rank else None


def cells(study: LanguageConfig) -> Iterator[Cell]:
    """All cells, in their order: the sweep, what is there of other seeds, and then, as long as a head's best rate lacks
    a seed, that cell, a head after the other. What is asked for next depends on what the last one came to.
    """
    yield from study.sweep()
    given = set()
    for cell in (Cell(head, lr, seed) for seed in study.seeds[1:] for lr in study.lrs for head in study.heads):
        if outcome(study.config(cell)):
            given.add(cell)
            yield cell
    asked = True
    while asked:
        asked = False
        for head in study.heads:
            lr = chosen_lr(study, head)
            left = [Cell(head, lr, seed) for seed in study.seeds[1:]] if lr is not None else []
            wanted = next((one for one in left if one not in given), None)
            if wanted is not None:
                asked = True
                given.add(wanted)
                yield wanted


class Stopped(Exception):
    """A run ended by neither of its ways: `code` is that of the launcher."""

    def __init__(self, cell: Cell, code: int) -> None:
        super().__init__(f"{cell.name}: exit code {code}")
        self.code = code


def start(config: Path, options: Sequence[str]) -> int:
    """Runs a job to its end; its exit code. A SIGTERM is handed on to it, Ctrl-C reaches it by itself: it saves, and
    ends.
    """
    job = subprocess.Popen([*LAUNCH, str(config), *options])
    handlers = {signal.SIGTERM: lambda *_: job.terminate(), signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return job.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(study: LanguageConfig, launch: Sequence[str], log: Callable[[str], None]) -> None:
    """Prepares the data and trains what is not done.

    Args:
        launch: options of `overtone run`, such as --hostfile.

    Raises:
        Stopped: a run was preempted, or failed; the same command goes on.
    """
    cfg = study.config(study.sweep()[0])
    prepare(cfg.data, log)
    check_data(cfg)
    total = len(study.heads) * (len(study.lrs) + len(study.seeds) - 1)
    seconds: list[float] = []
    for number, cell in enumerate(cells(study), start=1):
        cfg = study.config(cell)
        if outcome(cfg):
            continue
        waiting = max(1, total - number + 1)
        left = f", about {clock(sum(seconds) / len(seconds) * waiting)} left" if seconds else ""
        log(f"run {number} of {max(number, total)}{' or more' if len(study.seeds) > 1 else ''}: {cell.name}{left}")
        path = study.out / "configs" / f"{cell.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, dump(cfg))
        began = time.monotonic()
        code = start(path, launch)
        seconds.append(time.monotonic() - began)
        if code == EXIT_BAD_INPUT:
            raise ConfigError(f"{cell.name} could not be started: see above")
        if outcome(cfg) is None or code not in (0, EXIT_DIVERGED):
            raise Stopped(cell, code)
