"""`python -m benchmarks.plan`: what `launch plan` predicts against what ranks on this machine's CPU allocate and send.

Small models are trained for a few steps over gloo at every ZeRO stage and with several vocabulary groups. Of one step,
counted on rank 0: the bytes of what stands, by kind, at the end of its last backward pass; those that the forward pass
keeps; the most that was there at once; and the bytes that collectives were called with, by kind and group. Time is not
compared: a CPU says nothing of a GPU's.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.measuring import parser, wide_console
from launch import host
from launch.cluster import Cluster
from launch.footprint import memory, tokens_kept, traced
from launch.traffic import collectives
from pretrain.activations import Alive
from pretrain.config import RunConfig, from_tree
from tests.support.ranks import run_ranks

TOLERANCE = 0.1  # of a prediction
COLLECTIVES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
SMALL = 10_000  # bytes of a kind of collective that the plan leaves out: norms, flags, traces' checksums


def config(
    world: int, zero: int, vocab: int, precision: str = "bf16", passes: int = 1, micro: int = 1, **model: Any
) -> RunConfig:
    """A model of 0.9 M parameters in the trunk and 0.5 M in the head, GPT-2's kind unless `model` says otherwise:
    sequences long enough for fused attention.
    """
    length = 320
    return from_tree(
        {
            "run": "unused",
            "data": {"path": "unused", "source": {"kind": "embedded"}, "tokenizer": {"vocab_size": 4000}},
            "model": {"seq_len": length, "layers": 2, "heads": 4, "dim": 128, **model},
            "head": {"chunk_mib": 1},
            "train": {
                "steps": 1,
                "tokens_per_step": length * world * passes * micro,
                "micro_batch": micro,
                "precision": precision,
            },
            "optim": {"lr": 1e-4},
            "parallel": {"zero": zero, "vocab": vocab},
            "deepspeed": {
                "zero_optimization": {
                    "reduce_bucket_size": 200_000,
                    "stage3_prefetch_bucket_size": 50_000,
                    "stage3_param_persistence_threshold": 1_000,
                    "stage3_max_live_parameters": 600_000,
                    "stage3_max_reuse_distance": 100_000,
                }
            },
        }
    )


def name_of(cfg: RunConfig, world: int) -> str:
    """A configuration on `world` ranks, in words that tell it from the others of `cases`."""
    extra = [word for word, on in (("tied", cfg.model.tied), ("recomputed", cfg.model.activation_checkpointing)) if on]
    passes = cfg.accumulation(world)
    return ", ".join(
        [cfg.train.precision, f"ZeRO {cfg.parallel.zero}", f"vocab {cfg.parallel.vocab} of {world}", *extra]
        + [f"{passes} passes"] * (passes > 1)
        + [f"micro-batch {cfg.train.micro_batch}"] * (cfg.train.micro_batch > 1)
    )


def cases(world: int) -> list[RunConfig]:
    """What is compared on `world` ranks; two of them take most of the variants."""
    groups = [k for k in (1, 2, 4) if k <= world]
    configs = [config(world, zero, groups[zero % len(groups)]) for zero in (1, 2, 3)]
    configs += [config(world, 1, k) for k in groups if k != groups[1 % len(groups)]]
    if world == 2:
        configs += [config(world, zero, 2, "float32") for zero in (0, 1, 2, 3)]
        configs += [config(world, zero, 2, passes=2) for zero in (1, 2, 3)]
        configs += [config(world, zero, 2, activation_checkpointing=True) for zero in (1, 3)]
        configs += [config(world, 1, 2, "float32", passes=2)]
        configs += [config(world, 2, 2, tied=True)]
        configs += [config(world, zero, 2, micro=4) for zero in (1, 2, 3)]
        configs += [
            config(world, 3, 2, micro=8, activation_checkpointing=True),
            config(world, 2, 2, micro=4, tied=True),
        ]
    return configs


def predicted(cfg: RunConfig, world: int) -> dict[str, float]:
    """Bytes by kind, as `measured` names them."""
    cluster = Cluster(gpus=world)
    planned = memory(cfg, cluster)
    standing: Counter[str] = Counter(planned.standing)
    gradients = standing["trunk gradients in float32"] + standing["trunk gradients"]
    gradients += planned.phases["update"].get("trunk gradients", 0)  # where they come and go
    on_host = {what: size // cluster.ranks_per_node for what, size in host.memory(cfg, cluster).items()}
    offloaded = sum(size for what, size in on_host.items() if what.startswith("offloaded"))
    standing["trunk masters"] += on_host.get("offloaded masters and moments", 0)  # a CPU has one memory for both
    standing["trunk weights"] += on_host.get("offloaded weights", 0)
    gradients += on_host.get("offloaded gradients and buffers", 0)
    kept = {
        "trunk weights": standing["trunk weights"],
        "trunk masters and moments": standing["trunk masters"] + standing["trunk moments"],
        "trunk gradients": gradients + standing["reduction buffers"],
        "head": standing["head masters"] + standing["head moments"] + standing["head gradients"],
        "activations": traced(cfg).kept + tokens_kept(cfg, cluster),
        "peak": planned.peak + offloaded,
    }
    sent: Counter[str] = Counter()
    for call in collectives(cfg, cluster):
        sent[f"{call.kind} of {call.ranks}"] += call.payload
    return {**kept, **sent}


def measured(configs: list[RunConfig]) -> list[dict[str, float]]:
    """The same, counted on this rank."""
    from pretrain.runtime import ranks as process

    ranks = process.start_command()
    from pretrain.engine import Trainer  # DeepSpeed asks which accelerator there is: start() has said

    steps = []
    for cfg in configs:
        own = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
        trainer = Trainer(cfg, own, eos_id=0)
        shape = (cfg.train.micro_batch, cfg.model.seq_len + 1 if cfg.model.causal else 2 * cfg.model.seq_len)
        batches = [torch.randint(cfg.model.vocab_size, shape) for _ in range(cfg.accumulation(ranks.world))]
        for _ in range(2):  # moments are made in the first, ZeRO 3 learns the order of modules
            trainer.train_step(batches, 1e-4)
        with Watch() as watch:
            for tensor in (t for tensors in standing(trainer).values() for t in tensors):
                watch.add(tensor)
            with at_boundary(trainer) as kinds, kept(trainer) as sizes:
                trainer.train_step(batches, 1e-4)
        sent = {f"{kind} of {size}": count for (kind, size), count in watch.sent.items() if count > SMALL}
        steps.append({**kinds, "activations": sizes[0], "peak": watch.most, **sent})
        trainer.engine.destroy()
    return steps


class Watch(Alive):
    """Counts the bytes of storages that are alive, and those that collectives are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, int]] = Counter()

    def add(self, tensor: Tensor) -> None:
        """As Alive.add; meta tensors have no storage here."""
        if tensor.device.type != "meta":
            super().add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, func: Any, args: Any) -> None:
        name = func._schema.name.removeprefix("c10d::")
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        self.sent[COLLECTIVES.get(name, name), group.size()] += max((t.nbytes for t in tensors), default=0)


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())  # type: ignore[attr-defined]


