"""The operations of eager.py in C++ for CPUs with AVX512 (cpu.cpp): bfloat16 operands with float32 sums and results, and float32.

Compiled at first use with torch's own tooling, once per source, CPU kind and torch version. Scores are kept with the
tokens along the vector lanes: an (M, V) tensor here is the transpose of (V, M) memory. Products of float32 are torch's own.

Numerics: exp and log are within 1 ulp, sums over the prototypes join float64 after 16 (gradients: 256) terms, and bfloat16
subnormals (below 2^-126) count as zero in products and in the rounded G. The order of every sum depends on
the shapes alone, so results do not depend on the number of threads (in bfloat16; in float32 torch's products decide).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from model.kernels import eager

SOURCE = Path(__file__).with_name("cpu.cpp")
LANES = 16  # float32 lanes of a vector register: rows of scores start on a multiple
FLAGS = ("-O3", "-fopenmp", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
HUGE = 4 * 2**20  # tensors of so many bytes are worth huge pages


class Unavailable(RuntimeError):
    """These kernels cannot serve this machine or dtype; the message says why, and what would help."""


@functools.cache
def require(dtype: torch.dtype) -> None:
    """Builds and loads the kernels, or raises `Unavailable` where they cannot serve tensors of `dtype`."""
    has = torch.cpu.get_capabilities()
    if not all(has.get(name, False) for name in ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")):
        raise Unavailable("this CPU has no AVX512; nothing is wrong, but a CPU with AVX512 would be faster")
    if dtype == torch.bfloat16 and not has.get("avx512_bf16", False):
        raise Unavailable("this CPU has no AVX512_BF16; compute in float32, or on a CPU with AVX512_BF16, to be faster")
    _load()


@functools.cache
def _load() -> None:
    from torch.utils import cpp_extension  # takes a while: only where it is needed

    flags = [*FLAGS, *(["-mavx512bf16"] if torch.cpu.get_capabilities().get("avx512_bf16", False) else [])]
    facts = f"{SOURCE.read_text()} {flags} {torch.__version__} {torch.compiled_with_cxx11_abi()}"
    name = f"overtone_cpu_{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    try:
        with _alone(folder):
            cpp_extension.load(
                name,
                [str(SOURCE)],
                extra_cflags=flags,
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "install g++ (12 or newer) and ninja, and let TORCH_EXTENSIONS_DIR name a folder that can be written"
        raise Unavailable(f"building {SOURCE.name} failed ({reason}); {remedy}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time builds in `folder`. The system frees this lock when its holder dies; cpp_extension's own, a
    mere file, would make every later process wait for ever, so one that is left over is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "builder", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            os.remove(folder / "lock")
        yield


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, large ones in huge pages: at 4 KiB each, touching the memory costs more than a pass over it."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.nbytes >= HUGE:
        torch.ops.overtone_cpu.advise_huge_pages(out)
    return out


class Rows:
    """The prototypes of one call (V, D), and the memory of one chunk's scores: `products` writes over the chunk before."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.contiguous()
        self.squares = torch.ops.overtone_cpu.square_norms(self.rows)  # (V,)
        self._scores = self.squares[:0]

    def scores(self, tokens: int) -> Tensor:
        """(V, M) for M tokens, uninitialised."""
        stride = -(-tokens // LANES) * LANES
        size = self.rows.shape[0] * stride
        if self._scores.numel() < size:
            self._scores = empty((size,), torch.float32, self.rows.device)
        return self._scores[:size].view(-1, stride)[:, :tokens]


def products(x: Tensor, rows: Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype; valid until the next call with these rows."""
    scores = rows.scores(x.shape[0])
    if x.dtype == torch.float32:
        torch.mm(rows.rows, x.t(), out=scores)
    else:
        torch.ops.overtone_cpu.multiply(rows.rows, x.contiguous(), True, scores, False)
    return scores.t()


def hidden_product(grads: Tensor, rows: Rows) -> Tensor:
    """(M, V) -> (M, D): grads @ rows."""
    if grads.dtype == torch.float32:
        return grads @ rows.rows
    out = torch.empty(grads.shape[0], rows.rows.shape[1], dtype=torch.float32)
    torch.ops.overtone_cpu.multiply_transposed(_columns(grads), rows.rows, out)
    return out


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor) -> None:
    """total (V, D) += grads.T @ x, for grads (M, V) and x (M, D)."""
    if grads.dtype == torch.float32:
        total.addmm_(grads.t(), x)
    else:
        torch.ops.overtone_cpu.multiply(_columns(grads), x.contiguous(), False, total, True)


def finish_rows(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """total (V, D) = 2 (columns (V,) * rows (V, D) - total), in place and in one pass."""
    torch.ops.overtone_cpu.finish_rows(total, rows, columns)


def _columns(tokens_first: Tensor) -> Tensor:
    """(M, V) -> (V, M) with the tokens side by side: the same memory where it came from `products`."""
    columns = tokens_first.t()
    return columns if columns.stride(1) == 1 else columns.contiguous()


def quadratic_statistics(
    dots: Tensor, x_squares: Tensor, rows: Rows, floor: Tensor, coefficient: Tensor, local: Tensor, target_q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As eager.quadratic_statistics."""
    columns = _columns(dots)
    sums = torch.ops.overtone_cpu.quadratic_statistics(
        columns, x_squares, rows.squares, floor, float(coefficient), local, target_q
    )
    if columns.data_ptr() != dots.data_ptr():
        dots.copy_(columns.t())
    return sums


def dot_statistics(dots: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As eager.dot_statistics."""
    return torch.ops.overtone_cpu.dot_statistics(_columns(dots), local)


def quadratic_gradient(
    log_q: Tensor, floor: Tensor, coefficient: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As eager.quadratic_gradient; G lies in the memory of `log_q`."""
    columns = _columns(log_q)
    log_floor = floor.log() + eager.FLOOR_MARGIN
    over_rows, over_columns = torch.ops.overtone_cpu.quadratic_gradient(
        columns, log_floor, float(coefficient), lse, -coefficient * weight, local, dtype == torch.bfloat16
    )
    return _gradients(columns, dtype), over_rows, over_columns


def dot_gradient(scores: Tensor, lse: Tensor, weight: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """As eager.dot_gradient; G lies in the memory of `scores`."""
    columns = _columns(scores)
    torch.ops.overtone_cpu.dot_gradient(columns, lse, weight, local, dtype == torch.bfloat16)
    return _gradients(columns, dtype)


def _gradients(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The G (M, V) that a gradient kernel left at the start of each row of (V, M)."""
    return columns.view(dtype)[:, : columns.shape[1]].t()
