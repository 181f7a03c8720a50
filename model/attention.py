"""Causal self-attention through torch's scaled_dot_product_attention (flash kernels where the device has them)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import DecoderConfig


class CausalSelfAttention(nn.Module):
    """(B, T, D) -> (B, T, D); H heads of width D / H."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.projection = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.projection(y.transpose(1, 2).reshape(b, t, d))
