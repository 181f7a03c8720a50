"""How distances are computed: a contraction turns rows x (M, D) and w (V, D) into values c (M, V), sums up the scores
s = -n * power * log c of a chunk while it is at hand, and takes G = d loss / dc back to both sides.

Legend: M tokens of a chunk, V prototypes on this rank, D width, n the exponent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, Self

import torch
from torch import Tensor

from .kernels import choose, eager, eager_elementwise
from .kernels.eager import FourSums
from .kernels.eager_elementwise import Terms, blocks


@dataclass
class Statistics:
    """What a chunk says of each of its M tokens on this rank, (M,) each, and what its gradient needs again."""

    top: Tensor  # max of the scores
    total: Tensor  # sum of exp(score - top)
    moment: Tensor  # sum of score * exp(score - top)
    target: Tensor  # score of the target, 0 where another rank holds it
    kept: tuple[Tensor, ...] = ()  # the (M, V) tensors, as the contraction's own gradient reads them
    squares: eager.Squares | None = None  # of the quadratic family
    scored: eager.Scored | None = None  # in place of `kept`, where the product and its statistics were fused
    fused: ModuleType | None = None  # by these kernels

    @classmethod
    def of(
        cls,
        sums: FourSums,
        *kept: Tensor,
        squares: eager.Squares | None = None,
        scored: eager.Scored | None = None,
        fused: ModuleType | None = None,
    ) -> Self:
        """From the four sums of the kernels, in their order."""
        top, total, moment, target = sums
        return cls(top, total, moment, target, kept, squares, scored, fused)


class RowsGradient:
    """Accumulators of the prototypes' gradient over the chunks: (V, D) and (V,) column sums of G."""

    def __init__(self, rows: eager.Rows) -> None:
        self._products, self._empty = rows.gradient(), True
        self.columns = torch.zeros(len(rows.rows), dtype=self._products.dtype, device=self._products.device)

    @property
    def products(self) -> Tensor:
        """(V, D)."""
        if self._empty:
            self._products.zero_()
        self._empty = False
        return self._products

    def add_product(self, grads: Tensor, x: Tensor) -> None:
        """Adds G' x for G (M, V) and x (M, D)."""
        choose.kernels_for(x).add_rows_product(self._products, grads, x, first=self._empty)
        self._empty = False


@dataclass(frozen=True)
class Use:
    """What a chunk's statistics are for."""

    fused: ModuleType | None = None  # kernels that make them along with the product; None: in two steps
    gradient: bool = True  # it will be asked for
    exponent: bool = True  # and that of the exponent


@dataclass(frozen=True)
class Upstream:
    """What turns a chunk's scores into G: (M,) each but for the exponent."""

    local: Tensor  # the target's column here, or -1
    lse: Tensor  # log sum exp of the scores, over the whole group
    score: Tensor  # of the target, 0 where another rank holds it
    weight: Tensor  # of the token's loss
    exponent: Tensor


Later = Callable[[], None]
Gradients = tuple[Tensor, Tensor | None, Later]


class Contraction(Protocol):
    """One way from rows to values and back. `wide`: it reads operands in the accumulator's dtype, unrounded; the others
    are matrix products.
    """

    wide: bool
    kept: int  # (M, V) tensors that live from the statistics to the gradient
    temporaries: int  # and for a moment

    def statistics(
        self, x: eager.Tokens, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor, use: Use
    ) -> Statistics:
        """`floor` (M,): the least that the distance may be."""

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        """(M, V)."""

    def gradients(
        self, stats: Statistics, x: eager.Tokens, rows: eager.Rows, loss: Upstream, into: RowsGradient
    ) -> Gradients:
        """Of sum(weight * loss): that of x as (M, D) `total` and (M,) `sums` or None, for `finish` of the kernels;
        and what adds that of the prototypes to `into`, which can wait.
        """

    def sums(self, into: RowsGradient) -> Tensor | None:
        """(V,), for `finish` of the kernels with into.products as `total`."""
        return None

    def complete(self, into: RowsGradient, rows: eager.Rows) -> None:
        """Adds to `into.products` what could wait until every chunk was there."""
        return


def nothing() -> None:
    """What is left to add where all was added at once."""


