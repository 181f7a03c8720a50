"""What a run came to, in figures: of its records and settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from data.shards import open_split
from pretrain.analysis.heldout import HeldOut, comparable, held_out_of
from pretrain.analysis.lengths import growth
from pretrain.analysis.scoring import unigram_bits_per_byte
from pretrain.config import RunConfig
from pretrain.energy.sustainability import (
    first_judged,
    footprint,
    gradient_stability,
    joules_of,
    learning_stability,
    measured_joules,
    measured_parts,
    missing_parts,
    to_target,
)
from pretrain.records import JOULES, PHASES, Eval, Lengths, Train, of_kind
from pretrain.run_folder import RunFolder


def summarise(run: Path, energy: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a run folder; None for what is not there. `energy` overrides the run's own settings of that
    section, as `key=value`. Raises ConfigError if it is no run folder.
    """
    folder = RunFolder.trained(run)
    cfg = folder.settings([f"energy.{setting}" for setting in energy])
    lines = folder.lines()
    records = lines.records
    train, held_out = of_kind(records, Train), of_kind(records, Eval)
    last = held_out[-1] if held_out else None
    seconds = sum(record.seconds for record in train)
    tokens = train[-1].tokens if train else 0
    joules = {field: {kind: joules_of(records, part, kind) for kind in PHASES} for part, field in JOULES.items()}
    train_j = measured_joules(records, "train")
    settings = cfg.energy
    scored_on = held_out_of(folder, cfg, last)
    of_this_text = [record.loss for record in held_out if last and record.text_sha256 == last.text_sha256]
    first, at = first_judged(cfg.train.steps, cfg.optim.warmup_steps), _recorded_from(train)
    return {
        "head": cfg.head.distance,
        "step": max((record.step for record in records), default=0),
        "steps": cfg.train.steps,
        "tokens": tokens,
        "loss": train[-1].loss_mean if train else None,
        "perplexity": last.perplexity if last else None,
        "bits_per_byte": last.bits_per_byte if last else None,
        "held_out": vars(scored_on),
        "unigram_bits_per_byte": _unigram(cfg, scored_on.data_fingerprint),
        "train_seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else None,
        "gflops_per_token": cfg.model.flops_per_token() / 1e9,
        "mfu": _mfu(train),
        **joules,
        "gpu_j_per_token": _per(joules["gpu_j"]["train"], tokens),
        "measured": measured_parts(records),
        "not_measured": missing_parts(records),
        "lines_left_out": len(lines.wrong),
        "steps_without_record": lines.lost(),
        "j_per_token": _per(train_j, tokens),
        "j_per_step": _per(train_j, train[-1].step if train else 0),
        "footprint": footprint(measured_joules(records), settings.pue, settings.grid, settings.price_per_kwh),
        "target_loss": settings.target_loss,
        "to_target": None if settings.target_loss is None else to_target(records, settings.target_loss),
        "skipped": sum(record.skipped for record in train),
        "gradient_stability": gradient_stability(_of_steps([record.grad_norms for record in train]), first, at),
        "learning_stability": learning_stability(
            _of_steps([record.losses for record in train]), of_this_text, first, at
        ),
        "lengths": growth(of_kind(records, Lengths)),
    }


def _per(joules: float | None, count: int) -> float | None:
    return joules / count if joules is not None and count else None


def _mfu(train: Sequence[Train]) -> float | None:
    """Mean over time; None if it is not known for every record."""
    shares = [record.mfu * record.seconds for record in train if record.mfu is not None]
    return sum(shares) / sum(record.seconds for record in train) if train and len(shares) == len(train) else None


def _of_steps(values: Sequence[Sequence[float | None] | None]) -> list[float | None]:
    """The values of every step, from those of each record; nothing if a record has only its last one."""
    return [value for steps in values if steps is not None for value in steps] if None not in values else []


def _recorded_from(train: Sequence[Train]) -> int:
    """The update that the first value of `_of_steps` is of."""
    return max(0, train[0].step - len(train[0].losses or ())) if train else 0


def _unigram(cfg: RunConfig, fingerprint: str | None) -> float | None:
    """Of the run's data, if they are where they were (and what they were, where that is known)."""
    try:
        train, val = (open_split(cfg.data.path, name) for name in ("train", "val"))
    except ConfigError:
        return None  # the data are elsewhere; the run's own figures stand
    return unigram_bits_per_byte(train, val) if fingerprint in (None, val.fingerprint) else None


def groups_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The runs in groups whose held-out figures compare."""
    return comparable({name: HeldOut(**summary["held_out"]) for name, summary in found.items()})
