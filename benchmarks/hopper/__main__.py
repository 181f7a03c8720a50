"""What the head asks of an H100, without one: its kernels compiled for sm_90, its launches and bytes counted.

    python -m benchmarks.hopper                       # registers, spills, instructions; launches and bytes of a call
    python -m benchmarks.hopper --json                # the same for programs
    python -m benchmarks.hopper --write               # the same to benchmarks/results/head-gpu-model.md

The head runs on tensors without memory (torch's meta device), with the kernels of a GPU: whatever waits for a result
fails here. Each kernel is compiled by the installed Triton as that launch would have it, and its machine code is
counted. The model of time is arithmetic, not a measurement: products at PRODUCT_RATE, every pass at its memory
traffic or its instructions, whichever takes longer, and LAUNCH_S for each launch.

Legend: N tokens, D width, V prototypes; a score is a pair of a token and a prototype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.hopper.machine_code import Compiled
from benchmarks.hopper.recorder import BUDGET, Recorder, record
from benchmarks.measuring import markdown, parser
from benchmarks.processes import ROOT
from common.strict_json import to_json

RESULTS = ROOT / "benchmarks" / "results" / "head-gpu-model.md"
PRODUCT_RATE = 700e12  # floating-point operations per second of bfloat16 products
BANDWIDTH = 3.0e12  # bytes per second
ISSUE_RATE = 132 * 128 * 1.7e9  # instructions of threads per second
SPECIAL_RATE = 132 * 16 * 1.7e9  # of those, logarithms, exponentials, roots, inverses
LAUNCH_S = 4e-6


SHAPES = ((65536, 768, 50304), (65536, 768, 50257), (65536, 4096, 50304), (65536, 768, 151936), (65536, 4096, 151936))
PRODUCTS = ("euclidean", "cosine", "dot")


def modelled_seconds(recorder: Recorder, kernels: list[Compiled]) -> float:
    """Products, passes and launches one after another."""
    n, v, d, count = recorder.tokens, recorder.prototypes, recorder.width, recorder.count
    seconds = count.product_flops / PRODUCT_RATE + count.launches * LAUNCH_S
    launched = {name.split()[0] for name in count.kernels}
    if "triton_fused._scores" in launched:
        seconds += 2 * n * v * d / PRODUCT_RATE
    work = {kernel.name: kernel for kernel in kernels if kernel.per_score}
    computing = 0.0
    for name in {name.split()[0] for name in count.kernels}:
        if name in work:
            kernel = work[name]
            assert kernel.per_score is not None and kernel.special_per_score is not None
            busy = n * v * max(kernel.per_score / ISSUE_RATE, kernel.special_per_score / SPECIAL_RATE)
            computing = computing + busy if name == "triton_fused._scores" else max(computing, busy)
    moving = (count.score_bytes * n * v + count.token_bytes * n * d + count.prototype_bytes * v * d) / BANDWIDTH
    return seconds + max(moving, computing)


ELEMENTWISE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("manhattan", {}),
    ("chebyshev", {}),
    ("canberra", {}),
    ("minkowski", {"p": 2.5}),
)


def compiled() -> list[Compiled]:
    """Every kernel of the head, at a V that is no multiple of anything: bfloat16, float32, a learned exponent."""
    kernels: dict[str, Compiled] = {}
    for distance in ("euclidean", "dot"):
        for fused in (False, True):
            kernels |= record(distance, 8192, 768, 50257, fused=fused, compiling=True).compiled
    kernels |= record("cosine", 8192, 4096, 50257, fused=True, compiling=True).compiled
    kernels |= record("euclidean", 8192, 768, 50257, fused=True, compiling=True, learned=True).compiled
    kernels |= record("euclidean", 8192, 768, 50257, fused=False, compiling=True, dtype="float32").compiled
    for distance, params in ELEMENTWISE:
        kernels |= record(distance, 4096, 768, 50257, fused=False, compiling=True, **params).compiled
    return list(kernels.values())


def counted() -> list[Recorder]:
    """Launches and bytes of a call, by shape, distance and design."""
    calls = itertools.product(SHAPES, PRODUCTS, (False, True))
    return [record(distance, *shape, fused=fused) for shape, distance, fused in calls]


Rows = list[tuple[str, ...]]


def kernel_rows(kernels: list[Compiled]) -> Rows:
    """What each kernel takes, with a heading."""
    heading = ("kernel", "constants", "warps", "registers", "spills", "shared, KiB", "instructions", "per score",
               "special per score")  # fmt: skip
    rows = [
        (k.name, k.constants, f"{k.warps}", f"{k.registers}", f"{k.spills}", f"{k.shared_bytes / 1024:.0f}",
         f"{k.instructions}", _rounded(k.per_score), _rounded(k.special_per_score))
        for k in kernels
    ]  # fmt: skip
    return [heading, *rows]


def call_rows(calls: list[Recorder], kernels: list[Compiled]) -> Rows:
    """What a call takes, with a heading."""
    heading = ("head", "D", "V", "design", "chunks", "launches", "bytes per score", "bytes per (token, D)",
               "bytes per (V, D)", "modelled ratio")  # fmt: skip
    lines: Rows = [heading]
    for call in calls:
        count, design = call.count, "fused" if call.fused else "apart"
        lines.append((call.distance, f"{call.width:,}", f"{call.prototypes:,}", design, f"{count.chunks}",
                     f"{count.launches}", f"{count.score_bytes:.1f}", f"{count.token_bytes:.0f}",
                     f"{count.prototype_bytes:.0f}", f"{_ratio(call, kernels):.2f}"))  # fmt: skip
    return lines


def _rounded(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def printed(console: Console, title: str, rows: Rows) -> None:
    """Prints rows whose first is the heading."""
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


PAGE = """# What the head asks of an H100: counted and modelled, not measured

