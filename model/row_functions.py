"""Functions of rows (N, D) that distances put before their contraction: length 1, bits, noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import choose


class UnitRows(torch.autograd.Function):
    """Rows (N, D) of length 1 (a row of zeros stays one, with gradient zero)."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        """(N, D) -> (N, D)."""
        ctx.save_for_backward(rows)
        return choose.kernels_for(rows).unit_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        """(N, D) -> (N, D), once only: the kernels' gradient has none of its own."""
        (rows,) = ctx.saved_tensors
        return choose.kernels_for(rows).unit_rows_gradient(rows, grad)


class Bits(torch.autograd.Function):
    """1 where rows > 0, else 0; its gradient is `factor` times that of sigmoid(rows / temperature)."""

    @staticmethod
    def forward(ctx, rows: Tensor, temperature: float, factor: float) -> Tensor:  # type: ignore[override]
        """(N, D) -> (N, D) bits."""
        ctx.save_for_backward(rows)
        ctx.temperature, ctx.factor = temperature, factor
        return (rows > 0).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        """(N, D) -> (N, D)."""
        (rows,) = ctx.saved_tensors
        soft = (rows / ctx.temperature).sigmoid()
        return grad * soft * (1 - soft) * (ctx.factor / ctx.temperature), None, None


def uniforms(seed: int | Tensor, index: Tensor, width: int) -> Tensor:
    """(N,) indices -> (N, width) float64 in (0, 1), a hash of (seed, index, column): the same in any order."""
    column = torch.arange(width, device=index.device)
    bits = _mixed(_mixed(index * 0x9E3779B1 + seed)[:, None] + column * 0x85EBCA6B)
    return (bits.double() + 0.5) * 2.0**-32


def _mixed(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32 bits."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)
