"""A decoder of any family that DecoderConfig can tell: tokens to hidden states. It knows nothing of heads, losses,
optimisers or ranks.

Legend: B sequences, T positions, D width, L blocks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import Memory, Pattern, SelfAttention, make_norm, pattern_of

if TYPE_CHECKING:  # a config is pydantic's, which a decoder does without
    from .config import DecoderConfig

INIT_STD = 0.02  # GPT-2


class Mlp(nn.Module):
    """(B, T, D) -> (B, T, D). SwiGLU (arXiv:2002.05202): silu of the first half of `up`, times the second."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.gelu = partial(F.gelu, approximate="tanh" if config.mlp == "gelu_tanh" else "none")
        self.up = nn.Linear(config.dim, config.up_width(), bias=config.bias)
        self.projection = nn.Linear(config.mlp_width(), config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position by itself."""
        x = self.up(x)
        if self.gated:
            gate, value = x.chunk(2, -1)
            return self.projection(F.silu(gate) * value)
        return self.projection(self.gelu(x))


class Block(nn.Module):
    """(B, T, D) -> (B, T, D): attention and MLP, each added to what it was given, with norms before or after."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.attention_norm = make_norm(config, config.dim)
        self.attention = SelfAttention(config)
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, pattern: Pattern, memory: Memory | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `memory`: this block's row of the KV cache."""
        if self.post_norm:
            x = self.attention_norm(x + self.dropout(self.attention(x, pattern, memory)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), pattern, memory))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, D); embedded tokens (B, T, D) instead when `config.tied`.

    Args:
        config: sizes and options.
        hidden_length: length of the hidden states at initialisation (`HeadConfig.hidden_length`), below 0 with their
            sign turned; None: sqrt(D), unit variance.
        seed: of the initial weights; None: torch's global generator as it stands.

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
            learned = config.positions == "learned"
            self.positions = nn.Embedding(config.seq_len, config.dim) if learned else None
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = make_norm(config, config.dim)  # of the last block's sum; of the embeddings when post_norm
            self.apply(self._initialise)
        if config.compile:
            for block in self.blocks:
                block.compile()

    def _initialise(self, module: nn.Module) -> None:
        """GPT-2: normal weights, zero biases; projections into the residual stream smaller by sqrt(2 L), one per
        addend. See `DecoderConfig.width_scale` too.
        """
        std = INIT_STD * self.config.width_scale() ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std if isinstance(module, nn.Linear) else INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, SelfAttention | Mlp):
            nn.init.normal_(module.projection.weight, std=std / (2 * self.config.layers) ** 0.5)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        memories: list[Memory] | None = None,
        documents: int | None = None,
    ) -> Tensor:
        """Tokens (B, T), or embedded ones (B, T, D), -> hidden states (B, T, D).

        Args:
            inputs: the tokens, at most `config.seq_len` with those that `memories` hold.
            positions: (B, T), of each token in its document (`document_positions`): a token then sees its own document
                alone, and positions are these. None: each row is one document.
            memories: the KV cache (`memories`), which goes on from the tokens that it holds and takes these in.
            documents: how many `positions` tells of, where the host knows it (`documents_in`); None: see `pattern_of`.
        """
        past = memories[0].length if memories else 0
        end = past + inputs.shape[1]
        if end > self.config.seq_len:
            raise ValueError(f"{end} positions given, the decoder has {self.config.seq_len}")
        if memories and not (self.config.causal and positions is None):
            raise ValueError("a KV cache takes rows of one document each, and a causal decoder")
        x = inputs if self.tokens is None else self.tokens(inputs)
        if self.positions is not None:
            x = x + (self.positions.weight[past:end] if positions is None else self.positions(positions))
        if self.config.post_norm:
            x = self.norm(x)
        x = self.dropout(x)
        pattern = pattern_of(self.config, x, positions, past, documents)
        for index, block in enumerate(self.blocks):
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, pattern, use_reentrant=False)
            else:
                x = block(x, pattern, memories[index] if memories else None)
        if not self.config.post_norm:
            x = self.norm(x)
        return x if self.output_scale == 1.0 else x * self.output_scale

    def memories(self, batch: int, room: int) -> list[Memory]:
        """An empty KV cache of `batch` rows with room for so many tokens each."""
        weight = next(self.parameters())
        return [Memory(self.config, batch, room, weight.device, weight.dtype) for _ in self.blocks]


def document_positions(tokens: Tensor, eos_id: int) -> Tensor:
    """(B, T) tokens -> (B, T) places in their documents. An end of text opens the document that follows it, so that its
    first token is predicted from that alone; what stands before the first one in a row is a document as well.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return place - torch.where(tokens == eos_id, place, 0).cummax(1).values


def documents_in(tokens: Tensor, eos_id: int) -> int:
    """How many documents `document_positions` tells of in (B, T) tokens; of tokens on a GPU, the host waits for it."""
    return len(tokens) + int((tokens[:, 1:] == eos_id).sum())
