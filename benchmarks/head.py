"""What the head costs: time and memory of the loss with its gradients, for every distance.

    python -m benchmarks.head --tokens 2048 --dim 768 --vocab 50304

Ratios are to three bare matrix products of the same shapes (x w', g w, g' x), timed in turn with the loss in the same
process. Every row runs in a process of its own. Extra memory is the peak of forward and backward above what was there
before, less the gradients that they leave.
Legend: N tokens, D width, V prototypes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from model.distances import DISTANCES
from model.harmonic import harmonic_loss

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    tokens: int
    dim: int
    vocab: int
    dtype: str
    device: str
    repeats: int


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats."""

    seconds: float
    bare_seconds: float
    extra_bytes: int | None  # None: this system does not say


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_harmonic(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Euclidean harmonic loss as one would write it, all N x V distances in memory."""
    w = w.to(x.dtype)
    squared = x.float().square().sum(1, keepdim=True) + w.float().square().sum(1) - 2 * (x @ w.t()).float()
    return F.cross_entropy(squared.clamp_min(1e-6).log() * (-0.5 * x.shape[1] ** 0.5), targets)


def plain_softmax(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy as one would write it, all N x V logits in memory."""
    return F.cross_entropy((x @ w.to(x.dtype).t()).float(), targets)


def losses() -> dict[str, Loss]:
    """Name of the row -> loss of (N, D), (V, D), (N,)."""

    def ours(distance: str) -> Loss:
        return lambda x, w, targets: harmonic_loss(x, w, targets, distance=distance, exponent=x.shape[1] ** 0.5)

    rows = {f"{name}: {entry.formula}": ours(name) for name, entry in DISTANCES.items()}
    return rows | {"softmax, materialised": plain_softmax, "euclidean, materialised": plain_harmonic}


def measure(name: str, shape: Shape) -> Cost:
    """The cost of one row, in this process."""
    torch.manual_seed(0)
    loss, device = losses()[name], torch.device(shape.device)
    x = torch.randn(shape.tokens, shape.dim, device=device).to(DTYPES[shape.dtype]).requires_grad_()
    w = torch.randn(shape.vocab, shape.dim, device=device, requires_grad=True)
    with torch.no_grad():  # rows of length 1: scores as spread as those of a model
        x.mul_(shape.dim**-0.5)
        w.mul_(shape.dim**-0.5)
    targets = torch.randint(0, shape.vocab, (shape.tokens,), device=device)
    loss(x[:2], w[:3], targets[:2] % 3).backward()  # compiles, starts threads
    x.grad = w.grad = None
    extra = extra_bytes(lambda: loss(x, w, targets).backward(), device)
    if extra is not None and x.grad is not None and w.grad is not None:
        extra -= x.grad.nbytes + w.grad.nbytes
    rows = w.detach().to(x.dtype)
    grads = torch.randn(shape.tokens, shape.vocab, device=device).to(x.dtype)
    times, bare = [], []
    for _ in range(shape.repeats):
        x.grad = w.grad = None
        times.append(seconds(lambda: loss(x, w, targets).backward(), device))
        bare.append(seconds(lambda: products(x.detach(), rows, grads), device))
    return Cost(statistics.median(times), statistics.median(bare), extra)


def products(x: Tensor, rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three products that any head must take."""
    return x @ rows.t(), grads @ rows, grads.t() @ x


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    result = work()
    wait(device)
    spent = time.perf_counter() - start
    del result  # giving memory back is not part of it
    return spent


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory while `work` runs, above what was there before; Linux and CUDA can tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="N (default %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="D (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=8192, help="V (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--distance", choices=list(DISTANCES), help="this one alone, without the comparisons")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="medians are over so many runs (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    shape = Shape(given.tokens, given.dim, given.vocab, given.dtype, given.device, given.repeats)
    console = Console()
    console.print(machine(shape.device))
    table = Table("head", "ms", "three products, ms", "ratio", "extra memory, MiB")
    for name in losses():
        if given.distance and not name.startswith(f"{given.distance}: "):
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cost = pool.apply(measure, (name, shape))
        extra = "unmeasured" if cost.extra_bytes is None else f"{cost.extra_bytes / MIB:.0f}"
        ratio = f"{cost.seconds / cost.bare_seconds:.2f}"
        table.add_row(name, f"{cost.seconds * 1e3:.0f}", f"{cost.bare_seconds * 1e3:.0f}", ratio, extra)
    console.print(f"N {shape.tokens}, D {shape.dim}, V {shape.vocab}, {shape.dtype}: forward and backward, medians")
    console.print(table)


if __name__ == "__main__":
    main()
