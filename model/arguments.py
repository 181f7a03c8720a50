"""What a call of the loss is given, checked: shapes, dtypes and numbers at once; the range of targets on a GPU, which
nobody waits for, by a NaN in the loss and an error in a later call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distance_base import Distance
from .distances import resolve
from .kernels import eager
from .vocab_parallel import VocabShard, max_across


def prepared(
    distance: str | Distance,
    params: Mapping[str, Any],
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    exponent: float | Tensor,
    reduction: str,
    ignore_index: int,
    shard: VocabShard,
) -> tuple[Distance, Tensor]:
    """The distance as this call uses it, and the exponent, 0-d in the accumulator's dtype, if all fits together.

    Raises ValueError: see `model.harmonic.harmonic_loss`.
    """
    entry, wide = resolve(distance, params), eager.accumulator(hidden.dtype)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected mean, sum or none")
    if hidden.dim() != 2 or prototypes.dim() != 2 or hidden.shape[1] != prototypes.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)}, prototypes {tuple(prototypes.shape)}"
        raise ValueError(f"expected hidden (N, D) and prototypes (V, D), got {shapes}")
    if hidden.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"hidden is {hidden.dtype}: expected bfloat16, float32 or float64")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected targets ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if not 0 <= shard.real <= prototypes.shape[0]:
        raise ValueError(f"the shard has {shard.real} real rows, but {prototypes.shape[0]} prototypes were given")
    entry.check(hidden.shape[1], wide)
    if targets.device.type == "cpu" and targets.numel():
        check_range(range_of(targets, ignore_index), shard.size, ignore_index)
    TARGETS.look()
    if isinstance(exponent, Tensor):
        exponent = exponent.to(hidden.device, wide).reshape(())
    elif exponent > 0:
        exponent = torch.full((), float(exponent), dtype=wide, device=hidden.device)
    else:
        raise ValueError(f"exponent={exponent}: expected a positive number")
    return entry.prepared(hidden.dtype, lambda: _drawn(hidden.device, shard)), exponent


def _drawn(device: torch.device, shard: VocabShard) -> Tensor:
    """A random 0-d int64 from torch's CPU generator; in a group, the greatest."""
    drawn = int(torch.randint(2**31, (), device="cpu"))
    return max_across(torch.full((), drawn, device=device), shard.group)  # a copy would wait for a GPU


def validity(targets: Tensor, ignore_index: int, shard: VocabShard, wide: torch.dtype) -> Tensor | None:
    """0-d 1, or NaN if a target of the group is out of range, which is raised as an error once a GPU has told; None
    on a CPU, where `prepared` did so.
    """
    if targets.device.type == "cpu" or not targets.numel():
        return None
    bounds = range_of(targets, ignore_index)
    if shard.group is not None:  # every rank is to know: one that raised alone would leave the others waiting
        first, last = bounds
        first, last = max_across(torch.stack((-first, last)), shard.group)
        bounds = torch.stack((-first, last))
    if targets.is_cuda:
        TARGETS.send(bounds, shard.size, ignore_index)
    return torch.where((bounds[0] < 0) | (bounds[1] >= shard.size), torch.nan, 1.0).to(wide)


def range_of(targets: Tensor, ignore_index: int) -> Tensor:
    """(n,) -> (2,) the first and the last of those that are not ignored; (0, 0) if all are."""
    counted = targets != ignore_index
    return torch.stack(torch.aminmax(torch.where(counted, targets, targets.new_zeros(()))))


def check_range(bounds: Tensor, size: int, ignore_index: int) -> None:
    """Raises ValueError unless `bounds` (2,), the first and the last target, are rows of `size` prototypes."""
    first, last = bounds.tolist()
    if first < 0 or last >= size:
        raise ValueError(f"targets reach from {first} to {last}: expected 0 to {size - 1}, or {ignore_index}")


class TargetChecks:
    """Ranges of targets on their way from GPUs to the host: nobody waits for them, a later call looks."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.cuda.Event, Tensor, int, int]] = deque()

    def send(self, bounds: Tensor, size: int, ignore_index: int) -> None:
        """Of one call, (2,) on a GPU; not of one that a graph records."""
        with torch.cuda.device_of(bounds):
            if torch.cuda.is_current_stream_capturing():
                return
            host = torch.empty(2, dtype=torch.int64, pin_memory=True)
            host.copy_(bounds, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((arrived, host, size, ignore_index))

    def look(self) -> None:
        """Raises ValueError if the targets of an earlier call are known to have been out of range."""
        if self._waiting and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # which asking an event would end
        while self._waiting and self._waiting[0][0].query():
            _, bounds, size, ignore_index = self._waiting.popleft()
            try:
                check_range(bounds, size, ignore_index)
            except ValueError as error:
                raise ValueError(f"{error} (in an earlier call on this GPU, whose loss was NaN)") from None


TARGETS = TargetChecks()
