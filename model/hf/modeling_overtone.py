"""An Overtone model for the transformers library: a decoder, and a head whose scores are -n log d, the logarithms of
its probabilities up to a constant of each token. It needs torch and transformers (5.0 or later) alone.

Legend: B sequences, T tokens given, S with those in the cache, N = B * T, V vocabulary, D width, d that of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils import ModelOutput

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # its name before transformers 5.24
# What `generate` tells the maker of its masks, by the names of every version; what it may ask for beside that is None.
MASK_ARGUMENTS = {"config", "inputs_embeds", "input_embeds", "cache_position", "past_key_values", "cache"}
MASK_ARGUMENTS |= {"position_ids", "is_first_iteration"}
RELATIVE_FLOOR = 2.0**-19  # of a distance between a token and the origin; its root where products give squares
ABSOLUTE_FLOOR = 2.0**-40
DENOMINATOR_FLOOR = 2.0**-40
LARGEST_ROW, LONGEST_TOKEN = 20, 50  # powers of two that entries of prototypes and tokens do not pass once scaled
BLOCK_ENTRIES = 1 << 25  # of an (N, prototypes, D) temporary
COLUMNS = 64


class OvertoneConfig(PreTrainedConfig):
    """The decoder's sizes and options, and the head's distance."""

    model_type = "overtone"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "seq_len",
    }

    vocab_size: int = 1024
    seq_len: int = 1024
    layers: int = 2
    heads: int = 2
    dim: int = 64
    kv_heads: int = 2  # of keys and values; each serves heads / kv_heads heads of queries
    head_dim: int = 32
    mlp_dim: int = 256
    positions: str | dict[str, Any] = "learned"  # learned, none, or rotary ones: {theta, scaling}
    norm: str = "layernorm"  # or rmsnorm
    norm_eps: float = 1e-5
    post_norm: bool = False  # norms after each sum, and of the embeddings
    qk_norm: bool = False
    mlp: str = "gelu"  # gelu_tanh, swiglu
    bias: bool = False
    qkv_bias: bool = False
    causal: bool = True
    window: int | None = None  # a token sees tokens fewer than this many places away
    document_mask: bool = False  # a token sees its own document alone: see OvertoneForCausalLM
    dropout: float = 0.0
    tied: bool = False  # the prototypes are the token embedding
    output_scale: float = 1.0  # of the hidden states
    distance: str = "euclidean"
    distance_params: dict[str, Any] | None = None
    exponent: float | None = None  # None: learned, a weight of the head
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # nothing is left to tie: a tied model has one table to begin with

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "use_cache" in config_dict:  # which transformers before 5.4 leaves out
            kwargs.setdefault("use_cache", config_dict["use_cache"])
        return super().from_dict(config_dict, **kwargs)


def make_norm(config: OvertoneConfig, width: int) -> nn.Module:
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
        b, t, _ = x.shape
        parts = (self.heads, self.key_heads, self.key_heads)
        q, k, v = self.qkv(x).view(b, t, -1, self.head_size).split(parts, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if turns is not None:
            q, k = rotated(q, *turns), rotated(k, *turns)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
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
    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.dim, config.mlp_dim * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.projection = nn.Linear(config.mlp_dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, -1)
            return self.projection(F.silu(gate) * value)
        return self.projection(F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class OvertoneBlock(nn.Module):
    def __init__(self, config: OvertoneConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.attention_norm = make_norm(config, config.dim)
        self.attention = OvertoneAttention(config, layer)
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = OvertoneMlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *pattern: Any) -> Tensor:
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
        found = [x]
        for block in self.blocks:
            found.append(block(found[-1], seen, config.causal, turns, cache))
        if not config.post_norm:
            found[-1] = self.norm(found[-1])
        if config.output_scale != 1.0:
            found[-1] = found[-1] * config.output_scale
        return found

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


class OvertoneHead(nn.Module):
    """Hidden states (..., D) -> scores (..., V): -n log d, or products for the softmax baseline (dot)."""

    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__()
        self.distance, self.params, self.exponent = (
            config.distance,
            config.distance_params or {},
            config.exponent or 1.0,
        )
        self.power: float = self.params.get("p", 1.0)
        self.prototypes = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        if self.distance == "mahalanobis":
            square = (config.dim, config.dim) if self.params["factor"] == "full" else (config.dim,)
            self.factor = nn.Parameter(torch.empty(square))
        learned = config.exponent is None and self.distance != "dot"
        self.log_exponent = nn.Parameter(torch.empty(())) if learned else None

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        x, w = hidden.reshape(-1, hidden.shape[-1]).to(wide), self.prototypes.to(wide)
        learned = self.log_exponent
        if self.distance == "dot":
            scores = x @ w.t()
        else:
            n = self.exponent if learned is None else learned.exp()
            scores = -n * self.distances(x, w).log()
        return scores.view(*hidden.shape[:-1], -1)

    def distances(self, x: Tensor, w: Tensor) -> Tensor:
        """(N, D), (V, D) -> (N, V), never less than a floor, below which they are constant."""
        if self.distance not in ("cosine", "hamming") and x.numel():
            x, w = _scaled(x, w)
        x, w = self._transformed(x), self._transformed(w)
        if self.distance in ("euclidean", "mahalanobis", "cosine") or self.power == 2:
            xx, ww = x.square().sum(-1, keepdim=True), w.square().sum(-1)
            squares = xx + ww - 2 * (x @ w.t())
            if self.distance == "cosine":
                return torch.maximum(squares / 2, (RELATIVE_FLOOR / 2 * xx + ABSOLUTE_FLOOR).detach())
            least = RELATIVE_FLOOR**0.5 * xx.sqrt() + ABSOLUTE_FLOOR
            return torch.maximum(squares, least.square().detach()).sqrt()
        if self.distance == "hamming":
            least = x.new_tensor(RELATIVE_FLOOR * x.shape[1] / 2)
        else:
            least = RELATIVE_FLOOR * self._between(x, torch.zeros_like(w[:1])) + ABSOLUTE_FLOOR
        return torch.maximum(self._between(x, w), least.detach())

    def _transformed(self, rows: Tensor) -> Tensor:
        if self.distance == "cosine":
            rows = rows / torch.where(rows.any(-1, keepdim=True), rows.detach().abs().amax(-1, keepdim=True), 1)
            length = rows.square().sum(-1, keepdim=True).sqrt()
            return rows / torch.where(length > 0, length, 1)
        if self.distance == "hamming":
            soft = (rows / self.params["temperature"]).sigmoid()
            hard = (rows > 0).to(rows.dtype) + (soft - soft.detach())  # with the gradient of the sigmoid
            return hard if self.params["kind"] == "hard" else soft
        if self.distance == "mahalanobis":
            factor = self.factor.to(rows.dtype)
            if factor.dim() == 1:
                return rows * ((factor - factor.detach().amax()) / 2).exp()
            lower = factor.tril(-1) + torch.diag(factor.diagonal().exp())
            return rows @ (lower * torch.exp2(-lower.detach().abs().amax().log2().ceil()))
        return rows

    def _between(self, x: Tensor, w: Tensor) -> Tensor:
        if self.distance == "chebyshev":
            return torch.cdist(x, w, p=math.inf)
        if self.distance == "canberra" or self.power != 1:
            block = max(1, BLOCK_ENTRIES // max(1, x.numel()))
            return torch.cat([checkpoint(self._pairs, x, part, use_reentrant=False) for part in w.split(block)], -1)
        above = taxicab(x, w)
        if self.distance != "braycurtis":
            return above
        sizes = x.abs().sum(-1, keepdim=True)
        below = sizes + w.abs().sum(-1) if self.params["denominator"] == "abs" else taxicab(x, -w)
        return above / torch.maximum(below, (RELATIVE_FLOOR * sizes + DENOMINATOR_FLOOR).detach())

    def _pairs(self, x: Tensor, w: Tensor) -> Tensor:
        """As `_between`, by way of (N, V, D) entries."""
        x = x[:, None]
        apart = (x - w).abs()
        if self.distance == "canberra":
            sizes = x.abs() + w.abs()
            return (apart / torch.where(sizes > 0, sizes, 1)).sum(-1)
        unit = apart.detach().amax(-1)
        unit = torch.where(unit > 0, unit, 1)  # of the largest entry: else high powers are no numbers
        terms = torch.where(apart > 0, apart / unit[..., None], 1).pow(self.power) * (apart > 0)
        total = terms.sum(-1)
        return unit * torch.where(total > 0, total, 1).pow(1 / self.power) * (total > 0)


def _scaled(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, D) and prototypes (V, D) times the power of two that brings the latter to entries of about 1, which
    changes no probability. Tokens that would be too long then get less: they are equally far from all prototypes.
    """
    sizes = w.detach().abs().amax(-1)
    powers = sizes.frexp().exponent
    typical = powers[sizes > 0].double().mean().nan_to_num().round()
    power = torch.minimum(-typical, LARGEST_ROW - powers.max().double()).clamp(-126, 126)
    own = torch.minimum(power, LONGEST_TOKEN - x.detach().abs().amax(-1, keepdim=True).frexp().exponent)
    return x * torch.exp2(own).to(x.dtype), w * torch.exp2(power).to(w.dtype)


