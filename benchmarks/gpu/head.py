"""The head beside three bare products, in both designs, kernel by kernel; then distances that are no product.

A worker process takes the rows in order, the most valuable first, and says what it found, line by line. When a row
kills it, breaks the device for it or hangs, the next worker goes on with the row after: one bad kernel costs one row.
Legend: N tokens, D width, V prototypes.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Any
from unittest import mock

from benchmarks.gpu.findings import Findings
from benchmarks.measuring import parser
from benchmarks.processes import end, finish, start
from common.strict_json import to_json

PRODUCTS = ("euclidean", "cosine", "dot")
RIVALS = ("softmax, Liger", "softmax, cut cross-entropy", "softmax, materialised")
ENTRYWISE = (
    "chebyshev", "minkowski, p = 3", "minkowski, p = 2.5", "canberra", "braycurtis, abs", "braycurtis, sum",
    "hamming, soft",
)  # fmt: skip
N, FEW = 65_536, 4_096  # tokens of products, and of contractions entry by entry
SHAPES = {"first": (768, 50_304), "odd": (768, 50_257), "wide": (4096, 50_304), "many": (768, 151_936),
          "wide and many": (4096, 151_936)}  # fmt: skip
SMALL = {"first": (64, 512)}
SMALL_N = 128
FIRST_LINE_S = 150.0  # until a worker has imported torch and begun
ROW_S = 75.0  # compiling included
ENOUGH_S = 3.0  # a row that took so long is not repeated
ENDING_S = 30.0  # for a worker that said all to leave the device
NEED_S = 6.0  # with less left no row is begun
APART = 0.02  # of a loss or a gradient's norm, between the two designs
COMPARED = ("loss", "x_gradient_norm", "w_gradient_norm")
Line = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What a worker measures at a time: a head at a shape, in a design."""

    table: str
    head: str
    tokens: int
    dim: int
    vocab: int
    fused: bool | None = None  # None: as the device has it
    tile: int | None = None  # which candidate

    @property
    def design(self) -> str:
        """The design's name in tables."""
        return {None: "default", True: "fused", False: "apart"}[self.fused]

    @property
    def label(self) -> str:
        """The row in words, for problems and for what is left out."""
        tile = "" if self.tile is None else f", tile {self.tile}"
        return f"{self.head} ({self.design}{tile}), N {self.tokens:,}, D {self.dim}, V {self.vocab:,}"


