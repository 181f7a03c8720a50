"""Self-attention by whichever kernel serves: flash-attn, torch's flex attention or its scaled_dot_product_attention;
for short sequences on CPUs, a materialised form of it.

Legend: B sequences, T positions, S positions of keys, D width, H heads of queries and K of keys, of width d.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

if TYPE_CHECKING:  # a config is pydantic's, which attention does without
    from .config import DecoderConfig, Rope

log = logging.getLogger(__name__)

Backend = Literal["flash", "flex", "sdpa"]

SHORT = 256  # positions up to which (T, T) scores in float32 beat torch's CPU kernel, whose small products are slow
NARROWEST_FLEX = 16  # entries of a head: the kernels of torch's flex attention serve none narrower
FLASH = (  # version, module, and the major compute capabilities that it serves; the first that fits is taken
    (3, "flash_attn_interface", (9,)),
    (4, "flash_attn.cute", (9, 10)),
    (2, "flash_attn", (8, 9, 10, 12)),
)


@dataclass(frozen=True)
class FlashAttention:
    """What an installed flash-attn offers. q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d); in `documents` the
    first two dimensions are one, cut by bounds.
    """

    version: int
    whole: Callable[..., Any]
    documents: Callable[..., Any]

    @cached_property
    def takes(self) -> frozenset[str]:
        """Names of the arguments of `documents`, which has all those of `whole` that are used here."""
        return frozenset(inspect.signature(self.documents).parameters)

    def serves(self, config: DecoderConfig, capability: int, deterministic: bool) -> bool:
        """Whether it has kernels for a decoder's attention, both passes."""
        width = config.head_size()
        if self.version == 2:
            wide = width <= 256
        elif self.version == 4 and capability == 10:
            wide = width % 8 == 0 and (width <= 128 or width == 256)
        else:
            wide = width % 8 == 0 and width <= 256
        noisy = config.dropout and "dropout_p" not in self.takes
        return wide and not noisy and (not deterministic or "deterministic" in self.takes)


@cache
def flash_attention(capability: int) -> FlashAttention | None:
    """The installed flash-attn for GPUs of this major compute capability."""
    for version, name, served in FLASH:
        if capability in served:
            try:
                module = import_module(name)
                return FlashAttention(version, module.flash_attn_func, module.flash_attn_varlen_func)
            except (ModuleNotFoundError, AttributeError):
                continue  # not installed; a folder flash_attn without the functions is version 4 alone
            except Exception as error:  # it is compiled for, or leans on, another version of something
                log.warning("flash-attn %d is installed and cannot be imported: %r", version, error)
    return None


@cache
def choose_backend(
    config: DecoderConfig, device: str, capability: int, half: bool, deterministic: bool = False
) -> Backend:
    """The kernel for a decoder's attention on a device: the one that `config.attention` asks for where it can serve,
    else the best. Logs it once.

    torch's kernels follow torch.use_deterministic_algorithms by themselves (flex attention adds in a fixed order
    anyway: where each gradient is summed up by one program); flash-attn is asked where it can be.
    """
    flash = flash_attention(capability) if device == "cuda" and half else None
    serving: list[Backend] = ["sdpa"]
    # Flex attention has no dropout, and no backward pass on CPUs.
    if device == "cuda" and not config.dropout and config.head_size() >= NARROWEST_FLEX:
        serving.insert(0 if config.document_mask or config.window is not None else 1, "flex")
    if flash is not None and flash.serves(config, capability, deterministic):
        serving.insert(0, "flash")
    chosen = serving[0] if config.attention == "auto" else config.attention
    if chosen not in serving:
        why = _circumstances(config, half, deterministic)
        log.warning("attention=%s cannot serve on this %s with %s", chosen, device, why)
        chosen = serving[0]
    names = {"flash": f"flash-attn {flash.version if flash else ''}", "flex": "torch's flex attention"}
    log.info("attention on %s: %s", device, names.get(chosen, "torch's scaled_dot_product_attention"))
    return chosen


def _circumstances(config: DecoderConfig, half: bool, deterministic: bool) -> str:
    dropout = f"dropout {config.dropout}" if config.dropout else "no dropout"
    dropout += ", deterministic" if deterministic else ""
    bits = "bf16" if half else "more than 16 bits"
    return f"{bits}, heads {config.head_size()} wide, {dropout} and what is installed; going on without it"


@dataclass(frozen=True)
class Pattern:
    """What all blocks share in a pass: the kernel, which keys a query sees, and how far heads are turned."""

    backend: Backend
    causal: bool  # with no mask: a query sees the keys up to its own place
    window: int | None = None  # flash: the kernel's own
    mask: Tensor | BlockMask | None = None  # sdpa: (1 or B, 1, T, S), true where a query sees a key; flex: its form
    bounds: Tensor | None = None  # flash: (documents + 1,) int32, where documents begin in B * T places, and the end
    turns: tuple[Tensor, Tensor] | None = None  # cosines and sines, (T, 1, d/2) or (B, T, 1, d/2)