def taxicab(x: Tensor, w: Tensor) -> Tensor:
    """(N, D), (V, D) -> (N, V) sums of |x - w|, of a few columns at a time: one long sum in float32 loses digits."""
    parts = zip(x.split(COLUMNS, -1), w.split(COLUMNS, -1), strict=True)
    return sum((torch.cdist(a, b, p=1) for a, b in parts), x.new_zeros(()))


class OvertonePreTrainedModel(PreTrainedModel):
    config_class = OvertoneConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["OvertoneBlock"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["head"]  # scores are taken in float32, of prototypes in float32
    accepts_loss_kwargs = True  # num_items_in_batch, by which the library's trainer divides a loss

    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__(config)
        self.decoder = OvertoneDecoder(config)
        self.head = OvertoneHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Of a model without a checkpoint."""
        super()._init_weights(module)
        if isinstance(module, OvertoneHead):
            nn.init.normal_(module.prototypes, std=module.prototypes.shape[1] ** -0.5)
            for rest in (module.log_exponent, getattr(module, "factor", None)):
                if rest is not None:
                    nn.init.zeros_(rest)

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """None for a tied model: `head.prototypes` embed."""
        return self.decoder.tokens

    def get_output_embeddings(self) -> None:
        """The prototypes are no linear layer."""
        return None

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> list[Tensor]:
        """Those of `OvertoneDecoder.forward`."""
        config, (_, t) = self.config, input_ids.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        real = None
        if attention_mask is not None and not attention_mask.all():
            if attention_mask.dim() != 2 or attention_mask.shape[1] != past + t:
                expected = (len(input_ids), past + t)
                raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}: expected {expected}")
            real = attention_mask.bool()
        if position_ids is None:
            if config.document_mask and past:
                raise ValueError(
                    "a model with document_mask needs position_ids with a cache: each token's place in its document "
                    "(document_places of the whole row)"
                )
            if config.document_mask:
                position_ids = document_places(input_ids, config.eos_token_id, real)
            elif real is None:
                position_ids = torch.arange(past, past + t, device=input_ids.device)[None]
            else:
                position_ids = (real.cumsum(1) - 1).clamp_min(0)[:, past:]
        inputs = input_ids
        if config.tied:
            inputs = F.embedding(input_ids, self.head.prototypes).to(self.decoder.dtype)
        return self.decoder(inputs, position_ids, real, cache)

    def _refuse(self, inputs_embeds: None, output_attentions: bool | None) -> None:
        """What the library's callers name at every call, and what this model does not have."""
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: the model takes token ids alone; give input_ids")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: attention weights are not given out; leave it out")

    def _given_back(self, found: ModelOutput, return_dict: bool | None) -> Any:
        as_named = self.config.return_dict if return_dict is None else return_dict
        return found if as_named else found.to_tuple()


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache by either of its names: past_key_values before transformers 5.24, cache since."""
    if past_key_values is not None and cache is not None:
        raise TypeError("past_key_values and cache are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def document_places(tokens: Tensor, eos_id: int, real: Tensor | None = None) -> Tensor:
    """(B, T) tokens -> (B, T) places in their documents, each opened by an end of text, or by the row's first token
    that is no padding (`real`).
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    opens = tokens == eos_id
    if real is not None:
        opens = opens | (real.cumsum(1) == 1) & real
    return place - torch.where(opens, place, 0).cummax(1).values


