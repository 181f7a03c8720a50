"""Contractions that are no matrix product, and their gradients, in plain PyTorch: part of eager.py.

They read float32 (or float64) operands, as nothing forces them to round. Legend: M tokens of a chunk, V prototypes on
this rank, v of them at a time, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .eager import Rows

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
            ratios = difference.div_(torch.where(top > 0, top, 1))  # 1 at most; all 0 at a match
            out[:, block] = ratios.pow_(terms.p).sum(-1).pow_(1 / terms.p).mul_(top[..., 0])
        else:
            sizes = x.abs()[:, None] + rows.rows[block].abs()
            out[:, block] = difference.abs_().div_(sizes).masked_fill_(sizes <= SMALLEST, 0).sum(-1)
    return out


def copy(values: Tensor) -> Tensor:
    """A copy of (M, V) that lies in memory as `contract` leaves it."""
    return values.t().clone(memory_format=torch.contiguous_format).t() if values.stride(0) == 1 else values.clone()


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
            largest = difference.abs_() == c  # exactly: c is one of these very numbers
            slopes = signs.mul_(largest).div_(largest.sum(-1, keepdim=True).clamp_min(1))
        elif terms.kind == "lp":
            ratios = difference.abs_().div_(torch.where(c > 0, c, 1))
            least = SMALLEST if terms.p < 1 else 0.0  # the slope of the smallest ratios would overflow
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
