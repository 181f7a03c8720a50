"""What a decoder and a head are made of: the `model:` and `head:` sections of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator


class DecoderConfig(BaseModel, extra="forbid", frozen=True):
    """A GPT-style pre-norm decoder (learned positions, LayerNorm, GELU)."""

    vocab_size: int = Field(gt=0)
    seq_len: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    dim: int = Field(gt=0)
    bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    tied: bool = False  # the head's prototypes are the token embedding
    activation_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of heads={self.heads}")
        return self

    def block_matmul_parameters(self) -> int:
        """Weights of the blocks that meet every token in a matrix product."""
        return self.layers * 12 * self.dim**2

    def flops_per_token(self) -> int:
        """Matrix-product floating-point operations of forward and backward per token, head included (PaLM, appendix
        B).
        """
        products = self.block_matmul_parameters() + self.vocab_size * self.dim
        return 6 * products + 12 * self.layers * self.dim * self.seq_len


class ExponentRamp(BaseModel, extra="forbid", frozen=True):
    """An exponent that moves linearly from `first` to `last` over `steps` updates (None: over all), then stays."""

    first: float = Field(gt=0)
    last: float = Field(gt=0)
    steps: int | None = Field(default=None, gt=1)


class HeadConfig(BaseModel, extra="forbid", frozen=True):
    """The output layer: one prototype per token of the vocabulary, and how far is far."""

    distance: str = "euclidean"  # a name in model.distances.DISTANCES
    params: dict[str, float | str] = {}  # the distance's own, such as p of minkowski: see model.head.HarmonicHead
    exponent: float | Literal["sqrt_dim", "learned"] | ExponentRamp = "sqrt_dim"
    init_std: float | None = Field(default=None, gt=0)  # None: see model.distances.Distance.start
    chunk_mib: int | None = Field(default=None, gt=0)  # budget of the head's working memory; None: by device

    @model_validator(mode="after")
    def _known_distance(self) -> HeadConfig:
        from model.distances import distance_named  # brings torch, which a config otherwise does without

        distance_named(self.distance).settings(1, **self.params)
        return self

    @model_validator(mode="after")
    def _positive_exponent(self) -> HeadConfig:
        if isinstance(self.exponent, float) and not self.exponent > 0:
            raise ValueError(f"exponent={self.exponent} must be positive: a number, sqrt_dim or learned")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of model.head.HarmonicHead."""
        exponent = self.exponent
        return {
            "distance": self.distance,
            "exponent": (exponent.first, exponent.last) if isinstance(exponent, ExponentRamp) else exponent,
            "init_std": self.init_std,
            "chunk_bytes": None if self.chunk_mib is None else self.chunk_mib * 2**20,
            **self.params,
        }

    def progress(self, step: int, steps: int) -> float:
        """How far a ramp of the exponent is at the update `step` (the first is 0) of `steps`."""
        over = self.exponent.steps if isinstance(self.exponent, ExponentRamp) else None
        return min(1.0, max(0, step) / max(1, (over or steps) - 1))

    def hidden_length(self, dim: int) -> float:
        """Length of the final hidden states at initialisation: the prototypes' (1 for most distances), or sqrt(dim) for
        the softmax baseline.

        Unit variance would be length sqrt(dim). Distances do not care about a common scale, but Adam moves every entry
        by about the learning rate: with x and w of length 1 a step moves a score n log d by about as much as it
        moves a logit of softmax, with length sqrt(dim) by sqrt(dim) less. (The published recipe raised the learning
        rate tenfold instead.)
        """
        from model.head import HarmonicHead

        return HarmonicHead(1, dim, seed=0, device="meta", **self.arguments()).feature_length
