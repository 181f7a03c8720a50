"""The operations of eager.py for GPUs: Triton for passes over scores and for contractions entry by entry, cuBLAS for
products; operands in bfloat16 or float32. Nothing waits for the device, and the current stream is used.

Numerics: sums are float32 in a fixed order, so the same inputs give the same bits; log is within 1 ulp, exp is the
hardware's. Scores and gradients (M, V) that meet cuBLAS have rows that start on a multiple of 16 entries, as its fast
paths ask for, whatever the size of the vocabulary.

Legend: M tokens of a chunk, V prototypes on this rank, D width.
"""

from __future__ import annotations

import functools
import subprocess

import torch
import triton
from torch import Tensor

from model.kernels import eager, triton_elementwise, triton_scores
from model.kernels.triton_scores import Given

ROW_START = 16  # entries
OLDEST = (8, 0)  # compute capability: Ampere's, the first with bfloat16 and a maximum that passes NaN on


class Unavailable(RuntimeError):
    """These kernels cannot serve this device; the message says why, and what would help."""


def require(device: torch.device) -> None:
    """Builds and runs a small kernel, or raises `Unavailable` where that fails."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise Unavailable(f"compute capability {capability[0]}.{capability[1]}; 8.0 or newer would be faster")
    try:
        dot_statistics(torch.zeros(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    except (RuntimeError, OSError, subprocess.SubprocessError, triton.TritonError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"Triton could not build a kernel ({reason}); it needs gcc and Python's headers") from error


class Rows(eager.Rows):
    """The prototypes of one call, and their transpose for contractions entry by entry, made when one asks for it."""

    @functools.cached_property
    def columns(self) -> Tensor:
        return triton_elementwise.columns(self.rows)


empty = eager.empty
product = eager.product
hidden_product = eager.hidden_product
unit_rows = eager.unit_rows
unit_rows_gradient = eager.unit_rows_gradient
finish_rows = eager.finish_rows


def _aligned(m: int, v: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(M, V), uninitialised, every row aligned."""
    return torch.empty(m, -(-v // ROW_START) * ROW_START, dtype=dtype, device=device)[:, :v]


def products(x: Tensor, rows: eager.Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype, in float32."""
    out = _aligned(x.shape[0], rows.rows.shape[0], torch.float32, x.device)
    if x.dtype == torch.float32:
        return torch.mm(x, rows.rows.t(), out=out)
    return torch.ops.aten.mm.dtype_out(x, rows.rows.t(), torch.float32, out=out)


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor) -> None:
    """total (V, D) += grads.T @ x, for grads (M, V) and x (M, D), without a temporary."""
    if x.dtype == torch.float32:
        total.addmm_(grads.t(), x)
    else:
        torch.ops.aten.addmm.dtype_out(total, grads.t(), x, torch.float32, out=total)


def quadratic_statistics(
    dots: Tensor, squares: eager.Squares, coefficient: Tensor, local: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As eager.quadratic_statistics; what is kept is the dot products: log q is made again where it is needed."""
    return triton_scores.statistics("quadratic", dots, Given(local, coefficient, squares.floor, squares))


def quadratic_scores(kept: Tensor, squares: eager.Squares, coefficient: Tensor, local: Tensor) -> Tensor:
    """As eager.quadratic_scores, in plain PyTorch: only evaluation asks for it."""
    log_q = kept.clone()
    eager.quadratic_statistics(log_q, squares, coefficient, local)
    return log_q.mul_(-coefficient)


def quadratic_gradient(
    kept: Tensor,
    squares: eager.Squares,
    coefficient: Tensor,
    lse: Tensor,
    weight: Tensor,
    local: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As eager.quadratic_gradient; G in float32 lies in the memory of `kept`."""
    out = _gradients_of(kept, dtype)
    given = Given(local, coefficient, squares.floor, squares)
    return out, *triton_scores.gradients("quadratic", kept, given, lse, weight, out)


def dot_statistics(dots: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As eager.dot_statistics."""
    return triton_scores.statistics("dot", dots, Given(local))


def dot_gradient(scores: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """As eager.dot_gradient; G in float32 lies in the memory of `scores`."""
    out = _gradients_of(scores, dtype)
    triton_scores.gradients("dot", scores, Given(local), lse, weight, out)
    return out


def log_statistics(
    values: Tensor, floor: Tensor, coefficient: Tensor, local: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As eager.log_statistics."""
    return triton_scores.statistics("log", values, Given(local, coefficient, floor))


def log_gradient(
    logs: Tensor, floor: Tensor, coefficient: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype
) -> Tensor:
    """As eager.log_gradient; G in float32 lies in the memory of `logs`."""
    out = _gradients_of(logs, dtype)
    triton_scores.gradients("log", logs, Given(local, coefficient, floor), lse, weight, out)
    return out


def _gradients_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where G goes: over the values if it is as wide."""
    return values if values.dtype == dtype else _aligned(values.shape[0], values.shape[1], dtype, values.device)


def contract(terms: eager.Terms, x: Tensor, rows: Rows) -> Tensor:
    """As eager.contract, for float32."""
    return triton_elementwise.contract(terms, x, rows.columns, rows.rows.shape[0])


def contract_gradient(
    terms: eager.Terms, x: Tensor, rows: Rows, values: Tensor, grads: Tensor, total: Tensor
) -> Tensor:
    """As eager.contract_gradient, for float32; the slope of lp is 0 where c < 2^-120."""
    x, w = x.contiguous(), rows.rows.contiguous()
    if terms.kind == "linf":
        grads = triton_elementwise.shares(terms, x, rows.columns, values, grads)
    out = torch.zeros_like(x)
    triton_elementwise.add_gradient(terms, x, w, values, grads, out)
    triton_elementwise.add_gradient(terms, w, x, values.t(), grads.t(), total)
    return out
