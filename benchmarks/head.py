"""What the head costs: time and memory of the loss with its gradients, for every distance.

    python -m benchmarks.head --tokens 2048 --dim 768 --vocab 50304
    python -m benchmarks.head --growth
    python -m benchmarks.head --device cuda --fused

Ratios are to three bare matrix products of the same shapes and dtype (x w', g w, g' x), timed in turn with the loss in
the same process. Distances that are no matrix product are told in Gelem/s, 10^9 entries of (N, V, D) per second,
forward alone and forward with backward, beside torch.cdist (p = 1, the same D, smaller N and V: its speed hardly
depends on them); on a GPU at N 4,096, if N is not given. On a CPU every row runs in a process of its own, on a GPU all
run in this one. Extra memory is the peak of forward and backward above what was there before, less the gradients that
they leave. `--fused` and `--no-fused` choose between the designs of the product's head on a GPU: scores and sums in the
product's epilogue, or passes of their own over float32 scores.
Legend: N tokens, D width, V prototypes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import apart, machine, parser, timed, wide_console
from model.distances import DISTANCES, make
from model.harmonic import harmonic_loss

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 2**20
ENOUGH_S = 20.0  # a row that took so long is not repeated
DEFAULTS = {"cpu": (2048, [384], [8192]), "cuda": (65536, [768, 4096], [50304, 151936])}  # N, D, V
FEW_TOKENS = {"cpu": None, "cuda": 4096}  # N of distances that are no product; None: the same
CDIST = (512, 4096)  # N, V


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement, and when it is repeated."""

    tokens: int
    dim: int
    vocab: int
    dtype: str
    device: str
    repeats: int
    enough_s: float = ENOUGH_S


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats, in seconds."""

    both: float
    forward: float
    bare: float
    extra_bytes: int | None  # None: this system does not say

    def gelem(self, shape: Shape, seconds: float) -> float:
        """10^9 entries of (N, V, D) per second."""
        return shape.tokens * shape.vocab * shape.dim / seconds / 1e9


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "euclidean": {},
    "cosine": {},
    "mahalanobis, diagonal": {"factor": "diagonal"},
    "mahalanobis, full": {"factor": "full"},
    "hamming, hard": {"kind": "hard"},
    "dot": {},
    "cosine_softmax": {},
    "squared_euclidean_softmax": {},
    "manhattan": {},
    "chebyshev": {},
    "minkowski, p = 3": {"p": 3.0},
    "minkowski, p = 2.5": {"p": 2.5},
    "canberra": {},
    "hamming, soft": {"kind": "soft"},
    "hamming, gumbel": {"kind": "gumbel"},
    "braycurtis, abs": {"denominator": "abs"},
    "braycurtis, sum": {"denominator": "sum"},
}


def ours(variant: str, fused: bool | None = None) -> Loss:
    """A variant's loss; `fused` chooses the design, None: the device's default."""
    distance, params = variant.split(",")[0], VARIANTS[variant]

    def loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        options = dict(params)
        if fused is not None and is_product(variant):
            options["fused"] = fused
        if "factor" in params:
            unit = torch.eye(x.shape[1], device=x.device)
            options["factor"] = (unit if params["factor"] == "full" else unit[0] * 0).requires_grad_()
        return harmonic_loss(x, w, targets, distance=distance, exponent=x.shape[1] ** 0.5, **options)

    return loss


def is_product(variant: str) -> bool:
    """Whether a variant's distances follow from x w', so that its passes are compared with products."""
    params = dict(VARIANTS[variant])
    if "factor" in params:
        params["factor"] = torch.zeros(1)
    return make(DISTANCES[variant.split(",")[0]], params).by_product


def published_harmonic(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """The published harmonic GPT-2's arithmetic: N x V squared distances, over their least, to a power, normalised."""
    w = w.to(x.dtype)
    squared = x.float().square().sum(1, keepdim=True) + w.float().square().sum(1) - 2 * (x @ w.t()).float()
    ratios = squared / squared.amin(1, keepdim=True)
    shares = ratios ** (-0.5 * x.shape[1] ** 0.5)
    probabilities = shares / shares.sum(1, keepdim=True)
    return -probabilities.gather(1, targets[:, None]).log().mean()


