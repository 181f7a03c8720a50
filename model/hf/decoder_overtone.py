"""The decoder of an Overtone model for the transformers library: tokens to hidden states.

Legend: B sequences, T tokens given, S with those in the cache, D width, d that of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .configuration_overtone import OvertoneConfig


def make_norm(config: OvertoneConfig, width: int) -> nn.Module:
    """The norm of rows (..., width) that the config asks for."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rotations(rope: dict[str, Any], width: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, T) -> cosines and sines of a head's turns, (B, T, 1, width / 2) float32 each."""
    rates = rope["theta"] ** (torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / -width)
    scaling = rope["scaling"]
    if isinstance(scaling, dict):  # Llama 3.1's
        rounds = scaling["original"] * rates / (2 * math.pi)
        kept = ((rounds - scaling["low"]) / (scaling["high"] - scaling["low"])).clamp(0, 1)
        rates = rates * (kept + (1 - kept) / scaling["factor"])
    else:
        rates = rates / scaling
    angles = places[..., None, None] * rates
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(B, T, heads, d): entries i and i + d/2 are a pair."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1).to(x.dtype)


class OvertoneAttention(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: OvertoneConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.key_heads, self.head_size = config.heads, config.kv_heads, config.head_dim
        width = self.head_size * (self.heads + 2 * self.key_heads)
        self.qkv = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self.projection = nn.Linear(self.heads * self.head_size, config.dim, bias=config.bias)
        self.query_norm = make_norm(config, self.head_size) if config.qk_norm else None
        self.key_norm = make_norm(config, self.head_size) if config.qk_norm else None

    def forward(
        self, x: Tensor, seen: Tensor | None, causal: bool, turns: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> Tensor:
        """
        Args:
            x: (B, T, D).
            seen: (B or 1, 1, T, S), true where a token sees another; None: what is before it if `causal`, else all.
            turns: cosines and sines, (B, T, 1, d / 2) each; None: positions are not rotary.
            cache: keys and values of the tokens before, which takes in these; None: there are none.
        """
        b, t, _ = x.shape
        parts = (self.heads, self.key_heads, self.key_heads)
        q, k, v = self.qkv(x).view(b, t, -1, self.head_size).split(parts, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if turns is not None:
            q, k = rotated(q, *turns), rotated(k, *turns)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if cache is not None:
            past = int(cache.get_seq_length(self.layer))
            at = {"cache_position": torch.arange(past, past + t, device=x.device)}  # early versions' static caches ask
            k, v = cache.update(k, v, self.layer, at)
        if seen is not None and seen.shape[-1] < k.shape[-2]:  # a static cache's places that hold nothing yet
            seen = F.pad(seen, (0, k.shape[-2] - seen.shape[-1]))
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=causal and seen is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads != self.key_heads,
        )
        return self.projection(y.transpose(1, 2).reshape(b, t, -1))


class OvertoneMlp(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.dim, config.mlp_dim * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.projection = nn.Linear(config.mlp_dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position by itself."""
        x = self.up(x)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, -1)
            return self.projection(F.silu(gate) * value)
        return self.projection(F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class OvertoneBlock(nn.Module):
    """(B, T, D) -> (B, T, D), norms before each branch or after each sum."""

    def __init__(self, config: OvertoneConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.attention_norm = make_norm(config, config.dim)
        self.attention = OvertoneAttention(config, layer)
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = OvertoneMlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *pattern: Any) -> Tensor:
        """(B, T, D) -> (B, T, D); `pattern` is what `OvertoneAttention.forward` takes beside x."""
        if self.post_norm:
            x = self.attention_norm(x + self.dropout(self.attention(x, *pattern)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), *pattern))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class OvertoneDecoder(nn.Module):
    """Tokens (B, T), or embedded ones (B, T, D) where the prototypes embed -> hidden states (B, T, D)."""

    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = None if config.tied else nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.seq_len, config.dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(OvertoneBlock(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config, config.dim)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, to which embedded tokens of a tied model are brought."""
        return next(self.parameters()).dtype

    def forward(self, inputs: Tensor, places: Tensor, real: Tensor | None, cache: Cache | None) -> list[Tensor]:
        """The embeddings, then what each block makes of them; the last one after the final norm.

        Args:
            places: (B, T) of each token in its document.
            real: (B, S) which tokens are no padding; None: all.
        """
        config = self.config
        past = 0 if cache is None else int(cache.get_seq_length())
        end = past + inputs.shape[1]
        if end > config.seq_len:
            raise ValueError(f"{end} positions given, the decoder has {config.seq_len}")
        x = inputs if self.tokens is None else self.tokens(inputs)
        if self.positions is not None:
            x = x + self.positions(places)
        if config.post_norm:
            x = self.norm(x)
        x = self.dropout(x)
        turns = None
        if isinstance(config.positions, dict):
            turns = rotations(config.positions, config.head_dim, places)
        seen = self._seen(places, past, end, real)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], seen, config.causal, turns, cache))
        if not config.post_norm:
            states[-1] = self.norm(states[-1])
        if config.output_scale != 1.0:
            states[-1] = states[-1] * config.output_scale
        return states

    def _seen(self, places: Tensor, past: int, end: int, real: Tensor | None) -> Tensor | None:
        """(B or 1, 1, T, S), true where a token sees another; None: what is before it, or everything."""
        config = self.config
        if not past and real is None and not config.document_mask and (config.window is None or config.window >= end):
            return None
        place = torch.arange(end, device=places.device)
        apart, reach = place[past:, None] - place, config.window or config.seq_len
        seen = ((apart < reach) & (apart > (-1 if config.causal else -reach)))[None]
        if config.document_mask:  # whose first token is so many places away
            seen = seen & (apart <= places[..., None])
        if real is not None:
            seen = seen & real[:, None, :] | (apart == 0)  # padding sees itself: a row that sees nothing is no number
        return seen[:, None]
