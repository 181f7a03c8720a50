"""A GPT-style pre-norm decoder: tokens to hidden states. It knows nothing of heads, losses, optimisers or ranks.

Legend: B sequences, T positions, D width, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import CausalSelfAttention
from model.config import DecoderConfig

INIT_STD = 0.02  # GPT-2


class Mlp(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=config.bias)
        self.projection = nn.Linear(4 * config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, D); embedded tokens (B, T, D) instead when `config.tied`.

    Args:
        config: sizes and options.
        hidden_length: length of the hidden states at initialisation (`HeadConfig.hidden_length`); None: sqrt(D),
        unit variance. seed: of the initial weights; None: torch's global generator as it stands.

    Raises:
        ValueError: more positions than `config.seq_len`.
    """

    def __init__(self, config: DecoderConfig, hidden_length: float | None = None, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.output_scale = 1.0 if hidden_length is None else hidden_length / config.dim**0.5
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.tokens = None if config.tied else nn.Embedding(config.vocab_size, config.dim)
            self.positions = nn.Embedding(config.seq_len, config.dim)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.dim, bias=config.bias)
            self.apply(self._initialise)
        if config.compile:
            for block in self.blocks:
                block.compile()

    def _initialise(self, module: nn.Module) -> None:
        """GPT-2: normal weights, zero biases; projections into the residual stream smaller by sqrt(2 L), one per
        addend.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | Mlp):
            nn.init.normal_(module.projection.weight, std=INIT_STD / (2 * self.config.layers) ** 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[1] > self.config.seq_len:
            raise ValueError(f"{inputs.shape[1]} positions given, the decoder has {self.config.seq_len}")
        x = inputs if self.tokens is None else self.tokens(inputs)
        x = self.dropout(x + self.positions.weight[: inputs.shape[1]])
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.norm(x)
        return x if self.output_scale == 1.0 else x * self.output_scale
