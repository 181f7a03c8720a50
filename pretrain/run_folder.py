"""A run folder: the names of the files in it."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_RECORD = "exit.json"  # how the run ended
FAILURES = "failures"  # a folder: `rank-N.json` of each rank that failed or was ended


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
