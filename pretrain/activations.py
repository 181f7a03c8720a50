"""What a decoder's forward pass keeps on a GPU and its backward pass needs on top, in bytes: traced through the real
modules on the meta device, which allocates nothing. Kernels of GPUs that keep less than torch's general ones stand in.

Legend: B sequences, T positions, D width, L blocks, H heads of queries, of width d.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import attention, decoder

if TYPE_CHECKING:
    from model.config import DecoderConfig


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still there: `now`, and `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.most = 0

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage from here until it is freed, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.add(tensor)
        return out


# The stand-ins below make tensors of the right sizes, and finite numbers of no meaning.


def _made(x: Tensor) -> Tensor:
    """A tensor like another one, without gaps."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)


class _Attention(torch.autograd.Function):
    """As flash kernels: q, k, v, what is mixed, and the log-sum-exp of each head (B, H, T) in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = q.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, mixed, _made(q[..., 0].float()))
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(_made(x) for x in ctx.saved_tensors[:3])


class _RmsNorm(torch.autograd.Function):
    """As torch's fused kernel: the input, and the deviation of each row in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, _made(x[..., 0].float()))
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clone(memory_format=torch.contiguous_format), _made(ctx.saved_tensors[1])


class _Dropout(torch.autograd.Function):
    """As torch's fused kernel: a byte for each entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros(x.shape, dtype=torch.bool, device=x.device))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clone()


class _Head(torch.autograd.Function):
    """Keeps the hidden states until their gradient is there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Decoders keep, wherever they are, what they would keep on a GPU; what they compute has no meaning."""

    def pattern(config: DecoderConfig, x: Tensor, positions: Tensor | None, *_: Any) -> attention.Pattern:
        turns = None
        if not isinstance(config.positions, str):
            places = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            turns = attention.rotations(config.positions, config.head_size(), places)
        return attention.Pattern("flash", config.causal, turns=turns)

    def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        return _Dropout.apply(x) if p and training else x

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _RmsNorm.apply(x, weight)

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (decoder, "pattern_of", pattern),
            (attention, "attend", lambda q, k, v, *_: _Attention.apply(q, k, v)),
            (F, "dropout", dropout),
            (F, "rms_norm", rms_norm),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


@dataclass(frozen=True)
class Traced:
    """Bytes of the whole decoder's passes, without its weights, their gradients and the table of tokens."""

    kept: int  # at the end of the forward pass, hidden states included
    fullest: int  # at the fullest moment of the backward pass, what is kept until then included


def traced(config: DecoderConfig, sequences: int, width: int) -> Traced:
    """Of passes over whole sequences.

    Args:
        width: bytes of the compute dtype.
    """
    kind = config.model_copy(update={"layers": 1, "tied": True, "compile": False, "vocab_size": 1})
    one, two, twice = (_trace(kind, layers, b, width) for layers, b in ((1, 1), (2, 1), (1, 2)))
    blocks = (config.layers - 1) * sequences * (two.kept - one.kept)
    return Traced(
        one.kept + (sequences - 1) * (twice.kept - one.kept) + blocks,
        one.fullest + (sequences - 1) * (twice.fullest - one.fullest) + blocks,
    )


@lru_cache(maxsize=256)
def _trace(kind: DecoderConfig, layers: int, sequences: int, width: int) -> Traced:
    dtype = torch.bfloat16 if width == 2 else torch.float32
    with torch.device("meta"):
        module = decoder.Decoder(kind.model_copy(update={"layers": layers}), hidden_length=1.0).to(dtype).train()
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    with kernels_of_a_gpu(), Alive() as alive:
        embedded = torch.empty(sequences, kind.seq_len, kind.dim, dtype=dtype, device="meta")
        # the lookup's result, whose own gradient is the table's
        embedded = _Head.apply(torch.empty((), device="meta", requires_grad=True)).to(dtype) + embedded
        positions = torch.empty(sequences, kind.seq_len, dtype=torch.long, device="meta")
        loss = _Head.apply(module(embedded, positions if kind.document_mask else None))
        del embedded, positions
        kept = alive.now
        alive.most = 0
        loss.backward()
    return Traced(kept, alive.most)