class SquaredDistance(Contraction):
    """q = |x - w|^2 by one matrix product, the target's q by direct difference; d = factor * q ** power."""

    wide, kept, temporaries = False, 1, 1

    def __init__(self, power: float, factor: float = 1.0) -> None:
        self.power, self.factor = power, factor

    def statistics(
        self, x: eager.Tokens, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor, use: Use
    ) -> Statistics:
        ops, coefficient = choose.kernels_for(x.rows), self.power * exponent
        target = ops.to_targets(x.rows, rows.rows, local, product=False)
        squares = eager.Squares(x.squares, rows.squares, target, (floor / self.factor).pow(1 / self.power))
        if use.fused:
            sums, scored = use.fused.fused_statistics(
                "quadratic", x, rows, squares, coefficient, local, target, use.gradient, use.exponent
            )
            return Statistics.of(sums, squares=squares, scored=scored, fused=use.fused)
        kept = ops.products(x.rows, rows)
        return Statistics.of(ops.quadratic_statistics(kept, squares, coefficient, local), kept, squares=squares)

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        (kept,) = stats.kept
        return choose.kernels_for(kept).quadratic_scores(kept, stats.squares, self.power * exponent, local)

    def gradients(
        self, stats: Statistics, x: eager.Tokens, rows: eager.Rows, loss: Upstream, into: RowsGradient
    ) -> Gradients:
        """dx = 2 (x sum_j G_j - G w), dw = 2 (w sum_i G_i - G' x), the sums over G as rounded for the products:
        otherwise the cancellation near a match would cost 2^-9 |x|/d in bfloat16.
        """
        ops, coefficient = choose.kernels_for(x.rows), self.power * loss.exponent
        if stats.fused and stats.scored is not None:
            grads, over_rows, over_columns = stats.fused.fused_gradient(
                "quadratic", stats.scored, stats.squares, coefficient, loss.lse, loss.score, loss.weight, loss.local
            )
        else:
            (kept,) = stats.kept
            grads, over_rows, over_columns = ops.quadratic_gradient(
                kept, stats.squares, coefficient, loss.lse, loss.weight, loss.local, x.rows.dtype, loss.score
            )

        def add_rows() -> None:
            into.columns += over_columns
            into.add_product(grads, x.rows)

        return ops.hidden_product(grads, rows), over_rows, add_rows

    def sums(self, into: RowsGradient) -> Tensor:
        return into.columns


class DotProduct(Contraction):
    """x . w is the score itself (softmax cross-entropy, the baseline): no logarithm, no exponent, no floor."""

    wide, kept, temporaries = False, 1, 1

    def statistics(
        self, x: eager.Tokens, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor, use: Use
    ) -> Statistics:
        ops = choose.kernels_for(x.rows)
        if use.fused:
            target = ops.to_targets(x.rows, rows.rows, local, product=True)
            sums, scored = use.fused.fused_statistics(
                "dot", x, rows, None, exponent, local, target, use.gradient, False
            )
            return Statistics.of(sums, scored=scored, fused=use.fused)
        kept = ops.products(x.rows, rows)
        return Statistics.of(ops.dot_statistics(kept, local), kept)

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        return stats.kept[0]

    def gradients(
        self, stats: Statistics, x: eager.Tokens, rows: eager.Rows, loss: Upstream, into: RowsGradient
    ) -> Gradients:
        """dx = G w, dw = G' x."""
        ops = choose.kernels_for(x.rows)
        if stats.fused and stats.scored is not None:
            grads, _, _ = stats.fused.fused_gradient(
                "dot", stats.scored, None, loss.exponent, loss.lse, loss.score, loss.weight, loss.local
            )
        else:
            grads = ops.dot_gradient(stats.kept[0], loss.lse, loss.weight, loss.local, x.rows.dtype, loss.score)
        return ops.hidden_product(grads, rows), None, lambda: into.add_product(grads, x.rows)


class DirectDistance(Contraction):
    """c = d itself, of unrounded operands. What is kept starts with log c and the floor."""

    wide = True

    def log_statistics(
        self, values: Tensor, floor: Tensor, exponent: Tensor, local: Tensor, *more: Tensor
    ) -> Statistics:
        """Of c (M, V), which becomes log c; `more` is kept too."""
        sums = choose.kernels_for(values).log_statistics(values, floor, exponent, local)
        return Statistics.of(sums, values, floor, *more)

    def scores(self, stats: Statistics, local: Tensor, exponent: Tensor) -> Tensor:
        return stats.kept[0] * -exponent

    def log_gradient(self, stats: Statistics, loss: Upstream) -> Tensor:
        """G (M, V); the logarithms are consumed."""
        logs, floor, *_ = stats.kept
        ops = choose.kernels_for(logs)
        return ops.log_gradient(logs, floor, loss.exponent, loss.lse, loss.weight, loss.local, logs.dtype, loss.score)