`python -m benchmarks.hopper --write`, with torch {torch} and Triton {triton}: the head's kernels compiled for sm_90 on
a machine without a GPU, and a call's launches and bytes counted on tensors without memory.

*Apart*: cuBLAS makes float32 products, passes read them. *Fused*: scores and sums in the product's epilogue, scores
kept in bfloat16 (`fused=True`). The ratio is to three bare products, and it is arithmetic: {rate:.0f} TFLOP/s for
products (ours as cuBLAS'), {bandwidth:.1f} TB/s or the instructions for passes, whichever takes longer, {launch:.0f}
microseconds a launch, nothing overlapped. What a GPU really takes is measured by `python -m benchmarks.gpu`.

## A call, forward and backward, N {tokens:,}, bfloat16, {budget:.0f} GiB of working memory

{calls}

Launches are PyTorch's small operations too; bytes are those outside of products.

## Kernels

{kernels}

Instructions per score are a thread's, in the loop over scores or after the product, branches that are seldom taken
included; special ones are logarithms, exponentials and inverses, of which a multiprocessor takes 16 a cycle where it
takes 128 others.
"""


def page(kernels: list[Compiled], calls: list[Recorder]) -> str:
    """The results in Markdown."""
    return PAGE.format(
        torch=torch.__version__,
        triton=triton.__version__,
        rate=PRODUCT_RATE / 1e12,
        bandwidth=BANDWIDTH / 1e12,
        launch=LAUNCH_S * 1e6,
        tokens=SHAPES[0][0],
        budget=BUDGET / 2**30,
        calls="\n".join(markdown(call_rows(calls, kernels))),
        kernels="\n".join(markdown(kernel_rows(kernels))),
    )


def _ratio(call: Recorder, kernels: list[Compiled]) -> float:
    bare = 6 * call.tokens * call.prototypes * call.width / PRODUCT_RATE
    kind = "dot" if call.distance == "dot" else "quadratic"
    return modelled_seconds(call, [kernel for kernel in kernels if f"KIND {kind}" in kernel.constants]) / bare


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    """The command; `show` takes what --json prints."""
    command = parser("hopper", __doc__)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--kernels", action="store_true", help="compile the kernels and count no calls")
    command.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = command.parse_args(argv)
    if args.kernels and args.write:
        command.error("--write takes calls too: leave --kernels out")
    kernels, calls = compiled(), [] if args.kernels else counted()
    if args.json:
        inputs = ("distance", "fused", "tokens", "width", "prototypes")
        told = [
            {name: getattr(call, name) for name in inputs}
            | vars(call.count)
            | {"modelled_ratio": _ratio(call, kernels)}
            for call in calls
        ]
        show(to_json({"triton": triton.__version__, "kernels": [asdict(kernel) for kernel in kernels], "calls": told}))
        return
    if args.write:
        RESULTS.write_text(page(kernels, calls))
    console = Console(width=180)
    printed(console, f"kernels as compiled for sm_90 by Triton {triton.__version__}", kernel_rows(kernels))
    if calls:
        printed(console, f"a call, N {SHAPES[0][0]:,}, bfloat16", call_rows(calls, kernels))


if __name__ == "__main__":
    main()
