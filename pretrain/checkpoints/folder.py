"""Checkpoints: whole or absent, verified when read, loadable into any layout; tensors in safetensors, the rest in JSON.

`checkpoints/step-00000100/` holds one safetensors file per rank (fragments with their offsets), `state.json` (step,
totals, resolved config, identity of data and tokenizer, layout, versions) and `manifest.json` (size and SHA-256 of the
others). pretrain/checkpoints/saver.py writes it under a draft name and renames it when whole; the file `latest` names
the newest.
Random numbers and the order of samples are functions of (seed, step, rank): there is no state of theirs to save.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import ConfigError
from common.files import sha256_of

log = logging.getLogger(__name__)

FORMAT = 1
DRAFT = "draft-"  # what has this prefix was never finished
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
LATEST = "latest"  # a file that names the newest checkpoint
ABANDONED = "abandoned-"  # begins the name of one that was set aside
MANIFEST, STATE = "manifest.json", "state.json"

Check = Literal["full", "size"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all that is neither a weight nor a moment."""

    step: int = 0  # updates asked for; the next one's number
    updates: int = 0  # updates taken: steps that were not skipped
    tokens: int = 0  # seen in training; the cursor of the data is step * sequences per step
    train_seconds: float = 0.0
    joules: Mapping[str, float] | None = None  # so far, of all phases, by the parts measured throughout; None: of none
    best_nats: float | None = None  # per held-out token: the least of all evaluations, that of `best_step`
    best_step: int | None = None
    stale: int = 0  # evaluations in a row since the best one

    @property
    def total_j(self) -> float | None:
        """Joules of all parts so far; None: not measured."""
        return total_j(self.joules)


def total_j(joules: object) -> float | None:
    """Joules of all parts in a checkpoint's `joules`; None if they are not told by part."""
    return float(sum(joules.values())) if isinstance(joules, Mapping) and joules else None


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` updates; names sort as steps do."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The updates before a checkpoint that was published, as its name tells."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a `checkpoints/` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name))


def to_resume(folder: Path, resume: str) -> list[Path]:
    """What a run whose checkpoints are in `folder` could go on from, oldest first, whole or not: those of the folder
    for `auto` and `never`, else the checkpoint that `resume` is the path of, or those of that run.
    """
    if resume in ("auto", "never"):
        return checkpoints(folder)
    path = Path(resume)
    return [path] if (path / MANIFEST).exists() else checkpoints(path / CHECKPOINTS)


def check_resume(folder: Path, resume: str, candidates: list[Path]) -> None:
    """Raises ConfigError if `resume` forbids the checkpoints that there are, or names none."""
    if resume == "never" and candidates:
        raise ConfigError(
            f"resume=never, but {folder} holds {len(candidates)} checkpoints, the newest {candidates[-1].name}. "
            "Use resume=auto to go on from it, or another run folder (run=...) to start afresh."
        )
    if not candidates and resume not in ("auto", "never"):
        raise ConfigError(f"resume={resume}: neither a checkpoint nor a run folder with checkpoints, auto or never")


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint. Renamed first, so that a deletion that is cut off leaves no half one under a good name."""
    doomed = checkpoint.with_name(f"{DRAFT}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def remove_drafts(folder: Path) -> None:
    """Removes what saves or deletions that were cut off have left."""
    for draft in folder.glob(f"{DRAFT}*"):
        log.warning("removing %s: a save that never finished", draft)
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink()


def damage(checkpoint: Path, check: Check = "full", share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Args:
        check: "full" reads every file and compares its hash with the manifest's, "size" its size alone.
        share: (k, n) looks at every n-th file from the k-th on.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{checkpoint}: format {manifest['format']}, this version reads {FORMAT}"
        listed = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST}: {error!r}"
    if STATE not in listed:
        return f"{checkpoint / MANIFEST}: it does not list {STATE}"
    strange = sorted(path.name for path in checkpoint.glob("*.safetensors") if path.name not in listed)
    if strange:  # the reader of tensors would take them too
        return f"{checkpoint / strange[0]}: the manifest does not list it"

    def problem(name: str) -> str | None:
        path, (size, sha256) = checkpoint / name, listed[name]
        try:
            bytes_there = path.stat().st_size
            if bytes_there != size:
                return f"{path}: {bytes_there} bytes instead of {size}"
            same = check == "size" or sha256_of(path) == sha256
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: {error}"
        return None if same else f"{path}: its SHA-256 is not the manifest's"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(problem, sorted(listed)[share[0] :: share[1]])), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint tells of its run: `Progress` as plain values, `identity`, `config`, `layout`, `versions`."""
    return json.loads((checkpoint / STATE).read_text())
