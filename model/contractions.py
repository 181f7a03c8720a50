"""How distances are computed: a contraction turns rows x (M, D) and w (V, D) into values c (M, V), sums up the scores
of a chunk while it is at hand (s = -n * power * log c, or linear: n times a product, -n q), and takes G = d loss / dc
back to both sides.

Legend: M tokens of a chunk, V prototypes on this rank, D width, n the exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from .kernels import choose, eager_elementwise
from .kernels.eager import Given, Rows, Scored, Squares, Sums, Tokens, Upstream
from .kernels.eager_elementwise import Terms, blocks


@dataclass
class Statistics:
    """What a chunk says of each of its M tokens on this rank, (M,) each, and what its gradient needs again."""

    given: Given  # what made the scores of the values
    top: Tensor  # max of the scores
    total: Tensor  # sum of exp(score - top)
    moment: Tensor  # sum of u * exp(score - top), u = n ds/dn: the score, but for a cap
    target: Tensor  # score of the target, 0 where another rank holds it
    more: tuple[Tensor, ...] = ()  # where `given.more`: sum of the scores, u of the target, sum of u
    kept: tuple[Tensor, ...] = ()  # the (M, V) tensors, as the contraction's own gradient reads them
    scored: Scored | None = None  # in place of `kept`, where the product and its statistics were fused
    fused: ModuleType | None = None  # by these kernels


def statistics_of(sums: Sums, given: Given, *kept: Tensor) -> Statistics:
    """From what a kernel returns."""
    top, total, moment, target, *more = sums
    return Statistics(given, top, total, moment, target, tuple(more), kept)


class RowsGradient:
    """Accumulators of the prototypes' gradient over the chunks: (V, D) and (V,) column sums of G."""

    def __init__(self, rows: Rows) -> None:
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


Later = Callable[[], None]
Gradients = tuple[Tensor, Tensor | None, Later]


class Contraction(Protocol):
    """One way from rows to values and back. `wide`: it reads operands in the accumulator's dtype, unrounded; the others
    are matrix products.
    """

    wide: bool
    factor: float = 1.0  # of a distance, which scores leave out without a cap: no probability changes
    kept: int  # (M, V) tensors that live from the statistics to the gradient
    temporaries: int  # and for a moment

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """Of tokens (M, D) and prototypes (V, D). `given`: targets, the exponent as its coefficient, and the least that
        the distance may be as its floor.
        """

    def scores(self, stats: Statistics) -> Tensor:
        """(M, V), of what was not fused."""
        kept = stats.kept[0]
        return choose.kernels_for(kept).scores(kept, stats.given)

    def gradients(self, stats: Statistics, x: Tokens, rows: Rows, loss: Upstream, into: RowsGradient) -> Gradients:
        """Of sum(weight * loss): that of x as (M, D) `total` and (M,) `sums` or None, for `finish` of the kernels;
        and what adds that of the prototypes to `into`, which can wait.
        """

    def sums(self, into: RowsGradient) -> Tensor | None:
        """(V,), for `finish` of the kernels with into.products as `total`."""
        return None

    def complete(self, into: RowsGradient, rows: Rows) -> None:
        """Adds to `into.products` what could wait until every chunk was there."""
        return


def nothing() -> None:
    """What is left to add where all was added at once."""


