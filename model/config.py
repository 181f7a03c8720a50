"""What a decoder and a head are made of: the `model:` and `head:` sections of a config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from .distance_settings import DISTANCES, SETTINGS, Settings, settings_of
from .options import CAPS, MOST_Z, LossOptions

# Beyond what anybody trains, and small enough that no count of weights or bytes passes 63 bits.
Positions = Annotated[int, Field(gt=0, le=2**24)]
Width = Annotated[int, Field(gt=0, le=2**17)]
MOST_STRETCH = 1e6  # of positions
# A score is -n log d, and |log d| < 44.4 where float32 holds d^2: up to this n scores stay below 2^23, where float32
# still tells half nats apart, and squared gradients far below its largest number.
MOST_EXPONENT = 1e5
StartLength = Annotated[float, Field(ge=1e-15, le=1e15)]  # its square, times any width, is a float32 number


class Llama3Scaling(BaseModel, extra="forbid", frozen=True):
    """Llama 3.1's stretched RoPE (as in Meta's llama-models): wavelengths beyond `original` / `low` positions become
    `factor` times longer, those below `original` / `high` stay, those between are blended.
    """

    factor: float = Field(gt=1, le=MOST_STRETCH)
    low: float = Field(default=1.0, gt=0, le=MOST_STRETCH)
    high: float = Field(default=4.0, gt=0, le=MOST_STRETCH)
    original: Positions = 8192  # positions that the model was first trained on

    @model_validator(mode="after")
    def _a_band(self) -> Llama3Scaling:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self


class Rope(BaseModel, extra="forbid", frozen=True):
    """Rotary positions (arXiv:2104.09864): entries i and i + d/2 of a head turn by position * theta^(-2i/d).

    A number as `scaling` divides all positions by it (arXiv:2306.15595).
    """

    theta: float = Field(default=10_000.0, gt=1, le=1e12)
    scaling: Annotated[float, Field(ge=1, le=MOST_STRETCH)] | Llama3Scaling = 1.0


@dataclass(frozen=True)
class Weight:
    """One parameter of a decoder, named and shaped as in `Decoder.named_parameters()`."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["matrices", "norms", "biases", "embeddings"]

    @cached_property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @cached_property
    def module(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]


