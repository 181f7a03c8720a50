"""How distances are computed: a contraction turns rows x (M, D) and w (V, D) into values c (M, V), sums up the scores
s = -n * power * log c of a chunk while it is at hand, and takes G = d loss / dc back to both sides.

Legend: M tokens of a chunk, V prototypes on this rank, D width, n the exponent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from model.kernels import eager
from model.kernels.choose import kernels_for
from model.kernels.eager import Terms

FourSums = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Statistics:
    """What a chunk says of each of its M tokens on this rank, (M,) each, and what its gradient needs again."""

    top: Tensor  # max of the scores
    total: Tensor  # sum of exp(score - top)
    moment: Tensor  # sum of score * exp(score - top)
    target: Tensor  # score of the target, 0 where another rank holds it
    kept: tuple[Tensor, ...] = ()  # the (M, V) tensors, as the contraction's own gradient reads them
    squares: eager.Squares | None = None  # of the quadratic family

    @classmethod
    def of(cls, sums: FourSums, *kept: Tensor, squares: eager.Squares | None = None) -> Self:
        top, total, moment, target = sums
        return cls(top, total, moment, target, kept, squares)


class RowsGradient:
    """Accumulators of the prototypes' gradient over the chunks: (V, D) and (V,) column sums of G."""

    def __init__(self, rows: Tensor) -> None:
        wide = eager.accumulator(rows.dtype)
        self.products = kernels_for(rows).empty(rows.shape, wide, rows.device).zero_()
        self.columns = self.products.new_zeros(rows.shape[0])


@dataclass(frozen=True)
class Upstream:
    """What turns a chunk's scores into G: (M,) each but for the exponent."""

    local: Tensor  # the target's column here, or -1
    lse: Tensor  # log sum exp of the scores, over the whole group
    weight: Tensor  # of the token's loss
    exponent: Tensor


Later = Callable[[], None]


class Contraction(Protocol):
    """One way from rows to values and back. `wide`: it reads operands in the accumulator's dtype, unrounded."""

    wide: bool
    kept: int  # (M, V) tensors that live from the statistics to the gradient
    temporaries: int  # and for a moment

    def statistics(self, x: Tensor, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor) -> Statistics:
        """`floor` (M,): the least that the distance may be."""

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        """(M, V)."""

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, given: Upstream, into: RowsGradient
    ) -> tuple[Tensor, Later]:
        """Of sum(weight * loss): that of x (M, D), and what adds that of the prototypes to `into`, which can wait."""

    def finish(self, into: RowsGradient, rows: eager.Rows, block: slice) -> None:
        """Turns `into.products[block]`, once every chunk was added, into the gradient of those prototypes; where
        they are that already, it does nothing.
        """
        return


def nothing() -> None:
    pass


class SquaredDistance(Contraction):
    """q = |x - w|^2 by one matrix product, the target's q by direct difference; d = factor * q ** power."""

    wide, kept, temporaries = False, 1, 1

    def __init__(self, power: float, factor: float = 1.0) -> None:
        self.power, self.factor = power, factor

    def statistics(self, x: Tensor, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor) -> Statistics:
        ops = kernels_for(x)
        target = eager.square_norms(x.to(floor.dtype) - rows.rows[local.clamp_min(0)].to(floor.dtype))
        squares = eager.Squares(eager.square_norms(x), rows.squares, target, (floor / self.factor).pow(1 / self.power))
        kept = ops.products(x, rows)
        sums = ops.quadratic_statistics(kept, squares, self.power * exponent, local)
        return Statistics.of(sums, kept, squares=squares)

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        (kept,) = stats.kept
        return kernels_for(kept).quadratic_scores(kept, stats.squares, self.power * exponent, local)

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, given: Upstream, into: RowsGradient
    ) -> tuple[Tensor, Later]:
        """dx = 2 (x sum_j G_j - G w), dw = 2 (w sum_i G_i - G' x), the sums over G as rounded for the products:
        otherwise the cancellation near a match would cost 2^-9 |x|/d in bfloat16.
        """
        ops = kernels_for(x)
        (kept,) = stats.kept
        coefficient = self.power * given.exponent
        grads, over_rows, over_columns = ops.quadratic_gradient(
            kept, stats.squares, coefficient, given.lse, given.weight, given.local, x.dtype
        )
        hidden = ops.hidden_product(grads, rows).neg_().addcmul_(x, over_rows[:, None]).mul_(2)

        def add_rows() -> None:
            into.columns += over_columns
            ops.add_rows_product(into.products, grads, x)

        return hidden, add_rows

    def finish(self, into: RowsGradient, rows: eager.Rows, block: slice) -> None:
        kernels_for(rows.rows).finish_rows(into.products[block], rows.rows[block], into.columns[block])


class DotProduct(Contraction):
    """x . w is the score itself (softmax cross-entropy, the baseline): no logarithm, no exponent, no floor."""

    wide, kept, temporaries = False, 1, 1

    def statistics(self, x: Tensor, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor) -> Statistics:
        ops = kernels_for(x)
        kept = ops.products(x, rows)
        return Statistics.of(ops.dot_statistics(kept, local), kept)

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        return stats.kept[0]

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, given: Upstream, into: RowsGradient
    ) -> tuple[Tensor, Later]:
        """dx = G w, dw = G' x."""
        ops = kernels_for(x)
        grads = ops.dot_gradient(stats.kept[0], given.lse, given.weight, given.local, x.dtype)
        return ops.hidden_product(grads, rows), lambda: ops.add_rows_product(into.products, grads, x)