class Product(Contraction):
    """Values of one matrix product, whose statistics are taken along with it or in a pass over it."""

    wide, kept, temporaries = False, 1, 1

    def of_product(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """The statistics of the products of tokens (M, D) and prototypes (V, D)."""
        ops, squares = choose.kernels_for(x.rows), given.squares
        if use.fused:
            local = given.local
            target = squares.target if squares else ops.to_targets(x.rows, rows.rows, local, product=True)
            moment = use.exponent and given.coefficient is not None
            (top, total, mean, score), scored = use.fused.fused_statistics(x, rows, given, target, use.gradient, moment)
            return Statistics(given, top, total, mean, score, scored=scored, fused=use.fused)
        kept = ops.products(x.rows, rows)
        return statistics_of(ops.statistics(kept, given), given, kept)

    def gradients(self, stats: Statistics, x: Tokens, rows: Rows, loss: Upstream, into: RowsGradient) -> Gradients:
        """dx = G w, dw = G' x for the products; their sums where G is that of squares."""
        ops = choose.kernels_for(x.rows)
        if stats.fused and stats.scored is not None:
            grads, over_rows, over_columns = stats.fused.fused_gradient(stats.scored, stats.given, loss)
        else:
            grads, over_rows, over_columns = ops.gradients(stats.kept[0], stats.given, loss, x.rows.dtype)

        def add_rows() -> None:
            if over_columns is not None:
                into.columns += over_columns
            into.add_product(grads, x.rows)

        return ops.hidden_product(grads, rows), over_rows, add_rows


class SquaredDistance(Product):
    """q = |x - w|^2 by one matrix product, the target's q by direct difference; d = factor * q ** power.

    dx = 2 (x sum_j G_j - G w), dw = 2 (w sum_i G_i - G' x), the sums over G as rounded for the products: otherwise the
    cancellation near a match would cost 2^-9 |x|/d in bfloat16.
    """

    def __init__(self, power: float, factor: float = 1.0) -> None:
        self.power, self.factor = power, factor

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """As Contraction.statistics, with the floor of d as one of q."""
        assert given.floor is not None and given.coefficient is not None
        target = choose.kernels_for(x.rows).to_targets(x.rows, rows.rows, given.local, product=False)
        squares = Squares(x.squares, rows.squares, target, (given.floor / self.factor).pow(1 / self.power))
        steep, lift = self.power * given.coefficient, math.log(self.factor) / self.power
        of_q = given._replace(coefficient=steep, floor=squares.floor, squares=squares, lift=lift)
        return self.of_product(x, rows, of_q, use)

    def sums(self, into: RowsGradient) -> Tensor:
        """(V,) column sums of G."""
        return into.columns


class LinearSquares(SquaredDistance):
    """-n q of the same q is the score (softmax over squared distances): no logarithm, no floor."""

    def __init__(self) -> None:
        super().__init__(power=1.0)

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """As Contraction.statistics, without a floor."""
        target = choose.kernels_for(x.rows).to_targets(x.rows, rows.rows, given.local, product=False)
        squares = Squares(x.squares, rows.squares, target)
        return self.of_product(x, rows, given._replace(floor=None, squares=squares), use)


class DotProduct(Product):
    """x . w is the score itself (softmax cross-entropy, the baseline), or if `scaled` n times that: no logarithm, no
    floor.
    """

    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """As Contraction.statistics, without a floor."""
        coefficient = given.coefficient if self.scaled else None
        return self.of_product(x, rows, given._replace(coefficient=coefficient, floor=None), use)


class DirectDistance(Contraction):
    """c = d itself, of unrounded operands. What is kept starts with log c."""

    wide = True

    def log_statistics(self, values: Tensor, given: Given, *more: Tensor) -> Statistics:
        """Of c (M, V), which becomes log c; `more` is kept too."""
        sums: Sums = choose.kernels_for(values).statistics(values, given)
        return statistics_of(sums, given, values, *more)

    def log_gradient(self, stats: Statistics, loss: Upstream) -> Tensor:
        """G (M, V); the logarithms are consumed."""
        logs = stats.kept[0]
        return choose.kernels_for(logs).gradients(logs, stats.given, loss, logs.dtype)[0]


class Elementwise(DirectDistance):
    """c = d, entry by entry (`eager.contract`): exact near a match, so nothing is rounded before it."""

    temporaries = 1

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.reads_values = terms.kind in ("linf", "lp")
        self.kept = 2 if self.reads_values else 1

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """As Contraction.statistics; c is kept beside log c where its gradient reads it."""
        values = choose.kernels_for(x.rows).contract(self.terms, x.rows, rows)
        logs = choose.kernels_for(x.rows).copy(values) if self.reads_values else values
        return self.log_statistics(logs, given, values)

    def gradients(self, stats: Statistics, x: Tokens, rows: Rows, loss: Upstream, into: RowsGradient) -> Gradients:
        """As Contraction.gradients; that of the prototypes is added at once."""
        values = stats.kept[-1]
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

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """As Contraction.statistics; the denominator (M, V) and its floor (M,) are kept."""
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
        return self.log_statistics(values, given, below, least)

    def gradients(self, stats: Statistics, x: Tokens, rows: Rows, loss: Upstream, into: RowsGradient) -> Gradients:
        """d(A / B) = dA / B - (A / B) dB / B."""
        ops = choose.kernels_for(x.rows)
        logs, below, least = stats.kept
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

    def complete(self, into: RowsGradient, rows: Rows) -> None:
        """The slope of sum |w| is the sign of w: one addition for all chunks."""
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

    def statistics(self, x: Tokens, rows: Rows, given: Given, use: Use) -> Statistics:
        """As Contraction.statistics, a few prototypes at a time."""
        values = x.rows.new_empty(x.rows.shape[0], rows.rows.shape[0])
        for block in blocks(x.rows, rows):
            values[:, block] = self.between(x.rows[:, None], rows.rows[block])
        return self.log_statistics(values, given)

    def gradients(self, stats: Statistics, x: Tokens, rows: Rows, loss: Upstream, into: RowsGradient) -> Gradients:
        """As Contraction.gradients, by autograd."""
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
