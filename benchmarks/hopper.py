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

import argparse
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from common.plain import to_json
from model import chunks
from model.harmonic import harmonic_loss
from model.kernels import choose, gpu, triton_elementwise, triton_fused, triton_rows, triton_scores

RESULTS = Path(__file__).parent / "results" / "head-gpu-model.md"
PRODUCT_RATE = 700e12  # floating-point operations per second of bfloat16 products
BANDWIDTH = 3.0e12  # bytes per second
ISSUE_RATE = 132 * 128 * 1.7e9  # instructions of threads per second
SPECIAL_RATE = 132 * 16 * 1.7e9  # of those, logarithms, exponentials, roots, inverses
LAUNCH_S = 4e-6
BUDGET = 5 * 2**30  # of working memory: a 16th of the 80 GiB

SHAPES = ((65536, 768, 50304), (65536, 768, 50257), (65536, 4096, 50304), (65536, 768, 151936), (65536, 4096, 151936))
PRODUCTS = ("euclidean", "cosine", "dot")
SHOWN = ("KIND", "P", "SIGN", "ADD", "UNIT", "SUMMED", "SCALED", "PRODUCT", "MOMENT", "ROUNDS", "BLOCK", "BLOCK_M",
         "BLOCK_V", "BLOCK_D", "BLOCK_A", "BLOCK_K", "STAGES")  # fmt: skip
VIEWS = ("aten.detach", "aten.lift_fresh", "aten.alias")


class Hopper:
    """A driver that answers for an H100 and loads nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "int"

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(*parts: Any) -> tuple[int, int, int, int, int]:
            return (1, 2, 0, 0, 1024)

    class launcher_cls:
        def __init__(self, *parts: Any) -> None:
            pass


@dataclass(frozen=True)
class Compiled:
    """One kernel as an H100 would run it."""

    name: str
    constants: str
    warps: int
    registers: int
    spills: int  # instructions that write registers to memory or read them back
    shared_bytes: int
    instructions: int
    per_score: float | None  # instructions of a thread per score, in the loop over scores or after the product
    special_per_score: float | None


@dataclass
class Count:
    """Of one call, forward and backward."""

    launches: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    product_flops: int = 0
    largest_bytes: int = 0  # of a single tensor
    score_bytes: float = 0  # moved outside of products, per score
    token_bytes: float = 0  # per entry of the hidden states
    prototype_bytes: float = 0  # per entry of the prototypes
    chunks: int = 0


@dataclass
class Recorder:
    """Stands in for the kernels' launches and the products."""

    tokens: int
    width: int
    prototypes: int
    compiling: bool
    count: Count = field(default_factory=Count)
    compiled: dict[str, Compiled] = field(default_factory=dict)
    moved: Counter[str] = field(default_factory=Counter)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 8, **options: Any) -> None:
        name = f"{kernel.fn.__module__.rsplit('.', 1)[1]}.{kernel.fn.__name__}"
        self.count.launches += 1
        self.count.kernels[f"{name} {options.get('KIND', '')}".strip()] += 1
        names = list(inspect.signature(kernel.fn).parameters)
        for parameter, argument in zip(names, arguments, strict=False):
            tensor = argument.tensor if isinstance(argument, Described) else argument
            if isinstance(tensor, Tensor):
                rows_at_targets = name == "triton_rows._meet" and parameter == "w"
                times = 2 if (name, parameter) in IN_PLACE or _log_in_place(name, parameter, options) else 1
                self.move(tensor, times, arguments[0].numel() if rows_at_targets else None)
        if self.compiling:
            given = [_stand_in(argument) for argument in arguments]
            made = kernel.warmup(*given, grid=grid, num_warps=warps, **options)
            constants = {key: value for key, value in options.items() if key in SHOWN}
            key = f"{name} {made.hash}"
            if key not in self.compiled:
                self.compiled[key] = _counted(name, constants, warps, made)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """(M, K) @ (K, N), in float32."""
        self.count.product_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self.count.launches += 1
        self.count.operations["product"] += 1
        return torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)

    def move(self, tensor: Tensor, times: int = 1, numel: int | None = None) -> None:
        entries = tensor.numel() if numel is None else numel
        size = entries * tensor.element_size() * times
        self.count.largest_bytes = max(self.count.largest_bytes, entries * tensor.element_size())
        shape = tuple(tensor.shape)
        if len(shape) == 2 and shape[1] == self.width and numel is None:
            near = abs(shape[0] - self.prototypes) <= gpu.ROW_START
            self.moved["prototype" if near else "token"] += size
        elif numel is not None:
            self.moved["token"] += size
        elif entries >= self.prototypes * self.tokens // max(1, self.count.chunks) // 2:
            self.moved["score"] += size


