"""The head's chunk operations in plain PyTorch: the readable twin of every kernel, and the path where there is none.

Legend: M tokens of a chunk, V prototypes on this rank, D width. Scores are s = -coefficient * log c with c what a
contraction of x and w makes, in the *quadratic* family the squared distance q; those of `dot` are the products
themselves. Operands of products have the compute dtype (bfloat16, float32 or float64); scores and sums are float32
(float64 for float64 operands).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FLOOR_MARGIN = 2.0**-18  # log q this close to the floor's logarithm is at the floor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, for what is as large as the prototypes."""
    return torch.empty(shape, dtype=dtype, device=device)


class Rows:
    """The prototypes of one call, laid out for the products that read them. (V, D) in the compute dtype.

    `chunks`: of how many chunks the scores are alive at once.
    """

    def __init__(self, rows: Tensor, chunks: int = 1) -> None:
        self.rows = rows
        self.squares = square_norms(rows)  # (V,)

    @functools.cached_property
    def sizes(self) -> Tensor:
        """(V,) sums of the absolute entries, made when one asks for them."""
        return self.rows.abs().sum(1)


def square_norms(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) squared norms of the rows as rounded, in the accumulator dtype."""
    wide = rows.to(accumulator(rows.dtype))
    return torch.linalg.vecdot(wide, wide)


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) @ (K, N) with float32 sums *and* result: rounding a dot product to bfloat16 would ruin near matches."""
    wide = accumulator(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def products(x: Tensor, rows: Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype."""
    return product(x, rows.rows.t())


def hidden_product(grads: Tensor, rows: Rows) -> Tensor:
    """(M, V) -> (M, D): grads @ rows."""
    return product(grads, rows.rows)


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor) -> None:
    """total (V, D) += grads.T @ x, for grads (M, V) and x (M, D)."""
    total += product(grads.t(), x)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) of length 1 (a row of zeros stays one)."""
    scaled, length, _ = _lengths(rows)
    return scaled / length


def unit_rows_gradient(rows: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `rows` from that of unit_rows(rows): 0 for a row of zeros, and finite for the shortest of
    rows.
    """
    scaled, length, largest = _lengths(rows)
    unit = scaled / length
    along = torch.linalg.vecdot(unit, grad)[:, None]
    across = ((grad - unit * along) / length / largest).clamp(-torch.finfo(grad.dtype).max, torch.finfo(grad.dtype).max)
    return torch.where(rows.any(1, keepdim=True), across, 0)


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows divided by their largest entry (then their squares cannot overflow), the length of that, the largest
    entry.
    """
    largest = rows.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    scaled = rows / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled, torch.where(length == 0, 1, length), largest


def finish_rows(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """total (V, D) = 2 (columns (V,) * rows (V, D) - total), in place."""
    total.neg_().addcmul_(rows, columns[:, None]).mul_(2)


class Squares(NamedTuple):
    """What turns the dot products of a chunk into squared distances q = |x|^2 + |w|^2 - 2 x.w."""

    x: Tensor  # (M,) |x|^2
    rows: Tensor  # (V,) |w|^2
    target: Tensor  # (M,) q of the target, by direct difference
    floor: Tensor  # (M,) the least that q may be


def quadratic_statistics(
    dots: Tensor, squares: Squares, coefficient: Tensor, local: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums up the scores s = -coefficient * log q of every token; the dot products (M, V) become what is *kept* for
    `quadratic_scores` and `quadratic_gradient` (here: log q).

    `local` (M,) is the target's column, -1 where it is not here. Returns (M,) each: max s, sum exp(s - max),
    sum s * exp(s - max), and s of the target (0 where it is not here).
    """
    q = dots.mul_(-2).add_(squares.x[:, None]).add_(squares.rows)
    column = local.clamp_min(0)[:, None]
    q.scatter_(1, column, torch.where((local >= 0)[:, None], squares.target[:, None], q.gather(1, column)))
    return log_statistics(q, squares.floor, coefficient, local)


def quadratic_scores(kept: Tensor, squares: Squares, coefficient: Tensor, local: Tensor) -> Tensor:
    """(M, V) scores from what `quadratic_statistics` kept."""
    return kept * -coefficient


def quadratic_gradient(
    kept: Tensor,
    squares: Squares,
    coefficient: Tensor,
    lse: Tensor,
    weight: Tensor,
    local: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """G = d(weight * loss)/dq, rounded to `dtype`, with the sums of the *rounded* G over rows and columns.

    G = -coefficient * weight * (p - onehot) / q, and 0 at the floor. (M, V) -> G (M, V), (M,), (V,). `kept` is
    consumed.
    """
    rounded = log_gradient(kept, squares.floor, coefficient, lse, weight, local, dtype)
    wide = rounded.to(lse.dtype)
    return rounded, wide.sum(1), wide.sum(0)


def log_statistics(
    values: Tensor, floor: Tensor, coefficient: Tensor, local: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns values c (M, V) into log max(c, floor), in place; the sums of quadratic_statistics for s = -coefficient *
    log c."""
    logs = torch.maximum(values, floor[:, None], out=values).log_()
    return _summed(logs * -coefficient, local.clamp_min(0)[:, None], local >= 0)


def log_gradient(
    logs: Tensor, floor: Tensor, coefficient: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype
) -> Tensor:
    """G = d(weight * loss)/dc from log c: -coefficient * weight * (p - onehot) / c, 0 at the floor. `logs` is
    consumed.
    """
    here = local >= 0
    column = local.clamp_min(0)[:, None]
    target_log = logs.gather(1, column)
    floored = logs <= floor.log()[:, None] + FLOOR_MARGIN
    grads = (logs * -(coefficient + 1)).sub_(lse[:, None]).exp_()  # p / c
    grads.scatter_add_(1, column, torch.where(here[:, None], -target_log.neg().exp(), 0))
    return grads.mul_((-coefficient * weight)[:, None]).masked_fill_(floored, 0).to(dtype)


def dot_statistics(dots: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four sums for s = dots, which stays as it is."""
    return _summed(dots.clone(), local.clamp_min(0)[:, None], local >= 0)


def _summed(scores: Tensor, column: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.where(here, scores.gather(1, column)[:, 0], 0)
    top = scores.amax(1)
    weights = (scores - top[:, None]).exp_()
    return top, weights.sum(1), torch.linalg.vecdot(weights, scores), target


def dot_gradient(scores: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """G = weight * (p - onehot), rounded to `dtype`. (M, V) -> (M, V). `scores` is consumed."""
    here = (local >= 0)[:, None]
    probabilities = scores.sub_(lse[:, None]).exp_()
    column = local.clamp_min(0)[:, None]
    probabilities.scatter_add_(1, column, torch.where(here, -1.0, 0.0).to(probabilities.dtype))
    return probabilities.mul_(weight[:, None]).to(dtype)


# Contractions that are no matrix product: they read float32 (or float64) operands, as nothing forces them to round.


SMALLEST = 2.0**-60  # entries, in units in which the largest is about 1, that some slopes take as 0 to stay finite
PAIR_VALUES = 2**21  # entries of an (M, v, D) temporary


class Terms(NamedTuple):
    """How the entries of x - sign * w make a distance c."""

    kind: Literal["l1", "linf", "lp", "canberra"]
    p: float = 1.0  # of "lp"
    sign: float = 1.0  # -1: of x + w


def contract(terms: Terms, x: Tensor, rows: Rows) -> Tensor:
    """c (M, V) for tokens x (M, D) and prototypes w (V, D), with t = x - sign * w.

    l1: sum |t|. linf: max |t|. lp: (sum |t|^p)^(1/p), in units of max |t|, so that no power over- or underflows.
    canberra: sum |t| / (|x| + |w|), 0 where |x| + |w| <= SMALLEST.
    """
    out = x.new_empty(x.shape[0], rows.rows.shape[0])
    for block in blocks(x, rows):
        difference = x[:, None] - terms.sign * rows.rows[block]  # (M, v, D)
        if terms.kind == "l1":
            out[:, block] = difference.abs_().sum(-1)
        elif terms.kind == "linf":
            out[:, block] = difference.abs_().amax(-1)
        elif terms.kind == "lp":
            top = difference.abs_().amax(-1, keepdim=True)
            ratios = difference.div_(torch.where(top > 0, top, 1))
            out[:, block] = ratios.pow_(terms.p).sum(-1).pow_(1 / terms.p).mul_(top[..., 0])
        else:
            sizes = x.abs()[:, None] + rows.rows[block].abs()
            out[:, block] = difference.abs_().div_(sizes).masked_fill_(sizes <= SMALLEST, 0).sum(-1)
    return out


def contract_gradient(terms: Terms, x: Tensor, rows: Rows, values: Tensor, grads: Tensor, total: Tensor) -> Tensor:
    """From G = d loss / dc (M, V): returns the gradient of x (M, D), adds that of the prototypes to `total` (V, D).

    `values` is c as `contract` returned it (read by linf and lp). sgn(0) = 0 everywhere. linf: the entries that tie
    for the largest share G equally. lp: slope sgn(t) (|t| / c)^(p - 1), for p < 1 (where it grows without bound) 0 at
    |t| <= SMALLEST * c.
    """
    out = torch.zeros_like(x)
    for block in blocks(x, rows):
        w, c, g = rows.rows[block], values[:, block, None], grads[:, block, None]
        difference = x[:, None] - terms.sign * w
        signs = difference.sign()
        if terms.kind == "l1":
            slopes = signs
        elif terms.kind == "linf":
            largest = difference.abs_() == c
            slopes = signs.mul_(largest).div_(largest.sum(-1, keepdim=True).clamp_min(1))
        elif terms.kind == "lp":
            ratios = difference.abs_().div_(torch.where(c > 0, c, 1))
            least = SMALLEST if terms.p < 1 else 0.0
            slopes = torch.where(ratios > least, ratios.pow(terms.p - 1), 0).mul_(signs)
        else:  # the two sides differ: sgn(x - w) (|w| + sgn(x) w) / (|x| + |w|)^2, and x and w exchanged
            sizes = x.abs()[:, None] + w.abs()
            inverse = torch.where(sizes > SMALLEST, 1 / sizes, 0)
            slopes = signs.mul_(inverse).mul_(g)
            total[block] -= (slopes * (x.abs()[:, None] + x[:, None] * w.sign()).mul_(inverse)).sum(0)
            out += (slopes * (w.abs() + x.sign()[:, None] * w).mul_(inverse)).sum(1)
            continue
        slopes = slopes * g
        out += slopes.sum(1)
        total[block] -= terms.sign * slopes.sum(0)
    return out


def blocks(x: Tensor, rows: Rows) -> Iterator[slice]:
    """Slices of the prototypes for which an (M, v, D) temporary has about PAIR_VALUES entries."""
    step = max(1, PAIR_VALUES // max(1, x.numel()))
    for first in range(0, rows.rows.shape[0], step):
        yield slice(first, first + step)
