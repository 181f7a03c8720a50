"""The order of a study's runs: a search, a choice that is written down, and then fresh seeds.

1. Every head's trials are trained for the first share of the steps. The best of them by bits/byte of the `val` split at
   their end are trained anew for the next share, and so on (successive halving); what diverged comes last.
2. The best trial of the last rung is the chosen setting. `choice.json` says so before anything else is trained.
3. The chosen settings are trained with every fresh seed at every size, and scored on the test split.

A run is a run folder as any other, made by `overtone run`. What is done is skipped, and what was stopped goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED
from common.files import replace_file
from common.settings import validate
from common.strict_json import read_json, to_json
from common.units import clock
from data.prepare import prepare
from pretrain.config import RunConfig, check_data, dump
from pretrain.study.jobs import Jobs, Stopped
from pretrain.study.language_config import Cell, LanguageConfig, check_configs
from pretrain.study.records import DONE, Records, bits
from pretrain.study.tuning import ranks

CHOICE = "choice.json"
Choice = dict[str, Any]  # as it stands in the file


# ---- the search


def survivors(study: LanguageConfig, records: Records, head: str, rung: int) -> list[int] | None:
    """The trials of a head that are trained at a rung; None while the rung before is not done."""
    going = list(range(study.tuning.trials))
    for before in range(rung):
        ended = [records.get(_trial(study, head, number, before)) for number in going]
        if None in ended:
            return None
        ends = [bits(record) for record in ended]
        best = [place for place in ranks(ends) if ends[place] is not None]
        going = sorted(going[place] for place in best[: study.tuning.counts()[before + 1]])
    return going


def _trial(study: LanguageConfig, head: str, number: int, rung: int) -> Cell:
    return study.trial(head, number, rung, study.settings(head)[number])


def tried(study: LanguageConfig, records: Records, head: str) -> list[Cell]:
    """The trials of a head so far, rung by rung, with what is still to be trained of the rung that is under way."""
    found: list[Cell] = []
    for rung in range(len(study.tuning.rungs)):
        found += [_trial(study, head, number, rung) for number in survivors(study, records, head, rung) or ()]
    return found


def rung_of(study: LanguageConfig, records: Records, rung: int) -> list[Cell]:
    """The runs of a rung whose rung before is done: all heads of a trial before the next trial, so that what a machine
    does to its speed over time it does to all heads alike.
    """
    cells = [_trial(study, head, k, rung) for head in study.heads for k in survivors(study, records, head, rung) or ()]
    order = list(study.heads)
    return sorted(cells, key=lambda cell: (cell.trial, order.index(cell.head)))


def choose(study: LanguageConfig, records: Records) -> Choice:
    """The best trial of the last rung, head by head, and what finding it took. A head has none if all of its trials
    in the last rung diverged. `fresh_runs`: how many runs of fresh seeds were there already, as when another choice was
    made before and removed.
    """
    last = len(study.tuning.rungs) - 1
    found: dict[str, Any] = {}
    for head in study.heads:
        cells = tried(study, records, head)
        final = [cell for cell in cells if cell.rung == last]
        ends = [bits(records.get(cell)) for cell in final]
        best = next((place for place in ranks(ends) if ends[place] is not None), None)
        kept = [record for cell in cells if (record := records.get(cell))]
        found[head] = {
            "trial": None if best is None else final[best].trial,
            "setting": None if best is None else dict(final[best].setting),
            "bits_per_byte": None if best is None else ends[best],
            "trials": study.tuning.trials,
            "runs": len(kept),
            "diverged": sum(record["outcome"] != DONE for record in kept),
            "tokens": sum(record["summary"]["tokens"] for record in kept),
        }
    return {"asked": asked_of(study), "fresh_runs": records.fresh(), "heads": found}


def asked_of(study: LanguageConfig) -> dict[str, Any]:
    """What was said before anything was chosen: all of a study but its name, its place, and what it keeps."""
    return study.model_dump(mode="json", exclude={"title", "out", "keep"})


def read_choice(study: LanguageConfig) -> Choice | None:
    """The choice of a study; None if it was not made. Raises ConfigError if it is of another study."""
    file = study.out / CHOICE
    if not file.exists():
        return None
    try:
        found = read_json(file)
        asked = asked_of(validate(LanguageConfig, {**found["asked"], "title": study.title, "out": str(study.out)}))
        _ = [found["heads"][head]["setting"] for head in study.heads]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{file}: no choice of this study ({error}); remove it, and it is made again") from None
    if asked != (now := asked_of(study)):
        names = ", ".join(name for name in {**asked, **now} if asked.get(name) != now.get(name))
        raise ConfigError(
            f"{file} was made under other settings ({names}): what is compared is said before anything is chosen. Give "
            "the study another `out`, or remove that file, and the choice is made again from the trials that are there"
        )
    return found


def fresh(study: LanguageConfig, choice: Choice) -> list[Cell]:
    """The runs of the chosen settings, size by size and seed by seed, heads in turn."""
    cells = [
        cell
        for head, chosen in choice["heads"].items()
        if chosen["setting"] is not None
        for cell in study.fresh(head, chosen["setting"])
    ]
    sizes, seeds = list(study.sizes), list(study.seeds)
    return sorted(cells, key=lambda cell: (sizes.index(cell.size), seeds.index(cell.seed)))


def check(study: LanguageConfig, records: Records) -> Choice | None:
    """The choice, if it was made. Raises ConfigError if a run of the study could not be trained, or one that is there
    was another.
    """
    check_configs(study)
    choice = read_choice(study)
    for head in study.heads:
        for cell in tried(study, records, head):
            records.check(cell)
    for cell in fresh(study, choice) if choice else ():
        records.check(cell)
    return choice


# ---- what it takes


@dataclass(frozen=True)
class Planned:
    """Runs of a head that are alike in size and length."""

    head: str
    size: str
    what: str  # the rung, or fresh seeds
    runs: int
    steps: int  # of each
    tokens: int  # of all
    flops: float  # of all


def plan(study: LanguageConfig) -> list[Planned]:
    """All that the protocol trains, if no trial diverges."""
    found = []
    for head in study.heads:
        setting = study.settings(head)[0]
        for rung, count in enumerate(study.tuning.counts()):
            found.append(_planned(study, study.trial(head, 0, rung, setting), f"rung {rung + 1}", count))
        for size in study.sizes:
            cell = Cell(head, size, study.seeds[0], setting)
            found.append(_planned(study, cell, "fresh seeds", len(study.seeds)))
    return found


def _planned(study: LanguageConfig, cell: Cell, what: str, runs: int) -> Planned:
    cfg = study.config(cell)
    tokens = cfg.train.steps * cfg.train.tokens_per_step
    return Planned(cell.head, cell.size, what, runs, cfg.train.steps, runs * tokens, runs * _flops(cfg))


def _flops(cfg: RunConfig) -> float:
    return float(cfg.train.steps * cfg.train.tokens_per_step * cfg.model.flops_per_token())


# ---- training


class Training:
    """Trains the runs of a study that are not done, and records each.

    Args:
        launch: options of `overtone run`, such as --hostfile.
        count: runs at once.
        log: takes lines.
    """

    def __init__(
        self, study: LanguageConfig, records: Records, launch: Sequence[str], count: int, log: Callable[[str], Any]
    ) -> None:
        self.study, self.records, self.log = study, records, log
        self.jobs = Jobs(launch, count)
        planned = plan(study)
        self._left, self._runs = sum(one.flops for one in planned), sum(one.runs for one in planned)
        self._begun, self._seconds, self._trained = 0, 0.0, 0.0
        self._recording = threading.Lock()  # measuring takes all cores, and the lines of a log are whole

    def all(self, choice: Choice | None) -> None:
        """Prepares the data, searches, chooses unless that was done, and trains the fresh runs.

        Raises:
            Stopped: a run was preempted, or failed; the same command goes on.
        """
        study, records = self.study, self.records
        cfg = study.config(_trial(study, study.baseline, 0, 0))
        prepare(cfg.data, self.log)
        check_data(cfg)
        records.check_data(cfg)
        if choice is None:
            for rung in range(len(study.tuning.rungs)):
                self.each(rung_of(study, records, rung))
            choice = choose(study, records)
            replace_file(study.out / CHOICE, to_json(choice, indent=1) + "\n")
        else:
            for head in study.heads:
                self._count(tried(study, records, head))
        self.each(fresh(study, choice))

    def each(self, cells: Sequence[Cell]) -> None:
        """Trains and records what of these runs is not."""
        left = [cell for cell in cells if self.records.get(cell) is None]
        self._count([cell for cell in cells if self.records.get(cell) is not None])
        self.jobs.each(self._one, left)

    def _count(self, done: Sequence[Cell]) -> None:
        self._begun += len(done)
        self._left -= sum(_flops(self.study.config(cell)) for cell in done)

    def _one(self, cell: Cell) -> None:
        with self._recording:
            if self.jobs.stopped:  # and what was waiting is not begun
                raise Stopped(cell.name, EXIT_PREEMPTED)
            self._begun += 1
            if self._record(cell):  # it had ended, but nobody was there to record it
                self._left -= _flops(self.study.config(cell))
                return
            cfg, path = self.study.config(cell), self._config(cell)
            rate = self._seconds / self._trained if self._trained else None
            left = f", about {clock(rate * self._left / self.jobs.count)} left" if rate else ""
            self.log(f"run {self._begun} of {self._runs} at most: {cell.name}{left}")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, dump(cfg))
            if self.jobs.count > 1:
                self._shared(cell).touch()
        began = time.monotonic()
        code = self.jobs.launch(path)
        if code == EXIT_BAD_INPUT:
            raise ConfigError(f"{cell.name} could not be started: see above")
        with self._recording:
            made = self._record(cell) if code in (0, EXIT_DIVERGED) else False
            if not made:
                raise Stopped(cell.name, code)
            self._seconds, self._trained = self._seconds + time.monotonic() - began, self._trained + _flops(cfg)
            self._left -= _flops(cfg)

    def _record(self, cell: Cell) -> bool:
        return self.records.make(cell, self._shared(cell).exists(), self.log) is not None

    def _config(self, cell: Cell) -> Path:
        return self.study.out / "configs" / f"{cell.name}.yaml"

    def _shared(self, cell: Cell) -> Path:
        """Is there if the cell ran beside others."""
        return self._config(cell).with_name(f"{cell.name}.shared")

    def catch_up(self, choice: Choice | None) -> None:
        """Records what has ended and was not recorded; trains nothing."""
        for rung in range(len(self.study.tuning.rungs)):
            self._catch_up(rung_of(self.study, self.records, rung))
        self._catch_up(fresh(self.study, choice) if choice else [])

    def _catch_up(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if self.records.get(cell) is None:
                self._record(cell)
