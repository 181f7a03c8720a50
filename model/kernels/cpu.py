"""The operations of eager.py in C++, for CPUs with AVX512: bfloat16 with float32 sums and results; float32.

Compiled at first use with torch's own tooling, once per source, kind of CPU and torch version. Scores are kept with the
tokens along the vector lanes: an (M, V) tensor is the transpose of (V, M) memory. Products of float32 are torch's own.

Numerics: exp and log are within 1 ulp, sums over the prototypes join float64 after 16 terms, products add up float32
sums of 128 terms (as near to float64 as torch's float32 products are), and bfloat16 subnormals (below 2^-126) count as
zero in products and in the rounded G. The order of every sum depends on the shapes alone: in bfloat16 the same inputs
give the same bits with any number of threads (in float32, torch's products decide).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from . import eager
from .eager import Given, SummedGradient, Sums, Upstream

SOURCES = sorted(Path(__file__).parent.glob("cpu_*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("cpu*.h"))
LANES = 16  # float32 lanes of a vector register: rows of scores start on a multiple
INSTRUCTIONS = ("fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
BFLOAT16 = "avx512_bf16"
BUILT = "built"  # a file beside the library, once it was whole and loaded
HUGE = 4 * 2**20  # tensors of so many bytes are worth huge pages


class Unavailable(RuntimeError):
    """These kernels cannot serve this machine or dtype; the message says why, and what would help."""


def require(dtype: torch.dtype) -> None:
    """Builds and loads the kernels, or raises `Unavailable` where they cannot serve tensors of `dtype`."""
    has = _instructions()
    if not has.issuperset(INSTRUCTIONS):
        raise Unavailable("this CPU has no AVX512; a CPU that has it (AVX512_BF16 for bfloat16) would be faster")
    if dtype == torch.bfloat16 and BFLOAT16 not in has:
        raise Unavailable("this CPU has no AVX512_BF16; float32, or a CPU that has it, would be faster")
    failure = _load()
    if failure:
        raise Unavailable(failure)


def _instructions() -> set[str]:
    """The CPU's instruction sets as Linux names them; none known elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def _flags() -> list[str]:
    # by name, not -march=native: what is built here runs on every CPU that has these instructions
    extensions = [*INSTRUCTIONS, *([BFLOAT16] if BFLOAT16 in _instructions() else [])]
    return ["-O3", "-fopenmp", *(f"-m{name.replace('_', '')}" for name in extensions)]


def build_folder() -> Path:
    """Where this source is built for this kind of CPU and this torch: machines that differ can share a home."""
    from torch.utils.cpp_extension import get_default_build_root  # takes a while: only where it is needed

    code = [file.read_text() for file in (*SOURCES, *HEADERS)]
    facts = f"{code} {_flags()} {torch.__version__}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / f"overtone_cpu_{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


@functools.cache
def _load() -> str | None:
    """Builds and loads the kernels, once; returns what stood in the way, and the remedy."""
    folder = build_folder()
    try:
        with building(folder):
            if (folder / BUILT).exists():  # ninja would build anew for another checkout: its commands hold paths
                torch.ops.load_library(folder / f"{folder.name}.so")
                return None
            from torch.utils import cpp_extension

            cpp_extension.load(
                folder.name,
                [str(source) for source in SOURCES],
                extra_cflags=_flags(),
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
            (folder / BUILT).touch()
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or ["no reason given"]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0])
        remedy = "install g++ 12 or newer and ninja, and let TORCH_EXTENSIONS_DIR name a folder that can be written"
        return f"the kernels could not be built ({reason}); {remedy}"
    return None


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """One process at a time compiles C++ into `folder`, and finds ninja."""
    with _alone(folder), _ninja_found():
        yield


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


@contextmanager
def _ninja_found() -> Iterator[None]:
    """pip puts ninja beside python, where PATH does not lead unless the environment was activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{before}{os.pathsep}{Path(sys.executable).parent}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, large ones in huge pages: at 4 KiB each, touching the memory costs more than a pass over it."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.nbytes >= HUGE:
        torch.ops.overtone_cpu.advise_huge_pages(out)
    return out


class Rows(eager.Rows):
    """The prototypes of one call (V, D), and memory for the scores of the last `chunks` chunks: `products` writes over
    the one before those.
    """

    def __init__(self, rows: Tensor, chunks: int = 1, squares: Tensor | None = None) -> None:
        rows = rows.contiguous()
        super().__init__(rows, chunks, torch.ops.overtone_cpu.square_norms(rows) if squares is None else squares)
        self._scores = [self.squares[:0]] * chunks

    def gradient(self) -> Tensor:
        """As eager.Rows.gradient."""
        return empty(self.rows.shape, torch.float32, self.rows.device)

    def scores(self, tokens: int) -> Tensor:
        """(V, M) for M tokens, uninitialised."""
        stride = -(-tokens // LANES) * LANES
        size = self.rows.shape[0] * stride
        oldest = self._scores.pop(0)
        if oldest.numel() < size:
            oldest = empty((size,), torch.float32, self.rows.device)
        self._scores.append(oldest)
        return oldest[:size].view(-1, stride)[:, :tokens]


def products(x: Tensor, rows: Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype; valid until the next call with these rows."""
    scores = rows.scores(x.shape[0])
    if x.dtype == torch.float32:
        torch.mm(rows.rows, x.t(), out=scores)
    else:
        torch.ops.overtone_cpu.multiply(rows.rows, x.contiguous(), True, scores, False)
    return scores.t()