class Memory:
    """The keys and values of one block for the tokens read so far: a row of the KV cache, with room for S."""

    def __init__(self, config: DecoderConfig, batch: int, room: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, room, config.key_heads(), config.head_size())
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, K, d) new ones -> (B, S, K, d), all of them."""
        first, self.length = self.length, self.length + k.shape[1]
        self.keys[:, first : self.length], self.values[:, first : self.length] = k, v
        return self.keys[:, : self.length], self.values[:, : self.length]


def pattern_of(
    config: DecoderConfig, x: Tensor, positions: Tensor | None, past: int, documents: int | None = None
) -> Pattern:
    """The pattern of a pass over embedded tokens.

    Args:
        x: (B, T, D).
        positions: (B, T) of each token in its document, 0 where one begins; None: each row is one document.
        past: tokens that were read before, with a KV cache.
        documents: how many there are, or more; None: they are counted where they are, and a GPU is waited for.
    """
    _, t, _ = x.shape
    turns = None
    if not isinstance(config.positions, str):
        places = torch.arange(past, past + t, device=x.device) if positions is None else positions
        turns = rotations(config.positions, config.head_size(), places)
    if past:
        place = torch.arange(past + t, device=x.device)
        everything = t == 1 and (config.window is None or config.window > past)
        seen = None if everything else _visible(config, place[past:, None], place, _reach(config, x.device))[None, None]
        return Pattern("sdpa", causal=False, mask=seen, turns=turns)
    gpu = x.device.type == "cuda"
    half = x.dtype in (torch.bfloat16, torch.float16) or (gpu and torch.is_autocast_enabled("cuda"))
    capability = torch.cuda.get_device_capability(x.device)[0] if gpu else 0
    backend = choose_backend(config, x.device.type, capability, half, torch.are_deterministic_algorithms_enabled())
    if backend == "flash":
        return Pattern(backend, config.causal, config.window, bounds=_bounds(positions, documents), turns=turns)
    document = None if positions is None else (positions == 0).cumsum(1)  # (B, T) numbers
    if backend == "flex":
        return Pattern(backend, config.causal, mask=_block_mask(config, document, t, x.device), turns=turns)
    if document is None and (config.window is None or config.window >= t):
        return Pattern(backend, config.causal, turns=turns)
    place = torch.arange(t, device=x.device)
    seen = _visible(config, place[:, None], place, _reach(config, x.device))[None, None]
    if document is not None:
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    return Pattern(backend, config.causal, mask=seen, turns=turns)


def _visible(config: DecoderConfig, query: Tensor, key: Tensor, reach: Tensor) -> Tensor:
    """Whether the token at place `query` of a row sees the one at `key`, documents aside; `reach` as `_reach` gives."""
    apart = query - key
    return (apart < reach) & (apart > (-1 if config.causal else -reach))


def _reach(config: DecoderConfig, device: torch.device) -> Tensor:
    """How far a token sees, 0-d. A number would be compiled into flex attention's kernel, and another one in the same
    process makes torch 2.11 take both for a shape, which fails.
    """
    return torch.tensor(config.window or config.seq_len, device=device)


def _bounds(positions: Tensor | None, documents: int | None) -> Tensor | None:
    """(documents + 1,) as in `Pattern`; documents beyond those that are there are empty ones, at the end.

    Its size has to be known here: nonzero() would have the host wait for the device in every pass, and room for as
    many documents as there are tokens would cost the kernels tens of GB.
    """
    if positions is None:
        return None
    begun = (positions.reshape(-1) == 0).cumsum(0)  # so many documents, up to each place and with it
    if documents is None:
        documents = int(begun[-1])
    number = torch.arange(1, documents + 2, device=positions.device)
    return torch.searchsorted(begun, number, out_int32=True)  # where each begins; past the last one: the end


def _block_mask(config: DecoderConfig, document: Tensor | None, t: int, device: torch.device) -> BlockMask:
    if document is None:
        return _block_mask_of_rows(config, t, device)

    reach = _reach(config, device)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _visible(config, query, key, reach) & (document[row, query] == document[row, key])

    return _compiled(create_block_mask, device)(sees, len(document), None, t, t, device=device)


@lru_cache(maxsize=8)
def _block_mask_of_rows(config: DecoderConfig, t: int, device: torch.device) -> BlockMask:
    reach = _reach(config, device)
    return create_block_mask(
        lambda _, __, query, key: _visible(config, query, key, reach), None, None, t, t, device=device
    )


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Flex attention fuses only when compiled; elsewhere than on a GPU it is a reference."""
    return _compile_once(function) if device.type == "cuda" and not torch.compiler.is_compiling() else function


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def rotations(rope: Rope, width: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the turns of a head `width` wide, (..., 1, width / 2) float32 each, at positions (...)."""
    rates = rope.theta ** (torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / -width)
    if not isinstance(rope.scaling, int | float):
        rounds = rope.scaling.original * rates / (2 * math.pi)  # within the positions of the first training
        kept = ((rounds - rope.scaling.low) / (rope.scaling.high - rope.scaling.low)).clamp(0, 1)
        rates = rates * (kept + (1 - kept) / rope.scaling.factor)
    else:
        rates = rates / rope.scaling
    angles = positions[..., None, None] * rates
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(B, T, heads, d), in float32 at least, back in the dtype of x."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1).to(x.dtype)


def make_norm(config: DecoderConfig, width: int) -> nn.Module:
    """The norm of rows (..., width) that the config asks for."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


class SelfAttention(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_size = config.heads, config.key_heads(), config.head_size()
        self.dropout, self.short = config.dropout, SHORT
        self.qkv = nn.Linear(config.dim, config.qkv_width(), bias=config.has_qkv_bias())
        self.projection = nn.Linear(self.heads * self.head_size, config.dim, bias=config.bias)
        self.query_norm = make_norm(config, self.head_size) if config.qk_norm else None
        self.key_norm = make_norm(config, self.head_size) if config.qk_norm else None

    def forward(self, x: Tensor, pattern: Pattern, memory: Memory | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); with `memory` the keys are those that it holds and these, which it takes in."""
        b, t, _ = x.shape
        qkv = self.qkv(x).view(b, t, -1, self.head_size)
        dropout = self.dropout if self.training else 0.0
        if self._is_short(qkv, pattern, dropout) and memory is None:
            return self.projection(_ShortAttention.apply(qkv.view(b, t, 3, self.heads, self.head_size)))
        q, k, v = qkv.split((self.heads, self.key_heads, self.key_heads), 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if pattern.turns is not None:
            q, k = rotated(q, *pattern.turns), rotated(k, *pattern.turns)
        if memory is not None:
            k, v = memory.extend(k, v)
        return self.projection(attend(q, k, v, pattern, dropout).reshape(b, t, -1))

    def _is_short(self, qkv: Tensor, pattern: Pattern, dropout: float) -> bool:
        plain = pattern.backend == "sdpa" and pattern.causal and pattern.mask is None and pattern.turns is None
        plain = plain and not dropout and self.query_norm is None and self.heads == self.key_heads
        return plain and qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[1] <= self.short


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
    """q (B, T, H, d), k and v (B, S, K, d) -> (B, T, H, d), scores times 1/sqrt(d)."""
    if pattern.backend == "flash":
        return _flash(q, k, v, pattern, dropout)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if isinstance(pattern.mask, BlockMask):
        options: Any = {"BACKEND": "TRITON"}  # else rows of fewer than 128 get a kernel for decoding, with gaps
        y = _compiled(flex_attention, q.device)(
            q, k, v, block_mask=pattern.mask, enable_gqa=grouped, kernel_options=options
        )
    else:
        causal = pattern.causal and pattern.mask is None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=pattern.mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
        )
    return y.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float) -> Tensor:
    flash = flash_attention(torch.cuda.get_device_capability(q.device)[0])
    assert flash is not None, "the pattern was made with it"
    options: dict[str, Any] = {"causal": pattern.causal}
    if pattern.window is not None:
        options["window_size"] = (pattern.window - 1, 0 if pattern.causal else pattern.window - 1)
    if dropout:
        options["dropout_p"] = dropout
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if pattern.bounds is None:
        y = flash.whole(q, k, v, **options)
    else:
        longest = {"max_seqlen_q": q.shape[1], "max_seqlen_k": q.shape[1]}  # rows end documents; not every version asks
        options |= {name: value for name, value in longest.items() if name in flash.takes}
        bounds = {"cu_seqlens_q": pattern.bounds, "cu_seqlens_k": pattern.bounds}
        y = flash.documents(*(heads.flatten(0, 1) for heads in (q, k, v)), **bounds, **options)
    y = y[0] if isinstance(y, tuple) else y  # some versions add the log-sum-exp
    return y.view_as(q)


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
        # through the softmax: p (dp - sum_k p_k dp_k), and that sum is grad . mixed, without another (T, T) pass
        scores = scores.sub_((wide * mixed).sum(-1, keepdim=True)).mul_(weights).mul_(d**-0.5).to(grad.dtype)
        out = torch.empty_like(heads)
        torch.bmm(scores, k, out=out[0])
        torch.bmm(scores.transpose(1, 2), q, out=out[1])
        torch.bmm(weights.transpose(1, 2), grad, out=out[2])
        return out.view(3, b, h, t, d).permute(1, 3, 0, 2, 4).reshape(ctx.shape)