IN_PLACE = {("triton_fused._gradients", "kept")}


def _log_in_place(name: str, parameter: str, options: dict[str, Any]) -> bool:
    return name == "triton_scores._statistics" and parameter == "values" and options["KIND"] == "log"


class Described:
    """A tensor descriptor over a tensor without memory."""

    def __init__(self, tensor: Tensor, block: list[int]) -> None:
        self.tensor, self.block = tensor, block

    @classmethod
    def from_tensor(cls, tensor: Tensor, block: list[int]) -> Described:
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        assert strides[0] % 16 == 0 and tensor.stride(1) == 1, "tiles need rows that start on 16 bytes"
        return cls(tensor, block)


def _stand_in(argument: Any) -> Any:
    """What Triton asks an argument of while it compiles."""
    if isinstance(argument, Described):
        small = torch.empty(argument.block, dtype=argument.tensor.dtype)
        return TensorDescriptor(small, list(small.shape), list(small.stride()), argument.block)
    return argument.dtype if isinstance(argument, Tensor) else argument


def _counted(name: str, constants: dict[str, Any], warps: int, made: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        use = _disassembled("--dump-resource-usage", file.name)
        code = _disassembled("-sass", file.name)
    (registers,) = re.findall(r"REG:(\d+)", use)
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)]
    per_score, special = _per_score(name, constants, warps, lines)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in lines)
    told = ", ".join(f"{key} {value}" for key, value in constants.items())
    shared = made.metadata.shared
    return Compiled(name, told, warps, int(registers), spills, shared, len(lines), per_score, special)


