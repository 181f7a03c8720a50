"""How a job ended, as its run folder tells: `exit.json`, and a file in `failures/` for each rank that failed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from common.files import free_name, replace_file, writing
from common.strict_json import read_json, to_json
from common.variables import LEASE_VARIABLE
from pretrain.records import fits, hints_of

MOST = 1 << 24  # bytes of a record
Record = TypeVar("Record")

EXIT_RECORD = "exit.json"
FAILURES = "failures"
CUT_OFF = "the connection to"  # begins the reason of ranks that saved and left since nobody reads what they print


@dataclass(frozen=True)
class Exit:
    """How a job ended, for its launcher and for those who look later."""

    code: int
    reason: str = ""
    step: int | None = None  # None: it failed
    job: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why a rank ended before its work was done: `failures/rank-N.json`."""

    rank: int
    host: str
    time: float  # seconds since the epoch, by the host's clock
    kind: str  # error: its own; collective: another was gone; stuck; lost: another gave no sign; told: by another
    phase: str  # rendezvous, load, data, forward, backward, update, collective, evaluation, save, ...
    error: str
    traceback: str
    code: int
    suspects: list[int]  # ranks that it ended for
    job: str | None  # the id of the rank's job


def leave_exit(run: Path, job: str, code: int, reason: str, step: int | None) -> None:
    """Writes `exit.json`, on the first rank. Raises OSError. `step`: the updates that the run has; None: it failed."""
    replace_file(run / EXIT_RECORD, to_json(asdict(Exit(code, reason, step, job))))


def read_exit(run: Path) -> Exit | None:
    """None if no job has ended in the folder, or what is there is no record: it does not tell how."""
    return _read(run / EXIT_RECORD, Exit)


def _read(path: Path, model: type[Record]) -> Record | None:
    """A record that a job left; None if it is not there, or is none: half of a write, or of another program."""
    try:
        values = read_json(path, MOST)
        record = model(**values)
    except (OSError, ValueError, TypeError):
        return None
    hints = hints_of(model)
    right = all(fits(value, hints[name]) for name, value in values.items())
    return record if right else None


def leave_failure(run: Path, failure: Failure) -> None:
    """Writes a rank's record of its failure. Raises OSError."""
    folder = run / FAILURES
    folder.mkdir(exist_ok=True)
    draft = folder / f"draft-{failure.rank}"
    draft.write_text(to_json(asdict(failure), indent=1))
    os.replace(draft, folder / f"rank-{failure.rank}.json")


def launched_run(environment: Mapping[str, str]) -> Path | None:
    """The run folder of the launcher that started this rank, which has its lease there; None if none of ours did."""
    lease = environment.get(LEASE_VARIABLE)
    return Path(lease).parent if lease else None


def read_failures(run: Path, job: str) -> list[Failure]:
    """Of a job's own ranks, earliest first."""
    read = (_read(path, Failure) for path in (run / FAILURES).glob("rank-*.json"))
    return sorted((failure for failure in read if failure and failure.job == job), key=lambda failure: failure.time)


def set_aside_failures(run: Path) -> None:
    """Keeps the failures of an earlier job under a name of their own. Raises ConfigError."""
    folder = run / FAILURES
    if os.path.lexists(folder):
        with writing(run):
            os.replace(folder, free_name(folder))
