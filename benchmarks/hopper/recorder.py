"""A call of the head on tensors without memory: what it launches and moves is counted, its kernels are compiled.

Whatever waits for a result fails here. Legend: N tokens, D width, V prototypes.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.hopper.machine_code import Compiled, Hopper, counted_code
from model import chunks
from model.contractions import Use
from model.distances import resolve
from model.harmonic import harmonic_loss
from model.kernels import choose, gpu, triton_elementwise, triton_fused, triton_rows, triton_scores
from model.vocab_parallel import VocabShard

BUDGET = 5 * 2**30  # of working memory: a 16th of the 80 GiB
SHOWN = ("KIND", "P", "SIGN", "ADD", "UNIT", "SUMMED", "SCALED", "PRODUCT", "MOMENT", "ROUNDS", "BLOCK", "BLOCK_M",
         "BLOCK_V", "BLOCK_D", "BLOCK_A", "BLOCK_K", "STAGES")  # fmt: skip
VIEWS = ("aten.detach", "aten.lift_fresh", "aten.alias")
IN_PLACE = {("triton_fused._gradients", "kept")}


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
    """Stands in for the kernels' launches and the products of one call."""

    distance: str
    fused: bool
    tokens: int
    width: int
    prototypes: int
    compiling: bool
    count: Count = field(default_factory=Count)
    compiled: dict[str, Compiled] = field(default_factory=dict)
    moved: Counter[str] = field(default_factory=Counter)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 8, **options: Any) -> None:
        """Takes the place of the kernels' `launch`: counts one and what it reads and writes; compiles it if asked."""
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
            stand_ins = [_stand_in(argument) for argument in arguments]
            made = kernel.warmup(*stand_ins, grid=grid, num_warps=warps, **options)
            constants = {key: value for key, value in options.items() if key in SHOWN}
            key = f"{name} {made.hash}"
            if key not in self.compiled:
                self.compiled[key] = counted_code(name, constants, warps, made)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """(M, K) @ (K, N), in float32."""
        self.count.product_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self.count.launches += 1
        self.count.operations["product"] += 1
        return torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)

    def move(self, tensor: Tensor, times: int = 1, numel: int | None = None) -> None:
        """Counts a tensor that is read or written `times` times, by what it grows with; `numel`: of so many entries."""
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


def _log_in_place(name: str, parameter: str, options: dict[str, Any]) -> bool:
    return name == "triton_scores._statistics" and parameter == "values" and options["KIND"] == "log"


class Described:
    """A tensor descriptor over a tensor without memory."""

    def __init__(self, tensor: Tensor, block: list[int]) -> None:
        self.tensor, self.block = tensor, block

    @classmethod
    def from_tensor(cls, tensor: Tensor, block: list[int]) -> Described:
        """As Triton's own, of a (M, N) tensor; rows must start on 16 bytes, as the hardware asks."""
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        assert strides[0] % 16 == 0 and tensor.stride(1) == 1, "tiles need rows that start on 16 bytes"
        return cls(tensor, block)


def _stand_in(argument: Any) -> Any:
    """What Triton asks an argument of while it compiles."""
    if isinstance(argument, Described):
        small = torch.empty(argument.block, dtype=argument.tensor.dtype)
        return TensorDescriptor(small, list(small.shape), list(small.stride()), argument.block)
    return argument.dtype if isinstance(argument, Tensor) else argument


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
        leaves = tree_leaves((arguments, options, result))
        tensors = [x for x in leaves if isinstance(x, Tensor) and x.device.type == "meta"]
        if view or allocated or packet in VIEWS or not tensors or not any(x.numel() for x in tensors):
            return result
        count.launches += 1
        count.operations[packet] += 1
        for tensor in tensors:
            self.recorder.move(tensor)
        return result


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
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


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
    recorder = Recorder(distance, fused, n, d, v, compiling)
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
    entry = resolve(distance, params)
    kernels = choose.fused_kernels_for(x, fused) if entry.by_product else None
    shard = VocabShard(0, v)
    call = chunks.Call(entry, shard, "mean", -100, *chunks.limits(x, shard, None), Use(kernels))
    return len(list(call.chunks(x)))