def _disassembled(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _per_score(
    name: str, constants: dict[str, Any], warps: int, lines: list[tuple[int, str]]
) -> tuple[float | None, float | None]:
    """Instructions per score and thread, and those of them that the special-function unit takes."""
    loops = []
    for at, text in lines:
        back = re.search(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            loops.append((int(back[1], 16), at))
    if name == "triton_fused._scores":
        scores = constants["BLOCK_M"] * constants["BLOCK_V"]
        last = max(at for at, text in lines if "HGMMA" in text)
        chosen = [text for at, text in lines if at > last]
    elif name in ("triton_scores._statistics", "triton_scores._gradients", "triton_fused._gradients"):
        if name.endswith("_statistics"):
            scores = constants["ROUNDS"] * constants["BLOCK"]
        else:
            scores = constants["BLOCK_M"] * constants["BLOCK_V"]
        if not loops:
            return None, None
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        chosen = [text for at, text in lines if first <= at <= last]
    else:
        return None, None
    of_thread = scores / (32 * warps)
    return len(chosen) / of_thread, sum("MUFU" in text for text in chosen) / of_thread


class Counting(TorchDispatchMode):
    """Counts what torch itself launches; products are not computed, not even their shapes by decomposition."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        packet = str(function.overloadpacket)
        count = self.recorder.count
        if packet in ("aten.mm", "aten.addmm"):
            a, b = [x for x in arguments if isinstance(x, Tensor)][-2:]
            made = self.recorder.product(a, b)
            return options.get("out", made)
        result = function(*arguments, **options)
        schema = function._schema
        view = bool(schema.returns) and all(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        allocated = packet.startswith(("aten.empty", "aten.new_empty"))
        tensors = [x for x in _flat((arguments, options, result)) if x.device.type == "meta"]
        if view or allocated or packet in VIEWS or not tensors or not any(x.numel() for x in tensors):
            return result
        count.launches += 1
        count.operations[packet] += 1
        for tensor in tensors:
            self.recorder.move(tensor)
        return result


def _flat(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _flat(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _flat(value)


@contextmanager
def standing_in(recorder: Recorder) -> Iterator[None]:
    """Launches and products go to the recorder."""
    modules = (triton_scores, triton_elementwise, triton_fused, triton_rows)
    replaced: list[tuple[Any, str, Any]] = [(module, "launch", recorder.launch) for module in modules]
    replaced += [
        (triton_fused, "TensorDescriptor", Described),
        (gpu, "product", recorder.product),
        (torch, "autocast", lambda device, enabled: nullcontext()),  # it knows no such device
        (chunks, "device_limits", lambda device, group: (BUDGET, 132)),
        (choose, "kernels_for", lambda x: gpu),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def record(
    distance: str,
    n: int,
    d: int,
    v: int,
    *,
    fused: bool,
    compiling: bool = False,
    dtype: str = "bfloat16",
    learned: bool = False,
    **params: Any,
) -> Recorder:
    """One call of the head with its gradients, for hidden states in `dtype` and float32 prototypes; of the exponent too
    if that is `learned`.
    """
    recorder = Recorder(n, d, v, compiling)
    if compiling:
        driver.set_active(Hopper())
    x = torch.empty(n, d, device="meta", dtype=getattr(torch, dtype), requires_grad=True)
    w = torch.empty(v, d, device="meta", requires_grad=True)
    y = torch.empty(n, dtype=torch.int64, device="meta")
    exponent = torch.empty((), device="meta", requires_grad=True) if learned else d**0.5
    with standing_in(recorder):
        recorder.count.chunks = _chunks(x, v, distance, fused, params)
        with Counting(recorder):
            harmonic_loss(x, w, y, distance=distance, exponent=exponent, fused=fused, **params).backward()
    count, moved = recorder.count, recorder.moved
    count.score_bytes, count.token_bytes = moved["score"] / n / v, moved["token"] / n / d
    count.prototype_bytes = moved["prototype"] / v / d
    return recorder


def _chunks(x: Tensor, v: int, distance: str, fused: bool, params: dict[str, Any]) -> int:
    from model.contractions import Use
    from model.distances import resolve
    from model.vocab_parallel import VocabShard

    entry = resolve(distance, params)
    kernels = choose.fused_kernels_for(x, fused) if not entry.contraction.wide else None
    shard = VocabShard(0, v)
    call = chunks.Call(entry, shard, "mean", -100, *chunks.limits(x, shard, None), Use(kernels))
    return len(list(call.chunks(x)))


def modelled_seconds(recorder: Recorder, kernels: list[Compiled]) -> float:
    """Products, passes and launches one after another."""
    n, v, d, count = recorder.tokens, recorder.prototypes, recorder.width, recorder.count
    seconds = count.product_flops / PRODUCT_RATE + count.launches * LAUNCH_S
    if "triton_fused._scores" in {name.split()[0] for name in count.kernels}:
        seconds += 2 * n * v * d / PRODUCT_RATE
    work = {kernel.name: kernel for kernel in kernels if kernel.per_score}
    computing = 0.0
    for name in {name.split()[0] for name in count.kernels}:
        if name in work:
            one = work[name]
            assert one.per_score is not None and one.special_per_score is not None
            busy = n * v * max(one.per_score / ISSUE_RATE, one.special_per_score / SPECIAL_RATE)
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
    found: dict[str, Compiled] = {}
    for distance, v, fused in (
        ("euclidean", 50257, False),
        ("euclidean", 50257, True),
        ("dot", 50257, False),
        ("dot", 50257, True),
    ):
        found |= record(distance, 8192, 768, v, fused=fused, compiling=True).compiled
    found |= record("cosine", 8192, 4096, 50257, fused=True, compiling=True).compiled
    found |= record("euclidean", 8192, 768, 50257, fused=True, compiling=True, learned=True).compiled
    found |= record("euclidean", 8192, 768, 50257, fused=False, compiling=True, dtype="float32").compiled
    for distance, params in ELEMENTWISE:
        found |= record(distance, 4096, 768, 50257, fused=False, compiling=True, **params).compiled
    return list(found.values())


def counted() -> list[dict[str, Any]]:
    """Launches and bytes of a call, by distance, design and shape."""
    rows = []
    for n, d, v in SHAPES:
        for distance in PRODUCTS:
            for fused in (False, True):
                recorder = record(distance, n, d, v, fused=fused)
                rows.append({"distance": distance, "fused": fused, "tokens": n, "width": d, "prototypes": v,
                             "recorder": recorder})  # fmt: skip
    return rows


Rows = list[tuple[str, ...]]


def kernel_rows(kernels: list[Compiled]) -> Rows:
    """What each kernel takes, with a heading."""
    heading = ("kernel", "constants", "warps", "registers", "spills", "shared, KiB", "instructions", "per score",
               "special per score")  # fmt: skip
    rows = [
        (one.name, one.constants, f"{one.warps}", f"{one.registers}", f"{one.spills}", f"{one.shared_bytes / 1024:.0f}",
         f"{one.instructions}", _told(one.per_score), _told(one.special_per_score))
        for one in kernels
    ]  # fmt: skip
    return [heading, *rows]


def call_rows(rows: list[dict[str, Any]], kernels: list[Compiled]) -> Rows:
    """What a call takes, with a heading."""
    heading = ("head", "D", "V", "design", "chunks", "launches", "bytes per score", "bytes per (token, D)",
               "bytes per (V, D)", "modelled ratio")  # fmt: skip
    told: Rows = [heading]
    for row in rows:
        count: Count = row["recorder"].count
        design = "fused" if row["fused"] else "apart"
        told.append((row["distance"], f"{row['width']:,}", f"{row['prototypes']:,}", design, f"{count.chunks}",
                     f"{count.launches}", f"{count.score_bytes:.1f}", f"{count.token_bytes:.0f}",
                     f"{count.prototype_bytes:.0f}", f"{_ratio(row, kernels):.2f}"))  # fmt: skip
    return told


def _told(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def printed(console: Console, title: str, rows: Rows) -> None:
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


def page(kernels: list[Compiled], rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    return PAGE.format(
        torch=torch.__version__,
        triton=triton.__version__,
        rate=PRODUCT_RATE / 1e12,
        bandwidth=BANDWIDTH / 1e12,
        launch=LAUNCH_S * 1e6,
        tokens=SHAPES[0][0],
        budget=BUDGET / 2**30,
        calls=_markdown(call_rows(rows, kernels)),
        kernels=_markdown(kernel_rows(kernels)),
    )


def _markdown(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def _ratio(row: dict[str, Any], kernels: list[Compiled]) -> float:
    bare = 6 * row["tokens"] * row["prototypes"] * row["width"] / PRODUCT_RATE
    kind = "dot" if row["distance"] == "dot" else "quadratic"
    return modelled_seconds(row["recorder"], [one for one in kernels if f"KIND {kind}" in one.constants]) / bare


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hopper", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--kernels", action="store_true", help="compile the kernels and count no calls")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args(argv)
    if given.kernels and given.write:
        parser.error("--write takes calls too: leave --kernels out")
    kernels, rows = compiled(), [] if given.kernels else counted()
    if given.json:
        told = [
            {key: value for key, value in row.items() if key != "recorder"}
            | {
                key: dict(value) if isinstance(value, Counter) else value
                for key, value in vars(row["recorder"].count).items()
            }
            | {"modelled_ratio": _ratio(row, kernels)}
            for row in rows
        ]
        show(to_json({"triton": triton.__version__, "kernels": [asdict(one) for one in kernels], "calls": told}))
        return
    if given.write:
        RESULTS.write_text(page(kernels, rows))
    console = Console(width=180)
    printed(console, f"kernels as compiled for sm_90 by Triton {triton.__version__}", kernel_rows(kernels))
    if rows:
        printed(console, f"a call, N {SHAPES[0][0]:,}, bfloat16", call_rows(rows, kernels))


if __name__ == "__main__":
    main()