class Elementwise(DirectDistance):
    """c = d, entry by entry (`eager.contract`): exact near a match, so nothing is rounded before it."""

    temporaries = 1

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.reads_values = terms.kind in ("linf", "lp")
        self.kept = 2 if self.reads_values else 1

    def statistics(
        self, x: eager.Tokens, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor, use: Use
    ) -> Statistics:
        values = choose.kernels_for(x.rows).contract(self.terms, x.rows, rows)
        logs = choose.kernels_for(x.rows).copy(values) if self.reads_values else values
        return self.log_statistics(logs, floor, exponent, local, values)

    def gradients(
        self, stats: Statistics, x: eager.Tokens, rows: eager.Rows, loss: Upstream, into: RowsGradient
    ) -> Gradients:
        *_, values = stats.kept
        grads = self.log_gradient(stats, loss)
        hidden = choose.kernels_for(x.rows).contract_gradient(self.terms, x.rows, rows, values, grads, into.products)
        return hidden, None, nothing


class Ratio(DirectDistance):
    """c = sum |x - w| / sum |x + w|, or with `separable` / (sum |x| + sum |w|): Bray-Curtis.

    The denominator is at least `relative` * sum |x| + `absolute`; there it is a constant.
    """

    kept, temporaries = 2, 2

    def __init__(self, separable: bool, relative: float, absolute: float) -> None:
        self.separable, self.relative, self.absolute = separable, relative, absolute
        self.above, self.below = Terms("l1"), Terms("l1", sign=-1.0)

    def statistics(
        self, x: eager.Tokens, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor, use: Use
    ) -> Statistics:
        ops = choose.kernels_for(x.rows)
        values = ops.contract(self.above, x.rows, rows)
        sizes = x.rows.abs().sum(1)
        least = self.relative * sizes + self.absolute
        if self.separable:
            below = torch.add(sizes[:, None], rows.sizes, out=torch.empty_like(values))
        else:
            below = ops.contract(self.below, x.rows, rows)
        torch.maximum(below, least[:, None], out=below)
        values.div_(below)
        return self.log_statistics(values, floor, exponent, local, below, least)

    def gradients(
        self, stats: Statistics, x: eager.Tokens, rows: eager.Rows, loss: Upstream, into: RowsGradient
    ) -> Gradients:
        """d(A / B) = dA / B - (A / B) dB / B."""
        ops = choose.kernels_for(x.rows)
        logs, _, below, least = stats.kept
        of_below = logs.exp().neg_()
        above = self.log_gradient(stats, loss).div_(below)
        of_below.mul_(above).masked_fill_(below <= least[:, None], 0)
        hidden = ops.contract_gradient(self.above, x.rows, rows, above, above, into.products)
        if self.separable:
            hidden.addcmul_(x.rows.sign(), of_below.sum(1)[:, None])
            into.columns += of_below.sum(0)
        else:
            hidden += ops.contract_gradient(self.below, x.rows, rows, of_below, of_below, into.products)
        return hidden, None, nothing

    def complete(self, into: RowsGradient, rows: eager.Rows) -> None:
        if self.separable:
            step = eager_elementwise.PAIR_VALUES // max(1, rows.rows.shape[1])
            parts = (t.split(step) for t in (into.products, rows.rows, into.columns))
            for total, part, columns in zip(*parts, strict=True):
                total.addcmul_(part.sign(), columns[:, None])


class Broadcast(DirectDistance):
    """c = d from a formula of broadcast rows alone, differentiated by autograd: for distances without kernels.

    A few prototypes are taken at a time, (M, v, D) values of them.
    """

    kept, temporaries = 1, 1

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.between = between

    def statistics(
        self, x: eager.Tokens, rows: eager.Rows, floor: Tensor, local: Tensor, exponent: Tensor, use: Use
    ) -> Statistics:
        values = x.rows.new_empty(x.rows.shape[0], rows.rows.shape[0])
        for block in blocks(x.rows, rows):
            values[:, block] = self.between(x.rows[:, None], rows.rows[block])
        return self.log_statistics(values, floor, exponent, local)

    def gradients(
        self, stats: Statistics, x: eager.Tokens, rows: eager.Rows, loss: Upstream, into: RowsGradient
    ) -> Gradients:
        grads = self.log_gradient(stats, loss)
        hidden = torch.zeros_like(x.rows)
        for block in blocks(x.rows, rows):
            with torch.enable_grad():
                sides = x.rows.detach().requires_grad_(), rows.rows[block].detach().requires_grad_()
                values = self.between(sides[0][:, None], sides[1])
            over_x, over_rows = torch.autograd.grad(values, sides, grads[:, block])
            hidden += over_x
            into.products[block] += over_rows
        return hidden, None, nothing