class DecoderConfig(BaseModel, extra="forbid", frozen=True):
    """A stack of attention and MLP blocks; as it stands, GPT-2's without biases. docs/models.md has the families.

    Sizes are counted here and nowhere else: tests compare them with the built decoder.
    """

    vocab_size: int = Field(gt=0, le=2**24)
    seq_len: Positions
    layers: int = Field(gt=0, le=1024)
    heads: Width
    dim: Width
    kv_heads: Width | None = None  # heads of keys and values; None: `heads`
    head_dim: Width | None = None  # None: dim / heads
    mlp_dim: int | None = Field(default=None, gt=0, le=2**20)  # None: 4 dim
    positions: Literal["learned", "none"] | Rope = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = Field(default=1e-5, ge=1e-30, le=1)
    post_norm: bool = False  # norms after each sum (BERT), and of the embeddings, instead of before each branch
    qk_norm: bool = False  # norms of each head's queries and keys
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    bias: bool = False  # of all linear layers and LayerNorms
    qkv_bias: bool | None = None  # None: `bias`
    objective: Literal["causal", "masked"] = "causal"  # the next token, seeing what is before; masked ones, seeing all
    window: Positions | None = None  # a token sees tokens fewer than this many places away; None: all
    document_mask: bool = False  # a token sees its own document alone, and positions start anew in each
    base_dim: Width | None = None  # width at which lr was chosen: see `width_scale`; None: this one
    attention: Literal["auto", "flash", "flex", "sdpa"] = "auto"  # the kernel, where it can serve; equal results
    dropout: float = Field(default=0.0, ge=0, lt=1)
    tied: bool = False  # the head's prototypes are the token embedding
    activation_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of heads={self.heads}, or head_dim be given")
        if self.heads % self.key_heads():
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.attention_width() > 2**20:
            raise ValueError(f"heads={self.heads} of {self.head_size()} are {self.attention_width()} wide, above 2^20")
        if isinstance(self.positions, Rope) and self.head_size() % 2:
            raise ValueError(f"rotary positions turn pairs: a head's width of {self.head_size()} must be even")
        return self

    @model_validator(mode="after")
    def _can_be_served(self) -> DecoderConfig:
        if self.norm == "rmsnorm" and self.bias:
            raise ValueError("bias=true: rmsnorm has none; set bias: false, and qkv_bias: true for that of attention")
        if self.objective == "masked" and self.document_mask:
            raise ValueError("document_mask=true needs objective=causal: a masked end of a document would hide it")
        return self

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it."""
        return self.objective == "causal"

    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.heads

    def key_heads(self) -> int:
        """Heads of keys and values; each serves heads / key_heads() heads of queries (arXiv:2305.13245)."""
        return self.kv_heads or self.heads

    def mlp_width(self) -> int:
        """Width of the MLP's inside, after its gates."""
        return self.mlp_dim or 4 * self.dim

    def up_width(self) -> int:
        """Width of the MLP's first product: SwiGLU's has gates and values."""
        return self.mlp_width() * (2 if self.mlp == "swiglu" else 1)

    def width_scale(self) -> float:
        """base_dim / dim. The blocks' matrices start smaller by its root and learn at the rate times it; all else stays
        (muP for Adam: arXiv:2203.03466, table 8; wider means more heads of the same width, so scores keep 1/sqrt(d)).
        """
        return 1.0 if self.base_dim is None else self.base_dim / self.dim

    def qkv_width(self) -> int:
        """Width of attention's first product: queries, keys and values side by side."""
        return self.head_size() * (self.heads + 2 * self.key_heads())

    def has_qkv_bias(self) -> bool:
        """Whether attention's first product adds a bias (Qwen2's does, without any other)."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def attention_width(self) -> int:
        """Width of what attention mixes: all heads of values side by side, one for each head of queries."""
        return self.heads * self.head_size()

    def weights(self) -> tuple[Weight, ...]:
        """Every parameter of the decoder, in the order of `Decoder.named_parameters()`. The prototypes are the head's:
        of a tied model the token embedding too.
        """
        return _weights(self)

    def modules(self) -> tuple[str, ...]:
        """Names of the modules that hold weights, in the order in which a forward pass runs through them."""
        norms = ("attention.query_norm", "attention.key_norm") if self.qk_norm else ()
        attention, mlp = ("attention.qkv", *norms, "attention.projection"), ("mlp.up", "mlp.projection")
        block = ("attention_norm", *attention, "mlp_norm", *mlp)
        if self.post_norm:
            block = (*attention, "attention_norm", *mlp, "mlp_norm")
        tables = [name for name, there in (("tokens", not self.tied), ("positions", self.has_table())) if there]
        blocks = [f"blocks.{layer}.{name}" for layer in range(self.layers) for name in block]
        return (*tables, "norm", *blocks) if self.post_norm else (*tables, *blocks, "norm")

    def parameters(self) -> int:
        """All weights of the decoder."""
        return sum(weight.size for weight in self.weights())

    def has_table(self) -> bool:
        """Whether positions are a table of weights."""
        return self.positions == "learned"

    def block_matmul_parameters(self) -> int:
        """Weights of the blocks that meet every token in a matrix product."""
        return sum(weight.size for weight in self.weights() if weight.kind == "matrices")

    def head_flops_per_token(self) -> int:
        """The head's part of `flops_per_token`."""
        return 6 * self.vocab_size * self.dim

    def flops_per_token(self) -> int:
        """Matrix-product floating-point operations of forward and backward per token, head included (PaLM, appendix
        B). Of attention, every pair that a sequence of one document computes is counted, those after it too.
        """
        attention = 12 * self.layers * self.attention_width() * self.span()
        return 6 * self.block_matmul_parameters() + attention + self.head_flops_per_token()

    def span(self) -> int:
        """Keys per query: the sequence's, or a window's."""
        if self.window is None:
            return self.seq_len
        return min(self.seq_len, self.window if self.causal else 2 * self.window - 1)


@lru_cache(maxsize=64)
def _weights(config: DecoderConfig) -> tuple[Weight, ...]:
    return tuple(_each_weight(config))


def _each_weight(config: DecoderConfig) -> Iterator[Weight]:
    def linear(name: str, taken: int, made: int, bias: bool) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", (made, taken), "matrices")
        if bias:
            yield Weight(f"{name}.bias", (made,), "biases")

    def norm(name: str, width: int) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", (width,), "norms")
        if config.bias:
            yield Weight(f"{name}.bias", (width,), "norms")

    if not config.tied:
        yield Weight("tokens.weight", (config.vocab_size, config.dim), "embeddings")
    if config.has_table():
        yield Weight("positions.weight", (config.seq_len, config.dim), "embeddings")
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        yield from norm(f"{block}.attention_norm", config.dim)
        yield from linear(f"{block}.attention.qkv", config.dim, config.qkv_width(), config.has_qkv_bias())
        yield from linear(f"{block}.attention.projection", config.attention_width(), config.dim, config.bias)
        if config.qk_norm:
            yield from norm(f"{block}.attention.query_norm", config.head_size())
            yield from norm(f"{block}.attention.key_norm", config.head_size())
        yield from norm(f"{block}.mlp_norm", config.dim)
        yield from linear(f"{block}.mlp.up", config.dim, config.up_width(), config.bias)
        yield from linear(f"{block}.mlp.projection", config.mlp_width(), config.dim, config.bias)
    yield from norm("norm", config.dim)


