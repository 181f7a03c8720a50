"""How long prototypes and final hidden states are, and whether they go on growing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.loader import EvaluationWindows
from model.head import HarmonicHead
from model.vocab_parallel import gather_rows
from pretrain.analysis.scoring import maskings
from pretrain.records import Lengths

QUANTILES = {"median": 0.5, "p95": 0.95}
TOKENS = 2048  # of held-out text, before which hidden states are measured
LEAST = 3  # records that tell a slope


@torch.no_grad()
def of_prototypes(head: HarmonicHead) -> dict[str, float | None]:
    """Quantiles of the lengths of the whole vocabulary group's prototypes as they are stored, by the names of
    `Lengths`; None if one is not finite. Every rank of the group calls it, and gathers V numbers.
    """
    own = torch.linalg.vector_norm(head.prototypes.detach(), dim=1)
    return _recorded("prototypes", gather_rows(own, head.shard.group)[: head.shard.size])


@torch.no_grad()
def of_states(
    hidden: Callable[[Tensor], Tensor], windows: EvaluationWindows, at_once: int, mask: int | None, device: torch.device
) -> dict[str, float | None]:
    """Quantiles of the lengths of the final hidden states before the first TOKENS tokens of a split, by the names of
    `Lengths`: the same windows on every rank, whatever the layout. Collective where `hidden` is.

    Args:
        hidden: tokens (B, T) -> final hidden states (B, T, D).
        at_once: B, windows of a pass.
        mask: the id of [MASK] of a masked model, whose states are those behind it in its first masking.
    """
    lengths: list[Tensor] = []
    for first in range(0, min(windows.count, -(-TOKENS // windows.stride)), at_once):
        inputs, at, targets = (torch.from_numpy(part).to(device) for part in windows.batch(first, at_once))
        seen = targets >= 0
        if mask is not None:
            inputs, behind = next(maskings(inputs, targets, mask))
            seen = seen & behind
        states = hidden(inputs)
        lengths.append(torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32).gather(1, at)[seen])
    return _recorded("hidden", torch.cat(lengths)[:TOKENS])


def quantiles(lengths: Tensor) -> dict[str, float]:
    """(N,) lengths -> their quantiles, by the names of QUANTILES."""
    found = torch.quantile(lengths.double(), lengths.new_tensor(list(QUANTILES.values()), dtype=torch.float64))
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _recorded(of: str, lengths: Tensor) -> dict[str, float | None]:
    named = quantiles(lengths).items()
    return {f"{of}_{name}": value if math.isfinite(value) else None for name, value in named}


def growth(records: Sequence[Lengths]) -> dict[str, Any]:
    """What a run's records of lengths tell, for `prototypes` and `hidden` each.

    Returns:
        median, p95: by step, as text; without records that have none.
        slope: of ln(median) against ln(step) over the records of the last half of the steps, by least squares: 0 where
            the length has stopped, 0.5 where it grows as a random walk does, 1 as a straight line; None with fewer than
            LEAST records there.
    """
    latest = {record.step: record for record in records}  # what was recorded again counts once
    told = {}
    for of in ("prototypes", "hidden"):
        found = {
            name: {step: value for step in sorted(latest) if (value := getattr(latest[step], f"{of}_{name}"))}
            for name in QUANTILES
        }
        by_step = {name: {str(step): value for step, value in values.items()} for name, values in found.items()}
        told[of] = {**by_step, "slope": _slope(found["median"])}
    return told


def _slope(lengths: dict[int, float]) -> float | None:
    last = max(lengths, default=0)
    late = [(math.log(step), math.log(length)) for step, length in lengths.items() if step > 0 and last <= 2 * step]
    if len(late) < LEAST:
        return None
    x, y = ([point[axis] for point in late] for axis in (0, 1))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
