"""The head's five chunk operations in plain PyTorch: the readable twin of every kernel, and the path where there is
none.

Legend: M tokens of a chunk, V prototypes on this rank, D width. Scores of a *quadratic* distance are
s = -coefficient * log q with q the squared distance; those of `dot` are the products themselves. Operands have the
compute dtype (bfloat16, float32 or float64); scores and sums are float32 (float64 for float64 operands).
"""

from __future__ import annotations

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
    """The prototypes of one call, laid out for the two products that read them. (V, D) in the compute dtype."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.squares = square_norms(rows)  # (V,)


def square_norms(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) squared norms of the rows as rounded, in the accumulator dtype."""
    wide = rows.to(accumulator(rows.dtype))
    return torch.linalg.vecdot(wide, wide)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) @ (K, N) with float32 sums *and* result: rounding a dot product to bfloat16 would ruin near matches."""
    wide = accumulator(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def products(x: Tensor, rows: Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype."""
    return _product(x, rows.rows.t())


def hidden_product(grads: Tensor, rows: Rows) -> Tensor:
    """(M, V) -> (M, D): grads @ rows."""
    return _product(grads, rows.rows)


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor) -> None:
    """total (V, D) += grads.T @ x, for grads (M, V) and x (M, D)."""
    total += _product(grads.t(), x)


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


def quadratic_statistics(
    dots: Tensor, x_squares: Tensor, rows: Rows, floor: Tensor, coefficient: Tensor, local: Tensor, target_q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns dot products into log q, in place, and sums up the scores s = -coefficient * log q of every token.

    x_squares, floor, target_q are (M,); `local` (M,) is the target's column, -1 where it is not here; its q is
    `target_q`, taken by direct difference. Returns (M,) each: max s, sum exp(s - max), sum s * exp(s - max), and s
    of the target (0 where it is not here).
    """
    q = dots.mul_(-2).add_(x_squares[:, None]).add_(rows.squares)
    here = local >= 0
    column = local.clamp_min(0)[:, None]
    q.scatter_(1, column, torch.where(here[:, None], target_q[:, None], q.gather(1, column)))
    log_q = torch.maximum(q, floor[:, None], out=q).log_()
    scores = log_q * -coefficient
    return _summed(scores, column, here)


def dot_statistics(dots: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four sums for s = dots, which stays as it is."""
    return _summed(dots.clone(), local.clamp_min(0)[:, None], local >= 0)


def _summed(scores: Tensor, column: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.where(here, scores.gather(1, column)[:, 0], 0)
    top = scores.amax(1)
    weights = (scores - top[:, None]).exp_()
    return top, weights.sum(1), torch.linalg.vecdot(weights, scores), target


def quadratic_gradient(
    log_q: Tensor, floor: Tensor, coefficient: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """G = d(weight * loss)/dq, rounded to `dtype`, with the sums of the *rounded* G over rows and columns.

    G = -coefficient * weight * (p - onehot) / q, and 0 at the floor. (M, V) -> G (M, V), (M,), (V,). `log_q` is
    consumed.
    """
    here = local >= 0
    column = local.clamp_min(0)[:, None]
    target_log_q = log_q.gather(1, column)
    floored = log_q <= floor.log()[:, None] + FLOOR_MARGIN
    grads = (log_q * -(coefficient + 1)).sub_(lse[:, None]).exp_()  # p / q
    grads.scatter_add_(1, column, torch.where(here[:, None], -target_log_q.neg().exp(), 0))
    grads.mul_((-coefficient * weight)[:, None]).masked_fill_(floored, 0)
    rounded = grads.to(dtype)
    wide = rounded.to(grads.dtype)
    return rounded, wide.sum(1), wide.sum(0)


def dot_gradient(scores: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """G = weight * (p - onehot), rounded to `dtype`. (M, V) -> (M, V). `scores` is consumed."""
    here = (local >= 0)[:, None]
    probabilities = scores.sub_(lse[:, None]).exp_()
    column = local.clamp_min(0)[:, None]
    probabilities.scatter_add_(1, column, torch.where(here, -1.0, 0.0).to(probabilities.dtype))
    return probabilities.mul_(weight[:, None]).to(dtype)