class ExponentRamp(BaseModel, extra="forbid", frozen=True):
    """An exponent that moves linearly from `first` to `last` over `steps` updates (None: over all), then stays."""

    first: float = Field(gt=0, le=MOST_EXPONENT)
    last: float = Field(gt=0, le=MOST_EXPONENT)
    steps: int | None = Field(default=None, gt=1, le=10**9)


class HeadConfig(BaseModel, extra="forbid", frozen=True):
    """The output layer: one prototype per token of the vocabulary, and how far is far."""

    distance: str = "euclidean"  # a name in model.distance_settings.SETTINGS, or in model.distances.DISTANCES
    params: dict[str, float | str] = {}  # the distance's own, such as p of minkowski: see model.head.HarmonicHead
    # None: the distance's own, which is put here where it has a word (sqrt_dim, or learned for cosine_softmax)
    exponent: float | Literal["sqrt_dim", "learned"] | ExponentRamp | None = None
    exponent_start: float | None = Field(default=None, gt=0, le=MOST_EXPONENT)  # of a learned one; None: its own
    init_std: StartLength | Literal["gpt2"] | None = None  # of prototypes' entries; None: the distance's own start
    feature_length: StartLength | None = None  # of the first final hidden states; None: the distance's own
    tied_sign: Literal[1, -1] | None = None  # of a tied decoder's final states: see pretrain.config.from_tree
    chunk_mib: int | None = Field(default=None, gt=0, le=2**20)  # budget of the head's working memory; None: by device
    fused: bool | None = None  # the GPU's product and the passes over its scores in one; None: by device
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # in training: see model.options, as for the next two
    z_loss: float = Field(default=0.0, ge=0, le=MOST_Z)  # in training
    soft_cap: float | None = Field(default=None, ge=CAPS[0], le=CAPS[1])  # in evaluation and exported models too

    @model_validator(mode="before")
    @classmethod
    def _exponent_in_a_word(cls, tree: Any) -> Any:
        """So that a run that left it out and one that names it have the same settings, as have those of before."""
        if not isinstance(tree, dict) or tree.get("exponent") is not None:
            return tree
        name = tree.get("distance", "euclidean")
        kind = {**DISTANCES, **SETTINGS}.get(name) if isinstance(name, str) else None
        return tree if kind is None else {**tree, "exponent": kind.exponent}

    @model_validator(mode="after")
    def _known_distance(self) -> HeadConfig:
        self.options.check(self.settings)  # either raises
        return self

    @model_validator(mode="after")
    def _positive_exponent(self) -> HeadConfig:
        if isinstance(self.exponent, float) and not 0 < self.exponent <= MOST_EXPONENT:
            most = f"a number up to {MOST_EXPONENT:,.0f}"
            raise ValueError(f"exponent={self.exponent} must be positive: {most}, sqrt_dim or learned")
        if self.exponent_start is not None and self.exponent != "learned":
            raise ValueError(f"exponent_start={self.exponent_start:g} is that of a learned exponent: exponent: learned")
        return self

    @property
    def settings(self) -> Settings:
        """Of the distance. Raises ValueError for one that is unknown, or a parameter that is unknown or off."""
        return settings_of(self.distance, self.params)

    @property
    def options(self) -> LossOptions:
        """Of loss and scores. Raises ValueError for one out of range."""
        return LossOptions(self.label_smoothing, self.z_loss, self.soft_cap)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of model.head.HarmonicHead."""
        exponent = self.exponent
        return {
            "distance": self.distance,
            "exponent": (exponent.first, exponent.last) if isinstance(exponent, ExponentRamp) else exponent,
            "exponent_start": self.exponent_start,
            "init_std": self.init_std,
            "feature_length": self.feature_length,
            "chunk_bytes": None if self.chunk_mib is None else self.chunk_mib * 2**20,
            "fused": self.fused,
            **asdict(self.options),
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
        from .head import HarmonicHead  # brings torch, which a config otherwise does without

        return HarmonicHead(1, dim, seed=0, device="meta", **self.arguments()).feature_length

    def parameters(self, prototypes: int, dim: int) -> dict[str, int]:
        """Trained numbers of a head by parameter: `prototypes` rows, and what the distance and the exponent add."""
        trained = {name: math.prod(shape) for name, shape in self.settings.trained(dim).items()}
        learned = {"log_exponent": 1} if self.exponent == "learned" and self.settings.has_exponent else {}
        return {"prototypes": prototypes * dim, **trained, **learned}
