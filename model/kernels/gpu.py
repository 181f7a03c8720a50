"""The operations of eager.py for GPUs: Triton for passes over scores and for contractions entry by entry, cuBLAS for
products; operands in bfloat16 or float32. Nothing waits for the device, and the current stream is used.

Products and the passes over their scores come in two designs: apart (cuBLAS makes float32 scores, Triton's passes read
them), or fused (triton_fused.py: bfloat16, Hopper). FUSED says which one is taken where nobody asks.

Numerics: sums are float32 in a fixed order, so the same inputs give the same bits; logarithms and exponentials are
the hardware's (triton_functions.py has their errors). Scores, their gradients and the prototypes have rows that start
on lines of 128 bytes and go on to whole ones, as cuBLAS' fast paths and loads of 16 bytes ask for, whatever the size
of the vocabulary.

Legend: M tokens of a chunk, V prototypes on this rank, D width.
"""

from __future__ import annotations

import functools
import math
import subprocess

import torch
import triton
from torch import Tensor

from . import eager, triton_elementwise, triton_fused, triton_rows, triton_scores
from .eager import Given, Scored, SummedGradient, Sums, Upstream
from .triton_scores import ROW_START, padded_rows

OLDEST = (8, 0)  # compute capability: Ampere's, the first with bfloat16 and a maximum that passes NaN on
FUSED = False  # the fused design has not been timed on a GPU yet; `python -m benchmarks.gpu` times both in one run
FUSED_CAPABILITY = (9, 0)  # Hopper's: tiles are loaded and stored by its own units
BLOCK = (128, 256)  # tokens and entries (or prototypes) of a block of cuBLAS' products on Hopper
TRANSFORMED_ENTRIES = 2**23  # of prototypes that a general transform takes at a time: 32 MiB of float32, several times
TEMPORARIES = 0


class Unavailable(RuntimeError):
    """These kernels cannot serve this device; the message says why, and what would help."""


def require(device: torch.device) -> None:
    """Builds and runs a small kernel, or raises `Unavailable` where that fails; a lack of memory says nothing of the
    kernels, and is passed on.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise Unavailable(f"compute capability {capability[0]}.{capability[1]}; 8.0 or newer would be faster")
    try:
        statistics(torch.zeros(1, 1, device=device), Given(torch.zeros(1, dtype=torch.int64, device=device)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, subprocess.SubprocessError, triton.TritonError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"Triton could not build a kernel ({reason}); it needs gcc and Python's headers") from error


def fused_unavailable(x: Tensor) -> str | None:
    """Why the fused design cannot serve tokens (M, D) like these; None if it can."""
    if x.dtype != torch.bfloat16:
        return f"the fused kernels take bfloat16, and these are {x.dtype}"
    if not triton_fused.serves(x):
        return f"the fused kernels take widths that are a multiple of 8, and this is {x.shape[1]}"
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        if capability[0] != FUSED_CAPABILITY[0]:
            return f"the fused kernels are Hopper's, and this GPU is {capability[0]}.{capability[1]}"
    return None


class Rows(eager.Rows):
    """The prototypes of one call, and their transpose for contractions entry by entry, made when one asks for it. Their
    memory goes on to whole lines of prototypes, which are zeros.
    """

    def __init__(self, rows: Tensor, chunks: int = 1, squares: Tensor | None = None) -> None:
        super().__init__(rows, chunks, square_norms(rows) if squares is None else squares)

    @functools.cached_property
    def columns(self) -> Tensor:
        """(D, V), both padded to whole tiles with zeros."""
        return triton_elementwise.columns(self.rows)

    @property
    def whole(self) -> Tensor:
        """(V, D) with the padding."""
        return _whole(self.rows)

    def gradient(self) -> Tensor:
        """As eager.Rows.gradient, padded as the rows are."""
        return empty(self.rows.shape, torch.float32, self.rows.device)


class Tokens(eager.Tokens):
    """The tokens of one chunk; see eager.Tokens."""

    def __init__(self, rows: Tensor, squares: Tensor | None = None) -> None:
        super().__init__(rows, square_norms(rows) if squares is None else squares)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(V, D) for what is as large as the prototypes, uninitialised; the memory goes on to whole lines, which are
    zeros.
    """
    v, d = shape
    out = torch.empty(triton.cdiv(v, ROW_START) * ROW_START, d, dtype=dtype, device=device)
    out[v:].zero_()
    return out[:v]


def _whole(rows: Tensor) -> Tensor:
    """(V, D) as `empty` makes them, with the padding."""
    whole, (v, d) = rows._base, rows.shape  # what `empty` gives is a view of the padded memory
    return rows if whole is None or whole.shape != (triton.cdiv(v, ROW_START) * ROW_START, d) else whole


