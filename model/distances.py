"""Distances as score functions: everything that is particular to one of them, and nothing that is not.

A score function turns tokens x (M, D) and prototypes w (V, D) into scores s (M, V); the probabilities are
softmax(s). For a distance d, s = -n log d, so that p_j = d_j^-n / sum_k d_k^-n (HarMax, arXiv:2502.01628). A
distance here is a *transform* of the rows on both sides (differentiable, any PyTorch) and a *contraction* of the
transformed rows, with d = constant * contraction ** power; the constant cancels. To add a distance, add an entry to
DISTANCES.

Floor. Near a match the expansion |x|^2 + |w|^2 - 2 x.w loses its digits, and at a match log d is infinite. So q = |x
- w|^2 is at least RELATIVE_FLOOR * |x|^2 + ABSOLUTE_FLOOR, in units in which the largest entry is about 1 (where the
floor matters |w| = |x| to three digits, so this is 2^-20 (|x|^2 + |w|^2)). This belongs to the definition of the
loss: at or below the floor a distance is a constant, with gradient zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import eager
from model.kernels.choose import kernels_for

RELATIVE_FLOOR = 2.0**-19
ABSOLUTE_FLOOR = 2.0**-100  # of q, relative to the largest entry squared: keeps x = w = 0 finite


@dataclass
class Statistics:
    """What a chunk says of each of its M tokens on this rank, (M,) each, and what its gradient needs again."""

    top: Tensor  # max of the scores
    total: Tensor  # sum of exp(score - top)
    moment: Tensor  # sum of score * exp(score - top)
    target: Tensor  # score of the target, 0 where another rank holds it
    kept: Tensor  # (M, V) log q of the quadratic family, scores of dot
    floor: Tensor | None = None


class SquaredDistance:
    """Contraction q = |x - w|^2 by one matrix product, the target's q by direct difference; s = -n * power * log q."""

    def __init__(self, power: float) -> None:
        self.power = power

    def statistics(self, x: Tensor, rows: eager.Rows, local: Tensor, exponent: Tensor) -> Statistics:
        ops = kernels_for(x)
        x_squares = eager.square_norms(x)
        floor = RELATIVE_FLOOR * x_squares + ABSOLUTE_FLOOR
        target_q = eager.square_norms(x.to(floor.dtype) - rows.rows[local.clamp_min(0)].to(floor.dtype))
        kept = ops.products(x, rows)
        top, total, moment, target = ops.quadratic_statistics(
            kept, x_squares, rows, floor, self.power * exponent, local, target_q
        )
        return Statistics(top, total, moment, target, kept, floor)

    def scores(self, stats: Statistics, exponent: Tensor) -> Tensor:
        """(M, V)."""
        return stats.kept * -(self.power * exponent)

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, local: Tensor, exponent: Tensor, lse: Tensor,
        weight: Tensor, into: RowsGradient,
    ) -> Tensor:  # fmt: skip
        """Gradient of sum(weight * loss): returns that of x (M, D), adds that of the prototypes to `into`.

        dx = 2 (x sum_j G_j - G w), dw = 2 (w sum_i G_i - G' x), the sums over G as rounded for the products:
        otherwise the cancellation near a match would cost 2^-9 |x|/d in bfloat16.
        """
        ops = kernels_for(x)
        grads, over_rows, over_columns = ops.quadratic_gradient(
            stats.kept, stats.floor, self.power * exponent, lse, weight, local, x.dtype
        )
        into.columns += over_columns
        ops.add_rows_product(into.products, grads, x)
        return ops.hidden_product(grads, rows).neg_().addcmul_(x, over_rows[:, None]).mul_(2)

    def finish(self, into: RowsGradient, rows: eager.Rows, block: slice) -> None:
        """Turns `into.products` (V, D), once every chunk was added, into the gradient of the transformed prototypes."""
        kernels_for(rows.rows).finish_rows(into.products[block], rows.rows[block], into.columns[block])


class DotProduct:
    """Contraction x . w; s is the contraction itself (softmax cross-entropy, the baseline); no exponent, no floor."""

    def statistics(self, x: Tensor, rows: eager.Rows, local: Tensor, exponent: Tensor) -> Statistics:
        ops = kernels_for(x)
        kept = ops.products(x, rows)
        top, total, moment, target = ops.dot_statistics(kept, local)
        return Statistics(top, total, moment, target, kept)

    def scores(self, stats: Statistics, exponent: Tensor) -> Tensor:
        return stats.kept

    def gradients(
        self, stats: Statistics, x: Tensor, rows: eager.Rows, local: Tensor, exponent: Tensor, lse: Tensor,
        weight: Tensor, into: RowsGradient,
    ) -> Tensor:  # fmt: skip
        """As SquaredDistance.gradients: dx = G w, dw = G' x."""
        ops = kernels_for(x)
        grads = ops.dot_gradient(stats.kept, lse, weight, local, x.dtype)
        ops.add_rows_product(into.products, grads, x)
        return ops.hidden_product(grads, rows)

    def finish(self, into: RowsGradient, rows: eager.Rows, block: slice) -> None:
        """Nothing is left to do."""


class RowsGradient:
    """Accumulators of the prototypes' gradient over the chunks: (V, D) products and (V,) column sums of G."""

    def __init__(self, rows: eager.Rows) -> None:
        wide = eager.accumulator(rows.rows.dtype)
        self.products = kernels_for(rows.rows).empty(rows.rows.shape, wide, rows.rows.device).zero_()
        self.columns = self.products.new_zeros(rows.rows.shape[0])


SHORTEST = 1e-30  # a row with no larger entry has no direction


class _Unit(torch.autograd.Function):
    """Rows (N, D) of length 1 (a row of zeros stays one, with gradient zero)."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        return kernels_for(rows).unit_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return kernels_for(rows).unit_rows_gradient(rows, grad)


@dataclass(frozen=True)
class Distance:
    """A score function: `transform` of the rows on both sides (None: as they are), then `contraction`."""

    formula: str
    contraction: SquaredDistance | DotProduct
    transform: Callable[[Tensor], Tensor] | None = None
    scale_free: bool = True  # multiplying x and w by one number changes no probability

    @property
    def has_exponent(self) -> bool:
        return not isinstance(self.contraction, DotProduct)


DISTANCES = MappingProxyType(
    {
        "euclidean": Distance("|x - w|", SquaredDistance(power=0.5)),
        # 1 - x.w = |x - w|^2 / 2 for rows of length 1, and the right side is exact for rounded rows too.
        "cosine": Distance("1 - x.w / (|x| |w|)", SquaredDistance(power=1.0), transform=_Unit.apply),
        "dot": Distance("x.w", DotProduct(), scale_free=False),
    }
)
