"""Causal self-attention: torch's scaled_dot_product_attention; for short sequences on CPUs, a materialised form of it.

Legend: B sequences, T positions, D width, H heads of width d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.config import DecoderConfig

SHORT = 256  # positions up to which (T, T) scores in float32 beat torch's CPU kernel, whose small products are slow


class CausalSelfAttention(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.short = config.heads, config.dropout, SHORT
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.projection = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and qkv.dtype == torch.bfloat16 and t <= self.short and not dropout:
            return self.projection(_ShortAttention.apply(qkv))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.projection(y.transpose(1, 2).reshape(b, t, d))


class _ShortAttention(torch.autograd.Function):
    """(B, T, 3, H, d) -> (B, T, D) in bfloat16; scores, softmax and their gradients in float32, as in flash kernels."""

    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:  # type: ignore[override]
        b, t, _, h, d = qkv.shape
        q, k, v = heads = qkv.permute(2, 0, 3, 1, 4).reshape(3, b * h, t, d)
        future = torch.full((t, t), -torch.inf).triu_(1)
        scores = torch.baddbmm(future, q.float(), k.float().transpose(1, 2), alpha=d**-0.5)
        weights = torch.softmax(scores, -1, out=scores).to(qkv.dtype)
        mixed = torch.bmm(weights, v)
        ctx.save_for_backward(heads, weights, mixed)
        ctx.shape = qkv.shape
        return mixed.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        heads, weights, mixed = ctx.saved_tensors
        b, t, _, h, d = ctx.shape
        q, k, v = heads
        grad = grad.view(b, t, h, d).transpose(1, 2).reshape(b * h, t, d)
        wide = grad.float()
        scores = torch.bmm(wide, v.float().transpose(1, 2))
        scores = scores.sub_((wide * mixed).sum(-1, keepdim=True)).mul_(weights).mul_(d**-0.5).to(grad.dtype)
        out = torch.empty_like(heads)
        torch.bmm(scores, k, out=out[0])
        torch.bmm(scores.transpose(1, 2), q, out=out[1])
        torch.bmm(weights.transpose(1, 2), grad, out=out[2])
        return out.view(3, b, h, t, d).permute(1, 3, 0, 2, 4).reshape(ctx.shape)
