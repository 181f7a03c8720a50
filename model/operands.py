"""Both sides of a call as a contraction reads them, in common units (model/distance_base.py says which), and the way
back for their gradients.

Legend: M gathered tokens of a chunk, R real prototypes of this rank, N rows of either side, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .contractions import RowsGradient
from .distance_base import LARGEST_ROW, Distance
from .kernels import choose, eager
from .vocab_parallel import VocabShard, max_across, sum_across

SPARE = 13  # powers of two between the largest square and the largest number: sums of 2^26 of them


class Operands:
    """Both sides of one call after scaling, noise and the distance's transform, and the way back for gradients.

    `rows`: this rank's prototypes (R, D), made once; `tokens` makes those of a chunk. `dtype`: that of the operands;
    `wide`: that of scores and sums.
    """

    def __init__(self, hidden: Tensor, prototypes: Tensor, distance: Distance, shard: VocabShard) -> None:
        self.distance, self.shard = distance, shard
        self.wide = eager.accumulator(hidden.dtype)
        self.dtype = self.wide if distance.contraction.wide else hidden.dtype
        self.source = prototypes.detach()[: shard.real]
        kind = type(distance)
        self.as_they_are = kind.perturb is Distance.perturb and (kind.transform is Distance.transform or distance.unit)
        self.power = _power(self.source, shard) if distance.scaled else None
        self.scale = None if self.power is None else torch.exp2(self.power.to(self.wide))
        self.tensors = {name: torch.zeros_like(t, dtype=self.wide) for name, t in distance.tensors.items()}
        self.kernels = choose.kernels_for(self.source.new_empty(0, dtype=self.dtype))
        rows = self.kernels.empty(self.source.shape, self.dtype, hidden.device)
        squares = [self._fill(rows[block], self.source[block], index, self.scale) for block, index in self._blocks()]
        known = squares[0] if len(squares) == 1 else None
        self.rows = self.kernels.Rows(rows, 1 if shard.group is None else 2, known)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of this rank's prototypes, and which ones of all they are."""
        step = self.kernels.rows_at_a_time(self.source.shape[1], self.as_they_are)
        for first in range(0, self.source.shape[0], step):
            last = min(first + step, self.source.shape[0])
            start = self.shard.start
            yield slice(first, last), torch.arange(start + first, start + last, device=self.source.device)

    def positions(self, hidden: Tensor, part: slice) -> Tensor:
        """(M,) index of a gathered chunk's tokens for `Distance.perturb`: -1 - token of the group."""
        ranks = torch.arange(self.shard.ranks, device=hidden.device) * hidden.shape[0]
        return -1 - (ranks[:, None] + torch.arange(part.start, part.stop, device=hidden.device)).reshape(-1)

    def token_scales(self, hidden: Tensor) -> Tensor | None:
        """(M, 1) power of two of each token: that of the prototypes, less where its squares would overflow. A token so
        long is as far from every prototype, to the last digit, as one farther out.
        """
        if self.power is None:
            return None
        power = torch.minimum(self.power, _largest_power(self.wide) // 2 - SPARE - _exponents(_sizes(hidden)))
        return torch.exp2(power.to(self.wide))[:, None]

    def _scaled(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        rows = rows.to(self.wide)
        return rows if scale is None else rows * scale

    def _fill(self, out: Tensor, rows: Tensor, index: Tensor, scale: Tensor | None) -> Tensor | None:
        """`out` (N, D) becomes rows (N, D), transformed, in the dtype that the contraction reads; their squared norms
        where they come along.
        """
        if self.as_they_are:
            return self.kernels.prepare(rows, scale, self.distance.unit, out)
        out.copy_(self.distance.transform(self.distance.perturb(self._scaled(rows, scale), index)))
        return None

    def back(
        self,
        total: Tensor,
        rows: Tensor,
        sums: Tensor | None,
        source: Tensor,
        index: Tensor,
        scale: Tensor | None,
        out: Tensor,
        unscale: bool = True,
    ) -> None:
        """The way back: from the gradient of `rows` (N, D), as `tokens` made them of `source`, which is `total`, or
        2 (sums * rows - total) where `sums` (N,) are given, `out` (N, D), which may be `total`, becomes that of the
        source; those of the distance's tensors are added up on the way. Consumes `total`. `unscale` is False where the
        scale waits until the group's parts are added up.
        """
        late = scale if unscale else None
        if self.as_they_are:
            self.kernels.finish(total, rows, sums, source, late, self.distance.unit, out)
            return
        self.kernels.finish(total, rows, sums, rows, None, False, total)
        back, others = self.distance.pull_back(self._scaled(source, scale), index, total)
        for tensor, more in zip(self.tensors.values(), others, strict=True):
            tensor += more
        out.copy_(back if late is None else eager.unscaled(back, late, out.dtype))

    def tokens(self, hidden: Tensor, index: Tensor, scale: Tensor | None) -> eager.Tokens:
        """Hidden states (M, D) as the contraction reads them."""
        out = torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device)
        return self.kernels.Tokens(out, self._fill(out, hidden, index, scale))

    def rows_back(self, into: RowsGradient, prototypes: Tensor) -> Tensor:
        """The gradient of all stored prototypes (zero for padding), in their dtype."""
        contraction = self.distance.contraction
        contraction.complete(into, self.rows)
        grad, sums = into.products, contraction.sums(into)
        for block, index in self._blocks():
            part, own = grad[block], None if sums is None else sums[block]
            self.back(part, self.rows.rows[block], own, self.source[block], index, self.scale, part)
        if prototypes.dtype != grad.dtype:  # the gradient of the tiniest of rows passes its largest number
            most = torch.finfo(prototypes.dtype).max
            grad = grad.clamp_(-most, most)
        padding = prototypes.shape[0] - grad.shape[0]
        return (torch.nn.functional.pad(grad, (0, 0, 0, padding)) if padding else grad).to(prototypes.dtype)

    def tensors_back(self) -> list[Tensor]:
        """The gradients of the distance's tensors, complete within the group; after all tokens and rows."""
        return [
            sum_across(total, self.shard.group).to(tensor.dtype)
            for total, tensor in zip(self.tensors.values(), self.distance.tensors.values(), strict=True)
        ]


def _power(rows: Tensor, shard: VocabShard) -> Tensor:
    """0-d int64: the power of two that brings the group's prototypes to entries of about 1, by the mean over rows of
    the exponent of the largest entry; less where one prototype would be too long then.

    HarMax does not change, nor does a digit of it: squares cannot overflow, and log q stays small. Tokens have no say,
    so that none can reach another.
    """
    sizes = _sizes(rows)
    counts = (sizes > 0) & sizes.isfinite()
    exponents, none = _exponents(sizes), -(2**31)
    total = torch.stack((torch.where(counts, exponents, 0).sum(), counts.sum()))
    highest = torch.cat((exponents.new_full((1,), none), torch.where(counts, exponents, none))).max()
    total, highest = sum_across(total, shard.group), max_across(highest, shard.group)
    typical = torch.round(total[0].double() / total[1].clamp_min(1)).long()
    least = 1 - _largest_power(sizes.dtype)  # beyond, the scale itself would be no normal number
    return torch.minimum(-typical, LARGEST_ROW - highest).clamp(least, -least)


def _sizes(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) largest entries, in the accumulator's dtype."""
    return torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1).to(eager.accumulator(rows.dtype))


def _exponents(sizes: Tensor) -> Tensor:
    """The least powers of two above, int64; 0 for 0."""
    return sizes.frexp().exponent.long()


def _largest_power(dtype: torch.dtype) -> int:
    """Of two, that `dtype` holds."""
    return math.frexp(torch.finfo(dtype).max)[1] - 1