def materialised_softmax(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy as one would write it, all N x V logits in memory."""
    return F.cross_entropy((x @ w.to(x.dtype).t()).float(), targets)


def cut_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Apple's softmax cross-entropy without the N x V logits in memory (arXiv:2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w.to(x.dtype), targets)


def liger(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Liger Kernel's softmax cross-entropy, fused with its linear layer, in chunks of tokens."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w.to(x.dtype), x, targets)


NEIGHBOURS: dict[str, tuple[Loss, str]] = {  # and the package that they need
    "softmax, materialised": (materialised_softmax, "torch"),
    "euclidean, published, materialised": (published_harmonic, "torch"),
    "softmax, cut cross-entropy": (cut_cross_entropy, "cut_cross_entropy"),
    "softmax, Liger": (liger, "liger_kernel"),
}


def loss_of(row: str, fused: bool | None = None) -> Loss:
    """A row's loss: x (N, D), w (V, D) and targets (N,) -> a scalar in nats."""
    return ours(row, fused) if row in VARIANTS else NEIGHBOURS[row][0]


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), w (V, D) with rows of length 1, so that scores are as spread as a model's; targets (N,)."""
    torch.manual_seed(0)
    device, scale = torch.device(shape.device), shape.dim**-0.5
    x = (torch.randn(shape.tokens, shape.dim, device=device) * scale).to(DTYPES[shape.dtype]).requires_grad_()
    w = (torch.randn(shape.vocab, shape.dim, device=device) * scale).requires_grad_()
    return x, w, torch.randint(0, shape.vocab, (shape.tokens,), device=device)


def measure(row: str, shape: Shape, bare: bool, fused: bool | None = None) -> Cost | str:
    """The cost of one row, in this process, or why there is none."""
    loss = loss_of(row, fused)
    x, w, targets = inputs(shape)

    def both() -> None:
        x.grad = w.grad = None
        loss(x, w, targets).backward()

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(x, w, targets)

    try:
        loss(x[:2], w[:3], targets[:2] % 3).backward()  # compiles, starts threads
        x.grad = w.grad = None
        extra = extra_bytes(both, x.device)
        if extra is not None and x.grad is not None and w.grad is not None:
            extra -= x.grad.nbytes + w.grad.nbytes
        rows = w.detach().to(x.dtype) if bare else w
        grads = torch.randn(shape.tokens, shape.vocab, device=x.device, dtype=x.dtype) if bare else x
        times: dict[str, list[float]] = {"both": [], "forward": [], "bare": []}
        stop = time.perf_counter() + shape.enough_s
        while len(times["both"]) < shape.repeats and (not times["both"] or time.perf_counter() < stop):
            times["both"].append(timed(both, x.device))
            x.grad = w.grad = None
            times["forward"].append(timed(forward, x.device))
            times["bare"].append(timed(lambda: products(x.detach(), rows, grads), x.device) if bare else 0.0)
    except torch.OutOfMemoryError:
        return "out of memory"
    both_s, forward_s, bare_s = (statistics.median(values) for values in times.values())
    return Cost(both_s, forward_s, bare_s, extra)


def measure_cdist(shape: Shape) -> Cost:
    """torch.cdist with p = 1 and its gradients, in float32."""
    x, w, _ = inputs(replace(shape, dtype="float32"))
    ones = torch.ones(shape.tokens, shape.vocab, device=x.device)
    both, forward = [], []
    for _ in range(3):
        x.grad = w.grad = None
        both.append(timed(lambda: torch.cdist(x, w, p=1).backward(ones), x.device))
        forward.append(timed(lambda: torch.cdist(x.detach(), w.detach(), p=1), x.device))
    return Cost(statistics.median(both), statistics.median(forward), 0.0, None)


def products(x: Tensor, rows: Tensor, grads: Tensor) -> None:
    """The three products that any head must take."""
    for a, b in ((x, rows.t()), (grads, rows), (grads.t(), x)):
        torch.mm(a, b)


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
    """Bytes by this field of /proc/self/status. Raises OSError where the system has none."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return int(found[1]) * 1024


def memory(cost: Cost) -> str:
    """The extra memory in MiB, as a cell."""
    return "unmeasured" if cost.extra_bytes is None else f"{cost.extra_bytes / MIB:,.0f}"


def add(table: Table, names: Sequence[str], cost: Cost | str, cells: Callable[[Cost], Sequence[str]]) -> None:
    """A row: its names, then the cells of a cost and its memory, or why there is none."""
    table.add_row(*names, *((cost,) if isinstance(cost, str) else (*cells(cost), memory(cost))))


def title_of(shape: Shape, fused: bool | None) -> str:
    """A table's title: sizes, dtype and the chosen design."""
    design = "" if fused is None else ", fused" if fused else ", not fused"
    return f"N {shape.tokens:,}, D {shape.dim:,}, V {shape.vocab:,}, {shape.dtype}{design}: medians"


