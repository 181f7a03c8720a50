"""What tells that a run had checkpoints, where there are none: they are lost, and it must not begin anew unasked."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from common.errors import ConfigError
from common.exits import EXIT_PREEMPTED
from common.files import free_name, open_regular
from pretrain.checkpoints.folder import ABANDONED, LATEST
from pretrain.records import Save, scan
from pretrain.runtime.endings import EXIT_RECORD, read_exit

METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents*"  # of TensorBoard
SAVE_TAG = f"{Save.kind}/".encode()  # begins the names of a save's figures there
BLOCK = 1 << 20


def check_place(folder: Path) -> None:
    """Raises ConfigError if something else than a folder, or a link to one, stands where checkpoints are to lie."""
    if folder.is_dir() or not os.path.lexists(folder):
        return
    if folder.is_symlink():
        raise ConfigError(
            f"{folder}: a link to {os.readlink(folder)}, which is not there. Put back, or mount, what it leads to; or "
            "remove the link, to have the checkpoints in the run folder. Nothing was changed."
        )
    raise ConfigError(
        f"{folder}: checkpoints are to lie in it, but it is no folder. Move it away. Nothing was changed."
    )


def check_resume(folder: Path, resume: str, candidates: list[Path]) -> None:
    """Raises ConfigError if `resume` forbids the checkpoints that there are, names none, or there were some.

    Args:
        folder: of the run's checkpoints.
        candidates: by `pretrain.checkpoints.folder.to_resume`.
    """
    if resume == "never" and candidates:
        raise ConfigError(
            f"resume=never, but {folder} holds {len(candidates)} checkpoints, the newest {candidates[-1].name}. "
            "Use resume=auto to go on from it, or another run folder (run=...) to start afresh."
        )
    if not candidates and resume not in ("auto", "never"):
        raise ConfigError(f"resume={resume}: neither a checkpoint nor a run folder with checkpoints, auto or never")
    if not candidates and resume == "auto" and (told_by := traces(folder)):
        raise ConfigError(
            f"{folder}: there is no checkpoint, but there were some, as {told_by[0]} tells. Put them back (one that "
            "was set aside is whole: give its path as resume=...), or train afresh with resume=never or in another run "
            "folder (run=...). Nothing was changed."
        )


def traces(folder: Path) -> list[Path]:
    """What tells that a run's `checkpoints/` folder has held some: files there, and the run's own records."""
    run = folder.parent
    told = [folder / LATEST] if os.path.lexists(folder / LATEST) else []
    told += sorted(folder.glob(f"{ABANDONED}*"))
    with suppress(ConfigError, FileNotFoundError):
        if any(isinstance(record, Save) for record in scan(run / METRICS).records):
            told.append(run / METRICS)
    last = read_exit(run)
    if last is not None and last.code in (0, EXIT_PREEMPTED) and last.step:  # they end with a save
        told.append(run / EXIT_RECORD)
    return told + [path for path in sorted(run.glob(EVENTS)) if _tells_of_a_save(path)]


def _tells_of_a_save(events: Path) -> bool:
    before = b""
    with suppress(OSError), open_regular(events) as stream:
        while block := stream.read(BLOCK):
            if SAVE_TAG in before + block:
                return True
            before = block[-len(SAVE_TAG) :]
    return False


def set_aside(folder: Path) -> Path | None:
    """Moves what a run's records tell of an earlier training into `earlier-N/` of the run folder, for a fresh start
    there; returns that, None if there was nothing. Raises OSError.
    """
    run = folder.parent
    records = [path for path in (run / METRICS, run / EXIT_RECORD, *sorted(run.glob(EVENTS))) if os.path.lexists(path)]
    (folder / LATEST).unlink(missing_ok=True)  # it names what is not there
    if not records:
        return None
    earlier = free_name(run / "earlier")
    earlier.mkdir()
    for path in records:
        os.replace(path, earlier / path.name)
    return earlier