def product(a: Tensor, b: Tensor) -> Tensor:
    """As eager.product."""
    if a.dtype == torch.float32:
        return a @ b
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if a.stride(1) == 1:  # the kernels read rows without gaps: what lies the other way is given as its transpose
        right, transposed = (b, False) if b.stride(1) == 1 else (b.t().contiguous(), True)
        torch.ops.overtone_cpu.multiply(a, right, transposed, out, False)
    else:
        torch.ops.overtone_cpu.multiply_transposed(a.t().contiguous(), b.contiguous(), out)
    return out


def hidden_product(grads: Tensor, rows: Rows) -> Tensor:
    """(M, V) -> (M, D): grads @ rows."""
    if grads.dtype == torch.float32:
        return grads @ rows.rows
    out = torch.empty(grads.shape[0], rows.rows.shape[1], dtype=torch.float32)
    torch.ops.overtone_cpu.multiply_transposed(_columns(grads), rows.rows, out)
    return out


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor, first: bool = False) -> None:
    """As eager.add_rows_product."""
    if grads.dtype == torch.float32:
        total.addmm_(grads.t(), x, beta=0 if first else 1)  # with beta 0 what `total` held is not read, NaN or not
    else:
        torch.ops.overtone_cpu.multiply(_columns(grads), x.contiguous(), False, total, not first)


def finish_rows(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """total (V, D) = 2 (columns (V,) * rows (V, D) - total), in place and in one pass."""
    torch.ops.overtone_cpu.finish_rows(total, rows, columns)


def unit_rows(rows: Tensor) -> Tensor:
    """As eager.unit_rows, for float32."""
    return torch.ops.overtone_cpu.unit_rows(rows.contiguous())


def unit_rows_gradient(rows: Tensor, grad: Tensor) -> Tensor:
    """As eager.unit_rows_gradient, for float32."""
    return torch.ops.overtone_cpu.unit_rows_gradient(rows.contiguous(), grad.contiguous())


prepare = functools.partial(eager.prepare, to_unit=unit_rows)
finish = functools.partial(eager.finish, with_sums=finish_rows, from_unit=unit_rows_gradient)
to_targets, copy = eager.to_targets, eager.copy
Tokens = eager.Tokens
rows_at_a_time, tokens_per_wave, TEMPORARIES = eager.rows_at_a_time, eager.tokens_per_wave, eager.TEMPORARIES


def _columns(tokens_first: Tensor) -> Tensor:
    """(M, V) -> (V, M) with the tokens side by side: the same memory where it came from `products`."""
    columns = tokens_first.t()
    return columns if columns.stride(1) == 1 else columns.contiguous()


def statistics(values: Tensor, given: Given) -> Sums:
    """As eager.statistics."""
    columns, squares = _columns(values), given.squares
    of_squares = (squares.x, squares.rows, squares.target) if squares is not None else (None, None, None)
    coefficient = None if given.coefficient is None else float(given.coefficient)
    sums = torch.ops.overtone_cpu.statistics(
        columns, given.local, coefficient, given.floor, *of_squares, given.cap, _lift(given), given.more
    )
    if given.kind != "dot" and columns.data_ptr() != values.data_ptr():  # what is kept was written to a copy
        values.copy_(columns.t())
    return tuple(sums)


scores = eager.scores


def _lift(given: Given) -> float:
    """What a score lacks before its cap."""
    return 0.0 if given.cap is None or given.steep is None else given.lift * float(given.steep)


def gradients(kept: Tensor, given: Given, loss: Upstream, dtype: torch.dtype) -> SummedGradient:
    """As eager.gradients; G lies in the memory of `kept`, at the start of each row of (V, M)."""
    ops, columns, rounded = torch.ops.overtone_cpu, _columns(kept), dtype == torch.bfloat16
    log_floor = None if given.floor is None else given.floor.log() + eager.FLOOR_MARGIN
    steep = 1.0 if given.steep is None else given.steep
    weights = [None if w is None else w * steep for w in (loss.weight, loss.own, loss.uniform)]
    if loss.own is None and given.cap is None:
        sums = ops.gradient(columns, log_floor, float(steep), loss.lse, weights[0], given.local, rounded)
    else:
        own = weights[0] if weights[1] is None else weights[1]
        weighted = loss.lse, weights[0], own, weights[2], given.local
        sums = ops.shaped_gradient(columns, log_floor, float(steep), *weighted, given.cap, _lift(given), rounded)
    grads = columns.view(dtype)[:, : columns.shape[1]].t()
    return (grads, *sums) if given.squares is not None else (grads, None, None)


def contract(terms: eager.Terms, x: Tensor, rows: Rows) -> Tensor:
    """As eager.contract, for float32; the transpose of (V, M) memory of its own."""
    stride = -(-x.shape[0] // LANES) * LANES
    out = empty((rows.rows.shape[0], stride), torch.float32, x.device)
    torch.ops.overtone_cpu.contract(terms.kind, terms.p, terms.sign, x.contiguous(), rows.rows, out)
    return out[:, : x.shape[0]].t()


def contract_gradient(
    terms: eager.Terms, x: Tensor, rows: Rows, values: Tensor, grads: Tensor, total: Tensor
) -> Tensor:
    """As eager.contract_gradient, for float32."""
    return torch.ops.overtone_cpu.contract_gradient(
        terms.kind, terms.p, terms.sign, x.contiguous(), rows.rows, _columns(values), _columns(grads), total
    )