def compare(console: Console, shape: Shape, chosen: str | None, few: int | None, fused: bool | None) -> None:
    """Prints one table for the heads that are matrix products, one for the others, of `few` tokens."""
    title = title_of(shape, fused)
    rows = [row for row in VARIANTS if chosen in (None, row.split(",")[0])]
    others = [] if chosen else [row for row, (_, package) in NEIGHBOURS.items() if importlib.util.find_spec(package)]
    table = Table("head", "forward + backward, ms", "three products, ms", "ratio", "extra memory, MiB", title=title)
    for row in [row for row in rows if is_product(row)] + others:
        cost = apart(shape.device, measure, row, shape, True, fused)
        add(table, [row], cost, lambda c: (f"{c.both * 1e3:,.0f}", f"{c.bare * 1e3:,.0f}", f"{c.both / c.bare:.2f}"))
    console.print(table)
    elementwise = [row for row in rows if not is_product(row)]
    if elementwise:
        compare_elementwise(console, replace(shape, tokens=few or shape.tokens), elementwise)


def compare_elementwise(console: Console, shape: Shape, rows: Sequence[str]) -> None:
    """Prints the table for heads that are no products, with torch.cdist in its last row."""
    small = replace(shape, tokens=CDIST[0], vocab=CDIST[1])
    cdist: Cost = apart(shape.device, measure_cdist, small)
    speed = cdist.gelem(small, cdist.both)
    columns = ("head", "forward + backward, ms", "Gelem/s forward", "Gelem/s", "times cdist", "extra memory, MiB")
    table = Table(*columns, title=title_of(shape, None))

    def cells(cost: Cost) -> Sequence[str]:
        forward, both = cost.gelem(shape, cost.forward), cost.gelem(shape, cost.both)
        return f"{cost.both * 1e3:,.0f}", f"{forward:,.1f}", f"{both:,.1f}", f"{both / speed:,.1f}"

    for row in rows:
        add(table, [row], apart(shape.device, measure, row, shape, False), cells)
    table.add_row(f"torch.cdist, p = 1, N {CDIST[0]}, V {CDIST[1]:,}, float32", f"{cdist.both * 1e3:,.0f}",
                  f"{cdist.gelem(small, cdist.forward):,.1f}", f"{speed:,.2f}", "1.0", "")  # fmt: skip
    console.print(table)


def growth(console: Console, shape: Shape, chosen: str | None, fused: bool | None) -> None:
    """Time and memory against N and V: linear and flat."""
    for row in [chosen] if chosen else ["euclidean", "manhattan"]:
        table = Table("N", "V", "ms", "ns per token and prototype", "extra memory, MiB", title=f"{row}, D {shape.dim}")
        for tokens, vocab in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8)):
            size = replace(shape, tokens=shape.tokens * tokens, vocab=shape.vocab * vocab)
            pairs, names = size.tokens * size.vocab, (f"{size.tokens:,}", f"{size.vocab:,}")
            cost = apart(shape.device, measure, row, size, False, fused)
            add(table, names, cost, lambda c, n=pairs: (f"{c.both * 1e3:,.0f}", f"{c.both / n * 1e9:.2f}"))  # type: ignore[misc]
        console.print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    command = parser("head", __doc__)
    command.add_argument("--tokens", type=int, help="N (default: 2048; on a GPU 65536)")
    command.add_argument("--dim", type=int, nargs="+", help="one D or more (default: 384; on a GPU 768 and 4096)")
    command.add_argument("--vocab", type=int, nargs="+", help="one V or more (default: 8192; on a GPU 50304, 151936)")
    command.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    command.add_argument("--distance", choices=list(DISTANCES), help="this one alone, without the comparisons")
    command.add_argument(
        "--growth", action="store_true", help="time and memory against N and V, from the given sizes on"
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--repeats", type=int, default=7, help="medians are over so many runs (default %(default)s)")
    command.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, help="the design of heads that are products (default: the "
        "device's own)"
    )  # fmt: skip
    return command.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command: a table for each D and V."""
    args = arguments(argv)
    few = FEW_TOKENS[torch.device(args.device).type] if args.tokens is None else None
    tokens, dims, vocabs = DEFAULTS[torch.device(args.device).type]
    console = wide_console()
    console.print(machine(args.device))
    for dim in args.dim or dims:
        for vocab in args.vocab or vocabs:
            shape = Shape(args.tokens or tokens, dim, vocab, args.dtype, args.device, args.repeats)
            if args.growth:
                growth(console, shape, args.distance, args.fused)
            else:
                compare(console, shape, args.distance, few, args.fused)


if __name__ == "__main__":
    main()