class DirectDistance(Contraction):
    """c = d itself, of unrounded operands. What is kept starts with log c and the floor."""

    wide = True

    def log_statistics(
        self, values: Tensor, floor: Tensor, exponent: Tensor, local: Tensor, *more: Tensor
    ) -> Statistics:
        """Of c (M, V), which becomes log c; `more` is kept too."""
        sums = kernels_for(values).log_statistics(values, floor, exponent, local)
        return Statistics.of(sums, values, floor, *more)

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        return stats.kept[0] * -exponent

    def log_gradient(self, stats: Statistics, given: Upstream) -> Tensor:
        """G (M, V); the logarithms are consumed."""
        logs, floor, *_ = stats.kept
        ops = kernels_for(logs)
        return ops.log_gradient(logs, floor, given.exponent, given.lse, given.weight, given.local, logs.dtype)


class Elementwise(DirectDistance):
    """c = d, entry by entry (`eager.contract`): exact near a match, so nothing is rounded before it."""

    temporaries = 1

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.reads_values = terms.kind in ("linf", "lp")
        self.kept = 2 if self.reads_values else 1

    def statistics(self, x: Tensor, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor) -> Statistics:
        values = kernels_for(x).contract(self.terms, x, rows)
        logs = _copy(values) if self.reads_values else values
        return self.log_statistics(logs, floor, exponent, local, values)

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, given: Upstream, into: RowsGradient
    ) -> tuple[Tensor, Later]:
        *_, values = stats.kept
        grads = self.log_gradient(stats, given)
        return kernels_for(x).contract_gradient(self.terms, x, rows, values, grads, into.products), nothing


class Ratio(DirectDistance):
    """c = sum |x - w| / sum |x + w|, or with `separable` / (sum |x| + sum |w|): Bray-Curtis.

    The denominator is at least `relative` * sum |x| + `absolute`; there it is a constant.
    """

    kept, temporaries = 2, 2

    def __init__(self, separable: bool, relative: float, absolute: float) -> None:
        self.separable, self.relative, self.absolute = separable, relative, absolute
        self.above, self.below = Terms("l1"), Terms("l1", sign=-1.0)

    def statistics(self, x: Tensor, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor) -> Statistics:
        ops = kernels_for(x)
        values = ops.contract(self.above, x, rows)
        sizes = x.abs().sum(1)
        least = self.relative * sizes + self.absolute
        if self.separable:
            below = torch.add(sizes[:, None], rows.sizes, out=torch.empty_like(values))
        else:
            below = ops.contract(self.below, x, rows)
        torch.maximum(below, least[:, None], out=below)
        values.div_(below)
        return self.log_statistics(values, floor, exponent, local, below, least)

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, given: Upstream, into: RowsGradient
    ) -> tuple[Tensor, Later]:
        """d(A / B) = dA / B - (A / B) dB / B."""
        ops = kernels_for(x)
        logs, _, below, least = stats.kept
        of_below = logs.exp().neg_()
        above = self.log_gradient(stats, given).div_(below)
        of_below.mul_(above).masked_fill_(below <= least[:, None], 0)
        hidden = ops.contract_gradient(self.above, x, rows, above, above, into.products)
        if self.separable:
            hidden.addcmul_(x.sign(), of_below.sum(1)[:, None])
            into.columns += of_below.sum(0)
        else:
            hidden += ops.contract_gradient(self.below, x, rows, of_below, of_below, into.products)
        return hidden, nothing

    def finish(self, into: RowsGradient, rows: eager.Rows, block: slice) -> None:
        if self.separable:
            into.products[block].addcmul_(rows.rows[block].sign(), into.columns[block, None])


class Broadcast(DirectDistance):
    """c = d from a formula of broadcast rows alone, differentiated by autograd: for distances without kernels.

    A few prototypes are taken at a time, (M, v, D) values of them.
    """

    kept, temporaries = 1, 1

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.between = between

    def statistics(self, x: Tensor, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor) -> Statistics:
        values = x.new_empty(x.shape[0], rows.rows.shape[0])
        for block in eager.blocks(x, rows):
            values[:, block] = self.between(x[:, None], rows.rows[block])
        return self.log_statistics(values, floor, exponent, local)

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, given: Upstream, into: RowsGradient
    ) -> tuple[Tensor, Later]:
        grads = self.log_gradient(stats, given)
        hidden = torch.zeros_like(x)
        for block in eager.blocks(x, rows):
            with torch.enable_grad():
                sides = x.detach().requires_grad_(), rows.rows[block].detach().requires_grad_()
                values = self.between(sides[0][:, None], sides[1])
            over_x, over_rows = torch.autograd.grad(values, sides, grads[:, block])
            hidden += over_x
            into.products[block] += over_rows
        return hidden, nothing


def _copy(values: Tensor) -> Tensor:
    """A copy that lies in memory the same way round."""
    return values.t().clone(memory_format=torch.contiguous_format).t() if values.stride(0) == 1 else values.clone()
