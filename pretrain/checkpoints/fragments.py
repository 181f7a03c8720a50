"""Every float32 master and Adam moment of a run as flat fragments with global offsets, whatever ZeRO made of them.

A fragment is this rank's slice of one parameter's values, laid out flat, and knows where it lies in the whole. So
torch's distributed checkpoint can write what one layout holds and read it into any other: no gather, no conversion.
Names: `trunk.<parameter>.<what>` and `head.<parameter>.<what>`, with <what> one of `fp32`, `exp_avg`, `exp_avg_sq`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from model.head import HarmonicHead
from pretrain.checkpoints.folder import MOMENTS


class Fragment(torch.Tensor):
    """The slice [start, start + len(local)) of a flat tensor of `size` values, as torch's distributed checkpoint
    asks for it.
    """

    local: Tensor
    start: int
    writes: bool

    @staticmethod
    def __new__(cls, local: Tensor, start: int, size: int, writes: bool = True) -> Fragment:
        """`local`: flat values of this rank; `writes`: False where another rank holds the same ones and writes them."""
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size([size]), dtype=local.dtype, device=local.device)
        made.local, made.start, made.writes = local, start, writes
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a Fragment is only for checkpoints: {function}")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.local.numel():
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.local.shape)]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        if not self.writes:
            return []
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"Fragment([{self.start}, {self.start + self.local.numel()}) of {self.numel()})"


def head_fragments(head: HarmonicHead, optimizer: torch.optim.Optimizer, writes: bool) -> dict[str, Fragment]:
    """The head's real rows, and its exponent and factor if it trains them; `writes` on one replica of each shard."""
    make_adam_state(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
    fragments = {}
    for name, parameter in head.named_parameters():
        once = writes and (name == "prototypes" or head.shard.rank == 0)
        for what in ("fp32", *MOMENTS):
            values = parameter.data if what == "fp32" else optimizer.state[parameter][what]
            fragments[f"head.{name}.{what}"] = head_fragment(head, name, values, once)
    return fragments


def head_fragment(head: HarmonicHead, name: str, values: Tensor, writes: bool = True) -> Fragment:
    """The real rows of something shaped like the head's parameter `name`; all but prototypes is whole on every rank."""
    flat = values.reshape(-1)
    if name != "prototypes":
        return Fragment(flat, 0, flat.numel(), writes)
    width, shard = values.shape[1], head.shard
    return Fragment(flat[: shard.real * width], shard.start * width, shard.size * width, writes)


def trunk_fragments(engine: Any, part: tuple[int, int] | None = None) -> dict[str, Fragment]:
    """The trunk's masters and moments, read from wherever the engine's optimiser class keeps them.

    Of what every rank has whole, `part` = (rank, world) takes this rank's share, to write it; None: all, to read it.
    """
    inner, masters = _stepped(engine)
    make_adam_state(inner, masters)
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # else groups after the second stay unlinked (DeepSpeed 0.19)
        optimizer._lazy_init_hp_params_optimizer_state()
    fragments = {}
    for name, parameter in engine.module.named_parameters():
        start, size, writes, read = _place(engine, inner, parameter)
        share = part if engine.optimizer is engine.basic_optimizer else None  # stage 0: every rank has all of it
        for what in ("fp32", *MOMENTS):
            local = read(None if what == "fp32" else what).detach().reshape(-1)
            first, end = start, start + local.numel()
            if share is not None:
                first, end = (size * k // share[1] for k in (share[0], share[0] + 1))
            fragments[f"trunk.{name}.{what}"] = Fragment(
                local[first - start : end - start], first, size, writes and end > first
            )
    return fragments


def _place(
    engine: Any, inner: torch.optim.Optimizer, parameter: Any
) -> tuple[int, int, bool, Callable[[str | None], Tensor]]:
    """Where this rank's part of a parameter starts, the whole's size, whether it has any, and how to read it."""
    optimizer = engine.optimizer
    if type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        stored = parameter.ds_tensor.numel()
        start = optimizer._get_param_partition_rank(parameter) * stored
        real = max(0, min(stored, parameter.ds_numel - start))  # the last partition is padded
        return (
            start,
            parameter.ds_numel,
            True,
            lambda key: optimizer._get_fp32_opt_state_partition(parameter, False, key)[0][:real],
        )
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2, BF16_Optimizer
        mapping = parameter._hp_mapping
        if mapping is None:  # none of it is in this rank's partition
            return 0, parameter.numel(), False, lambda key: torch.empty(0)
        return mapping.lp_fragment_address.start, parameter.numel(), True, mapping.get_hp_fragment
    return 0, parameter.numel(), True, lambda key: parameter if key is None else inner.state[parameter][key]


def _stepped(engine: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The torch optimiser inside the engine, and the tensors that it really steps."""
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if name == "DeepSpeedZeroOptimizer":
        return optimizer.optimizer, optimizer.single_partition_of_fp32_groups
    if name == "BF16_Optimizer":
        return optimizer.optimizer, optimizer.fp32_groups_flat_partition
    if name == "DeepSpeedZeroOptimizer_Stage3":
        return optimizer.optimizer, optimizer.fp32_partitioned_groups_flat
    assert optimizer is engine.basic_optimizer, f"a {name}: where does it keep its masters?"
    return optimizer, [p for group in optimizer.param_groups for p in group["params"]]


def make_adam_state(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """What Adam makes at a parameter's first update, where it is not there yet."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})


def finish_load(engine: Any, head_optimizer: torch.optim.Optimizer, updates: int) -> None:
    """After the fragments were filled: the count of updates into Adam, the masters into the compute copies."""
    inner, masters = _stepped(engine)
    for state in (*(inner.state[p] for p in masters), *head_optimizer.state.values()):
        state["step"].fill_(updates)
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2, BF16_Optimizer
        optimizer.update_lp_params()
    elif type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
