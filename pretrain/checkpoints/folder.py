"""Checkpoints: whole or absent, verified when read, loadable into any layout; tensors in safetensors, the rest in JSON.

`checkpoints/step-00000100/` holds one safetensors file per rank (fragments with their offsets), `state.json` (step,
totals, resolved config, identity of data and tokenizer, layout, versions) and `manifest.json` (size and SHA-256 of the
others). pretrain/checkpoints/saver.py writes it under a draft name and renames it when whole; the file `latest` names
the newest.
Random numbers and the order of samples are functions of (seed, step, rank): there is no state of theirs to save.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import discard
from pretrain.checkpoints.reading import unread

log = logging.getLogger(__name__)

FORMAT = 1
DRAFT = "draft-"  # what has this prefix was never finished
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
LATEST = "latest"  # a file that names the newest checkpoint
ABANDONED = "abandoned-"  # begins the name of one that was set aside
MANIFEST, STATE = "manifest.json", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, beside the weights, `fp32`
TOKENIZER = "the tokenizer's hash"  # its name in a checkpoint's identity
DATA = "the data's fingerprint"  # and theirs


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
    """What stands under a published checkpoint's name in a `checkpoints/` folder, oldest first: a folder, or a link to
    one; or what `damage` finds to be none, as a link that leads nowhere.
    """
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name))


def to_resume(folder: Path, resume: str) -> list[Path]:
    """What a run whose checkpoints are in `folder` could go on from, oldest first, whole or not: those of the folder
    for `auto` and `never`, else the checkpoint that `resume` is the path of, or those of that run.
    """
    if resume in ("auto", "never"):
        return checkpoints(folder)
    path = Path(resume)
    return [path] if os.path.exists(path / MANIFEST) else checkpoints(path / CHECKPOINTS)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, or the link that leads to one, unless it is being read: then a later call will.

    Renamed first, so that a deletion that is cut off leaves no half one under a good name.
    """
    doomed = checkpoint.with_name(f"{DRAFT}old-{checkpoint.name}")
    discard(doomed)
    with unread(checkpoint) as free:
        if free:
            os.replace(checkpoint, doomed)
            discard(doomed)


def remove_drafts(folder: Path) -> None:
    """Removes what saves or deletions that were cut off have left; what cannot be removed is told and left."""
    for draft in folder.glob(f"{DRAFT}*"):
        log.warning("removing %s: a save that never finished", draft)
        try:
            discard(draft)
        except OSError as error:
            log.warning("%s stays: %s", draft, error)