def standing(trainer: Any) -> dict[str, list[Tensor]]:
    """The tensors that trainer and DeepSpeed hold, by kind: a storage may be in several, the first counts."""
    module, optimizer = trainer.engine.module, trainer.engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    masters = [p for group in base.param_groups for p in group["params"]]
    weights = [p.data for p in module.parameters()]
    weights += [p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    moments = [t for state in base.state.values() for t in state.values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in (*module.parameters(), *masters)]
    head = list(trainer.head.parameters())
    head_moments = [t for state in trainer.head_optimizer.state.values() for t in state.values()]
    return {
        "trunk weights": weights,
        "trunk masters and moments": [p.data for p in masters] + moments,
        "head": [*(p.data for p in head), *(p.grad for p in head if p.grad is not None), *head_moments],
        "trunk gradients": [g for g in gradients if g is not None] + list(_tensors_of(vars(optimizer))),
    }


def _tensors_of(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Whatever else DeepSpeed's optimiser holds: gradients and the buffers that they pass through."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors_of(item, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_of(item, depth - 1)
    elif depth and "Bucket" in type(value).__name__:
        yield from _tensors_of(vars(value), depth - 1)


@contextmanager
def at_boundary(trainer: Any) -> Iterator[dict[str, float]]:
    """Fills in the bytes of what stands when the last backward pass of an update is done."""
    found: dict[str, float] = {}
    step = trainer.engine.step

    def counted() -> Any:
        if trainer.engine.is_gradient_accumulation_boundary():
            seen: set[int] = set()
            for kind, tensors in standing(trainer).items():
                found[kind] = 0
                for tensor in tensors:
                    storage = tensor.untyped_storage()
                    if tensor.device.type != "meta" and storage._cdata not in seen:
                        seen.add(storage._cdata)
                        found[kind] += storage.nbytes()
        return step()

    with mock.patch.object(trainer.engine, "step", counted):
        yield found


@contextmanager
def kept(trainer: Any) -> Iterator[list[float]]:
    """Fills in the bytes that a forward pass of the trunk keeps, weights not counted, with the hidden states."""
    sizes: list[float] = []
    hidden = trainer.hidden

    def counted(inputs: Tensor, *documents: int | None) -> Tensor:
        found: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            weights = {p.untyped_storage()._cdata for p in trainer.engine.module.parameters()}  # ZeRO 3 moves them
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                found[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = hidden(inputs, *documents)
        found[out.untyped_storage()._cdata] = out.untyped_storage()
        sizes.append(sum(storage.nbytes() for storage in found.values()))
        found.clear()  # the hooks live as long as the graph
        return out

    with mock.patch.object(trainer, "hidden", counted):
        yield sizes


@dataclass(frozen=True)
class Compared:
    """Bytes of one kind, planned and counted."""

    case: str
    kind: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Planned to measured; infinite for what was planned and never seen."""
        return self.predicted / self.measured if self.measured else float("inf")

    @property
    def agrees(self) -> bool:
        """Whether the plan is within TOLERANCE."""
        return abs(self.ratio - 1) <= TOLERANCE


def compare(world: int, configs: list[RunConfig], folder: Path) -> list[Compared]:
    """Runs the configurations on `world` ranks; every kind that is planned or was seen."""
    seen = run_ranks(measured, world, folder, configs=configs)[0]
    return [
        one for cfg, counts in zip(configs, seen, strict=True) for one in pairs(name_of(cfg, world), cfg, counts, world)
    ]


def pairs(case: str, cfg: RunConfig, seen: dict[str, float], world: int) -> Iterator[Compared]:
    """Every kind that is planned for a case or was seen."""
    planned = predicted(cfg, world)
    for kind in {**planned, **seen}:
        pair = planned.get(kind, 0), seen.get(kind, 0)
        if max(pair) > SMALL:
            yield Compared(case, kind, *pair)


def show(console: Console, compared: Iterable[Compared]) -> None:
    """Prints a row for each case and kind, and how many agree."""
    table = Table("case", "bytes of", "planned, kB", "measured, kB", "planned / measured")
    last, off, count = "", 0, 0
    for one in compared:
        table.add_row(
            one.case if one.case != last else "", one.kind, f"{one.predicted / 1e3:,.0f}", f"{one.measured / 1e3:,.0f}",
            f"{one.ratio:.3f}" + ("" if one.agrees else " *"),
        )  # fmt: skip
        last, off, count = one.case, off + (not one.agrees), count + 1
    console.print(table)
    console.print(f"{count - off} of {count} within {TOLERANCE:.0%}" + "; * marks the others" * bool(off))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    command = parser("plan", __doc__)
    command.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default 2 4)")
    with tempfile.TemporaryDirectory() as place:
        worlds = command.parse_args(argv).worlds
        show(wide_console(120), [one for world in worlds for one in compare(world, cases(world), Path(place))])


if __name__ == "__main__":
    main()