class OvertoneForCausalLM(OvertonePreTrainedModel, GenerationMixin):
    """The logits are scores: -n log d for a distance d, so that softmax(logits) are the model's probabilities.

    With `config.document_mask` a token sees its own document alone. `position_ids` say where documents begin: they are
    0 there. By default an end of text opens the document that follows it.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache: Cache | None = None,
        ignore_index: int = -100,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        **unnamed: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 for padding.
            position_ids: (B, T) places in documents; None: they are counted.
            past_key_values, cache: two names of one argument. The output has the one of the installed transformers.
            labels: (B, T), the inputs themselves (they are moved by one here), or `ignore_index`.
            num_items_in_batch: the loss is a sum divided by it; None: a mean.
            logits_to_keep: so many of the last tokens are scored (0: all), or the indices of those that are.
            inputs_embeds, output_attentions: may be named, but ask for what is not there.
            unnamed: `shift_labels` alone, (B, T) labels that were moved already, which count instead of `labels`; by
                its name here the library's trainer would look for it in every batch.
        """
        shift_labels = unnamed.pop("shift_labels", None)
        if unnamed:
            raise TypeError(f"{', '.join(unnamed)}: not known to an Overtone model; leave it out")
        self._refuse(inputs_embeds, output_attentions)
        cache = one_cache(past_key_values, cache)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[-1][:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
            )
        told = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        named: dict[str, Any] = {CACHE: cache if use_cache else None, "hidden_states": tuple(hidden) if told else None}
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
        return self._given_back(found, return_dict)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """That of the library, which takes the cache by either name."""
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        drafts = getattr(kwargs.get("generation_config"), "is_assistant", False)  # whose positions the library counted
        if self.config.document_mask and kwargs.get("position_ids") is not None and not drafts:
            raise ValueError("position_ids: a model with document_mask counts them from ends of text; leave them out")
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # of the types of some versions

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        if self.config.document_mask:  # a step is given its last tokens alone, which cannot tell
            mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
            if cache is not None and input_ids.shape[1] <= int(cache.get_seq_length()):
                raise ValueError("prefill_chunk_size: a model with document_mask needs the whole row; leave it out")
            real = None if mask is None or mask.dim() != 2 else mask.bool()
            kwargs["position_ids"] = document_places(input_ids, self.config.eos_token_id, real)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs.pop("cache_position", None)  # of early versions; the cache tells it
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **told: Any) -> Tensor | None:
        """For a static cache too, `OvertoneDecoder` makes the mask."""
        if unknown := [name for name, value in told.items() if name not in MASK_ARGUMENTS and value is not None]:
            raise TypeError(f"{', '.join(unknown)}: masks of Overtone's models do not know it")
        return attention_mask


class OvertoneForMaskedLM(OvertonePreTrainedModel):
    """A token sees all of its row; softmax(logits) at a masked token are the probabilities of what it hides."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        ignore_index: int = -100,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding.
            labels: (B, T), `ignore_index` where no token is hidden.
            num_items_in_batch: the loss is a sum divided by it; None: a mean.
            inputs_embeds, output_attentions: may be named, but ask for what is not there.
        """
        self._refuse(inputs_embeds, output_attentions)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, None)
        logits = self.head(hidden[-1])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
            )
        told = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        named: dict[str, Any] = {"hidden_states": tuple(hidden) if told else None}
        found = MaskedLMOutput(loss=loss, logits=logits, **named)
        return self._given_back(found, return_dict)