def plan(small: bool, designs: Sequence[bool | None], rivals: Sequence[str], tiles: int) -> list[Row]:
    """The rows, the most valuable first."""
    tokens, few = (SMALL_N, SMALL_N // 4) if small else (N, FEW)
    shapes = SMALL if small else SHAPES

    def products(shape: str) -> Iterator[Row]:
        for head in PRODUCTS:
            for fused in designs:
                yield Row("products", head, tokens, *shapes[shape], fused)

    def entrywise(heads: Sequence[str]) -> Iterator[Row]:
        return (Row("entry by entry", head, few, *shapes["first"]) for head in heads)

    found = [*products("first"), *(Row("products", head, tokens, *shapes["first"]) for head in rivals)]
    if small:
        return [*found, *entrywise(("manhattan", *ENTRYWISE))]
    found += [*products("odd"), *entrywise(("manhattan",)), *products("wide")]
    found += [Row("tiles", "euclidean", tokens, *shapes["first"], True, tile) for tile in range(tiles)]
    return [*found, *products("many"), *products("wide and many"), *entrywise(ENTRYWISE)]


# ---- the worker


@contextmanager
def with_tile(module: Any, tile: Any) -> Iterator[list[int]]:
    """Has the fused product use this tile: by the module's `tile`, or the keyword of its `scores`. Yields a list that
    gets an entry for each use.
    """
    used: list[int] = []
    name = "tile" if hasattr(module, "tile") else "scores"
    inner = getattr(module, name)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        used.append(1)
        return tile if name == "tile" else inner(*args, **{**kwargs, "tile": tile})

    with mock.patch.object(module, name, chosen):
        yield used


def measured(row: Row, device: str, small: bool) -> Line:
    """One row's figures."""
    import torch

    from benchmarks import head
    from benchmarks.gpu.kernels import breakdown
    from model.kernels import choose

    two = torch.empty(2, row.dim, device=device, dtype=torch.bfloat16)
    if row.fused and choose.fused_kernels_for(two, True) is None:  # the head would fall back to the other design
        return {"reason": "the fused kernels do not serve this device or width"}
    shape = head.Shape(row.tokens, row.dim, row.vocab, "bfloat16", device, 3 if small else 7, ENOUGH_S)
    bare = row.table != "entry by entry"
    cost = head.measure(row.head, shape, bare, row.fused)
    if isinstance(cost, str):
        return {"reason": cost}
    elements = row.tokens * row.vocab * row.dim
    found: Line = {"forward_backward_ms": cost.both * 1e3, "forward_ms": cost.forward * 1e3}
    if bare:
        found |= {"products_ms": cost.bare * 1e3, "ratio": cost.both / cost.bare}
    else:
        found |= {"forward_telem_s": elements / cost.forward / 1e12, "both_telem_s": elements / cost.both / 1e12}
    found["extra_mib"] = None if cost.extra_bytes is None else cost.extra_bytes / head.MIB
    if row.tile is not None:
        return found
    if device == "cuda":
        torch.cuda.empty_cache()
    x, w, targets = head.inputs(shape)
    loss = head.loss_of(row.head, row.fused)
    kept: list[torch.Tensor] = []
    split = breakdown(lambda: kept.append(_both(loss, x, w, targets)), x.device)
    norms = [None if t.grad is None else t.grad.float().norm().item() for t in (x, w)]
    found |= {"device_ms": split.total_ms, "launches": split.launches}
    found |= dict(zip(COMPARED, (kept[0].item(), *norms), strict=True))
    return {**found, "kernels": split.kernels}


def _both(loss: Callable[..., Any], x: Any, w: Any, targets: Any) -> Any:
    value = loss(x, w, targets)
    value.backward()
    return value.detach()


def worker(first: int, seconds: float, small: bool) -> int:
    """Measures rows from `first` on and prints a JSON line for each thing that is known."""
    deadline = time.monotonic() + seconds
    import torch

    from benchmarks import head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rivals = [name for name in RIVALS if importlib.util.find_spec(head.NEIGHBOURS[name][1])]
    skipped = {name: f"{head.NEIGHBOURS[name][1]} is not installed" for name in RIVALS if name not in rivals}
    tiles: Sequence[Any] = ()
    if device == "cuda":
        from model.kernels import triton_fused

        tiles = triton_fused.TILES
    else:
        skipped["tiles of the fused product"] = "needs a GPU"
    rows = plan(small, (False, True), rivals, len(tiles))
    say({"rows": [row.label for row in rows], "skipped": skipped})
    for index in range(first, len(rows)):
        row = rows[index]
        if deadline - time.monotonic() < (0 if small else NEED_S):
            return 0
        named = {key: value for key, value in asdict(row).items() if key not in ("table", "fused", "tile")}
        named["design"] = row.design
        say({"begun": index})
        try:
            if row.tile is None:
                found = measured(row, device, small)
            else:
                named["tile"] = str(tiles[row.tile])
                with with_tile(triton_fused, tiles[row.tile]) as used:
                    found = measured(row, device, small)
                if not used:
                    found = {"reason": "the tile could not be chosen"}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"}
        say({"done": index, "table": row.table, "row": {**named, **found}})
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # the device no longer works for this process
                return 3
    return 0


def say(line: Line) -> None:
    """One line of JSON on standard output, at once: the watcher reads it."""
    print(to_json(line), flush=True)


# ---- who watches it


def lines_of(pipe: IO[bytes]) -> queue.Queue[Line | None]:
    """The JSON lines of a pipe as they come; None at its end."""
    found: queue.Queue[Line | None] = queue.Queue()

    def read() -> None:
        for line in pipe:
            with suppress(ValueError):  # what a library prints
                if line.startswith(b"{"):
                    found.put(json.loads(line))
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


class Watched:
    """The rows over all workers."""

    def __init__(self, findings: Findings, command: Sequence[str]) -> None:
        self.findings, self.command = findings, command
        self.rows: list[str] = []
        self.next = 0

    def run(self) -> None:
        """Starts workers, one after the other, until all rows are done or there is no time for another."""
        for _ in range(12):  # workers
            before = self.next
            if not self._worker() or self.findings.left_s < NEED_S:
                break
            if not self.rows:
                self.findings.problem("the worker ended before it had begun; its output is in the log")
                return
            if self.next == before:  # it fell between two rows
                self.next += 1
        for label in self.rows[self.next :]:
            self.findings.leave_out(label)

    def _worker(self) -> bool:
        """Runs one worker; whether there is something left for another."""
        findings = self.findings
        words = [*self.command, str(self.next), "--seconds", f"{findings.left_s:.1f}"]
        process = start([*words, "--small"] if findings.small else words, subprocess.PIPE)
        assert process.stdout is not None
        lines, begun, limit_s = lines_of(process.stdout), None, FIRST_LINE_S
        try:
            while True:
                try:
                    line = lines.get(timeout=max(0.1, min(limit_s, findings.left_s)))
                except queue.Empty:
                    if begun is not None:
                        self._lost(begun, f"no answer within {min(limit_s, findings.left_s):.0f} s")
                    return True
                if line is None:
                    code = finish(process, ENDING_S)
                    if begun is not None:
                        self._lost(begun, f"its process ended with code {code}")
                    return code != 0 or begun is not None
                limit_s = ROW_S
                if "rows" in line:
                    self.rows = line["rows"]
                    findings.skipped |= line["skipped"]
                elif "begun" in line:
                    begun = line["begun"]
                else:
                    begun, self.next = None, line["done"] + 1
                    self._take(line["table"], line["row"])
        finally:
            end(process)
            process.stdout.close()

    def _lost(self, index: int, why: str) -> None:
        self.findings.problem(f"{self.rows[index]}: {why}")
        self.next = index + 1

    def _take(self, table: str, row: Line) -> None:
        named = f"{row['head']} ({row['design']}), N {row['tokens']:,}, D {row['dim']}, V {row['vocab']:,}"
        kernels = row.pop("kernels", [])
        error = row.pop("error", None)
        self.findings.row(table, **row)
        for kernel in kernels:
            self.findings.row("kernels", row=named, **kernel)
        if error:
            self.findings.problem(f"{named}: {error}")
        for other in self.findings.tables[table][:-1]:
            self._compare(other, row, named)
        self._tell()

    def _compare(self, one: Line, two: Line, named: str) -> None:
        """The two designs of one head must find the same."""
        same = ("head", "tokens", "dim", "vocab")
        if any(one.get(key) != two.get(key) for key in same) or one["design"] == two["design"]:
            return
        for key in COMPARED:
            a, b = one.get(key), two.get(key)
            if a is not None and b is not None and abs(a - b) > APART * abs(a):
                self.findings.problem(f"{named}: {key} is {b:.6g}, and {a:.6g} with the other design")

    def _tell(self) -> None:
        """The headline: ratios of the first shape, and Manhattan's speed."""
        products = self.findings.tables.get("products", [])
        first = [(row["dim"], row["vocab"]) for row in products[:1]]
        told = []
        for head in PRODUCTS:
            ratios = [
                f"{row['ratio']:.2f}x {row['design']}"
                for row in products
                if row["head"] == head and (row["dim"], row["vocab"]) in first and row.get("ratio")
            ]
            if ratios:
                told.append(f"{head} {', '.join(ratios)}")
        for row in self.findings.tables.get("entry by entry", []):
            if row["head"] == "manhattan" and row.get("forward_telem_s"):
                told.append(f"L1 forward {row['forward_telem_s']:.3g} Telem/s")
        self.findings.headline = told
        self.findings.save()


def measure(findings: Findings) -> None:
    """The rows by a worker that is this module."""
    Watched(findings, [sys.executable, "-m", "benchmarks.gpu.head", "--first"]).run()


if __name__ == "__main__":
    command = parser("gpu.head", "The worker of the stage `head`.")
    command.add_argument("--first", type=int, default=0, help="the row to begin with")
    command.add_argument("--seconds", type=float, default=600.0)
    command.add_argument("--small", action="store_true")
    args = command.parse_args()
    sys.exit(worker(args.first, args.seconds, args.small))