def rows_at_a_time(width: int, fused: bool) -> int:
    """As eager.rows_at_a_time: many, so that launches are few."""
    return 2**31 if fused else max(1024, TRANSFORMED_ENTRIES // max(1, width))


def tokens_per_wave(width: int, processors: int) -> int:
    """A chunk of a multiple of so many tokens gives every multiprocessor as many blocks of the product G w."""
    return BLOCK[0] * processors // math.gcd(processors, triton.cdiv(width, BLOCK[1]))


def square_norms(rows: Tensor) -> Tensor:
    """As eager.square_norms."""
    rows = rows.contiguous()
    squares = _row_squares(rows.shape[0], rows.device)
    triton_rows.prepare(rows, None, False, rows, squares)
    return squares


def _row_squares(rows: int, device: torch.device) -> Tensor:
    """(V,), uninitialised, with padding for reads beyond: of rows so far away that they add nothing."""
    out = torch.empty(triton.cdiv(rows, ROW_START) * ROW_START, dtype=torch.float32, device=device)
    out[rows:].fill_(triton_fused.BEHIND.value)
    return out[:rows]


def prepare(rows: Tensor, scale: Tensor | None, unit: bool, out: Tensor) -> Tensor:
    """As eager.prepare."""
    squares = _row_squares(rows.shape[0], rows.device)
    triton_rows.prepare(rows.contiguous(), scale, unit, out, squares)
    return squares


finish = triton_rows.finish
product = eager.product
unit_rows = eager.unit_rows
unit_rows_gradient = eager.unit_rows_gradient
to_targets = triton_rows.to_targets


def products(x: Tensor, rows: Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype, in float32, in padded rows."""
    out = padded_rows(x.shape[0], rows.rows.shape[0], torch.float32, x.device)
    right = rows.whole.t()  # with the padding: cuBLAS' fast paths ask for rows of whole lines on both sides
    if x.dtype == torch.float32:
        torch.mm(x, right, out=_across(out, right.shape[1]))
    else:
        torch.ops.aten.mm.dtype_out(x, right, torch.float32, out=_across(out, right.shape[1]))
    return out


def hidden_product(grads: Tensor, rows: Rows) -> Tensor:
    """(M, V) -> (M, D): grads @ rows; the padding of both, if grads have any, is zeros."""
    whole = rows.whole
    if grads.stride(0) % ROW_START == 0:
        return product(_across(grads, whole.shape[0]), whole)
    return product(grads, rows.rows)


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor, first: bool = False) -> None:
    """As eager.add_rows_product, without a temporary."""
    wide = _whole(total)  # the padding of G is zeros, so that of the sums stays zeros
    left = (_across(grads, wide.shape[0]) if grads.stride(0) % ROW_START == 0 else grads).t()
    wide = wide if left.shape[0] == wide.shape[0] else total
    if x.dtype == torch.float32:
        torch.mm(left, x, out=wide) if first else wide.addmm_(left, x)
    elif first:  # uninitialised memory is written over, not added to: it may hold NaN
        torch.ops.aten.mm.dtype_out(left, x, torch.float32, out=wide)
    else:
        torch.ops.aten.addmm.dtype_out(wide, left, x, torch.float32, out=wide)


def _across(values: Tensor, columns: int) -> Tensor:
    """(M, V) -> (M, columns) in the same memory: with the padding of its rows, if `columns` counts it."""
    return values.as_strided((values.shape[0], columns), values.stride())


statistics = triton_scores.statistics  # of q the dot products are kept, so nothing is written: q is made again


def scores(kept: Tensor, given: Given) -> Tensor:
    """As eager.scores, in plain PyTorch: only evaluation asks for it."""
    if given.squares is None:
        return eager.scores(kept, given)
    made = kept.clone()
    eager.statistics(made, given)
    return eager.scores(made, given)


def gradients(kept: Tensor, given: Given, loss: Upstream, dtype: torch.dtype) -> SummedGradient:
    """As eager.gradients; G in float32 lies in the memory of `kept`."""
    out = kept if kept.dtype == dtype else padded_rows(kept.shape[0], kept.shape[1], dtype, kept.device)
    return out, *triton_scores.gradients(kept, given, loss, out)


def fused_statistics(
    x: Tokens, rows: Rows, given: Given, target: Tensor, keep: bool, moment: bool
) -> tuple[Sums, Scored | None]:
    """As eager.fused_statistics."""
    return triton_fused.scores(x.rows, rows.rows, given, target, keep, moment)


def fused_gradient(scored: Scored, given: Given, loss: Upstream) -> SummedGradient:
    """As eager.fused_gradient; E becomes G in place."""
    return scored.kept, *triton_fused.gradients(scored, given, loss)


def contract(terms: eager.Terms, x: Tensor, rows: Rows) -> Tensor:
    """As eager.contract, for float32."""
    return triton_elementwise.contract(terms, x, rows.columns, rows.rows.shape[0])


def copy(values: Tensor) -> Tensor:
    """As eager.copy."""
    return padded_rows(values.shape[0], values.shape[1], values.dtype, values.device).copy_(values)


def contract_gradient(
    terms: eager.Terms, x: Tensor, rows: Rows, values: Tensor, grads: Tensor, total: Tensor
) -> Tensor:
    """As eager.contract_gradient, for float32; the slope of lp is 0 where c < 2^-120."""
    x, w = x.contiguous(), rows.rows.contiguous()
    if terms.kind == "linf":  # counting who ties takes a pass of its own: both sides then read shares
        grads = triton_elementwise.shares(terms, x, rows.columns, values, grads)
    out = torch.zeros_like(x)
    # a pass for each side, though both need the same slopes: one for both would need atomics, whose order varies
    triton_elementwise.add_gradient(terms, x, w, values, grads, out)
    triton_elementwise.add_gradient(terms, w, x, values.t(), grads.t(), total)
    return out
