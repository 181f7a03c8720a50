"""What a run will take, before it is queued: parameters, memory of a GPU, traffic, time and energy. Arithmetic only:
no GPU, no data and no process is touched, and nothing here was measured.

Memory and traffic follow from what the code allocates and sends (launch/footprint.py, launch/traffic.py). Time and
energy rest on assumptions, all of which are printed with the plan.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from common import command
from common.errors import ConfigError
from common.gpus import GIB, GPUS
from common.plain import to_json
from common.units import duration, energy
from launch.cluster import HOP_S, LINK_EFFICIENCY, USABLE, Cluster
from launch.footprint import (
    ZERO_DEFAULTS,
    Memory,
    Parameters,
    activations,
    by_product,
    memory,
    parameters,
    prototype_elements,
    vocab_ranks,
    zero_stage,
)
from launch.traffic import Collective, collectives

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute_s: float
    exposed_s: float  # communication that no computation hides
    update_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.update_s


@dataclass(frozen=True)
class Plan:
    """What `plan` found, in bytes, seconds, tokens and joules."""

    cluster: Cluster
    parameters: Parameters
    zero: int  # as it runs
    vocab_ranks: int
    accumulation: int
    memory: Memory
    usable_bytes: int
    memory_by_stage: Mapping[int, Memory]  # the same run at each ZeRO stage
    activation_bytes: Mapping[str, int]  # kept and recomputed
    collectives: tuple[Collective, ...]
    time: StepTime
    tokens_per_step: int
    budget_tokens: int
    largest_micro_batch: int | None  # that fits; None: not even one sequence
    changes: tuple[str, ...] | None  # the cheapest that make it fit; None: none was found
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable_bytes

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.time.total_s

    @property
    def seconds(self) -> float:
        return self.budget_tokens / self.tokens_per_s

    @property
    def gpu_j(self) -> float:
        return self.seconds * self.cluster.gpus * self.cluster.hardware.watts

    def as_dict(self) -> dict[str, Any]:
        """Plain values, derived ones included, in the units of their names."""
        return {
            "cluster": {**asdict(self.cluster), "hardware": asdict(self.cluster.hardware)},
            "parameters": {**asdict(self.parameters), "total": self.parameters.total},
            "zero": self.zero,
            "vocab_ranks": self.vocab_ranks,
            "accumulation": self.accumulation,
            "memory": _plain(self.memory),
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "memory_by_stage": {str(stage): _plain(memory) for stage, memory in self.memory_by_stage.items()},
            "activation_bytes": dict(self.activation_bytes),
            "collectives": [
                {
                    **asdict(one),
                    "sent_bytes": one.wire,
                    "between_nodes_bytes": one.between_nodes,
                    "seconds": one.seconds(self.cluster.hardware),
                }
                for one in self.collectives
            ],
            "time": {**asdict(self.time), "total_s": self.time.total_s},
            "tokens_per_s": self.tokens_per_s,
            "budget_tokens": self.budget_tokens,
            "seconds": self.seconds,
            "days": self.seconds / 86400,
            "gpu_kwh": self.gpu_j / 3.6e6,
            "largest_micro_batch": self.largest_micro_batch,
            "changes": self.changes,
            "assumed": assumptions(self.cluster),
            "notes": self.notes,
        }


def _plain(memory: Memory) -> dict[str, Any]:
    phases = {name: dict(items) for name, items in memory.phases.items()}
    return {"standing": dict(memory.standing), "phases": phases, "fullest": memory.fullest, "peak": memory.peak}


def plan(cfg: RunConfig, cluster: Cluster, budget_tokens: float | None = None) -> Plan:
    """What a run of `cfg` takes on `cluster`.

    Args:
        budget_tokens: of the whole run; None: the configuration's steps.
    Raises:
        ConfigError: the cluster's ranks cannot share the batch or the prototypes.
    """
    _check(cfg, cluster)
    if budget_tokens is not None and not 1 <= budget_tokens < math.inf:
        raise ConfigError(f"--budget-tokens {budget_tokens}: expected 1 or more")
    return Plan(
        cluster=cluster,
        parameters=parameters(cfg),
        zero=zero_stage(cfg),
        vocab_ranks=vocab_ranks(cfg, cluster),
        accumulation=cfg.accumulation(cluster.gpus),
        memory=memory(cfg, cluster),
        usable_bytes=cluster.usable_bytes,
        memory_by_stage={stage: memory(altered(cfg, parallel={"zero": stage}), cluster) for stage in range(4)},
        activation_bytes={
            "kept": activations(altered(cfg, model={"activation_checkpointing": False})),
            "recomputed": activations(altered(cfg, model={"activation_checkpointing": True})),
        },
        collectives=tuple(collectives(cfg, cluster)),
        time=step_time(cfg, cluster),
        tokens_per_step=cfg.train.tokens_per_step,
        budget_tokens=int(budget_tokens or 0) or cfg.train.steps * cfg.train.tokens_per_step,
        largest_micro_batch=largest_micro_batch(cfg, cluster),
        changes=cheapest_changes(cfg, cluster),
        notes=tuple(_notes(cfg, cluster)),
    )


def _check(cfg: RunConfig, cluster: Cluster) -> None:
    from pretrain.config import check_layout

    sequences = cfg.sequences_per_step()
    if sequences % cluster.gpus:
        possible = [gpus for gpus in divisors(sequences) if cluster.could_be(gpus)]
        raise ConfigError(
            f"--gpus {cluster.gpus}: train.tokens_per_step={cfg.train.tokens_per_step} is {sequences} sequences, which "
            f"{cluster.gpus} GPUs cannot share. Possible: {', '.join(map(str, possible))}."
        )
    check_layout(cfg, cluster.gpus, cluster.ranks_per_node)
    zero = cfg.deepspeed.get("zero_optimization", {})
    for name in ZERO_DEFAULTS:
        value = zero.get(name, 1) if isinstance(zero, dict) else zero
        if name != "overlap_comm" and not (isinstance(value, int | float) and value > 0):
            raise ConfigError(f"deepspeed.zero_optimization.{name}: given {value}; a plan needs a number above 0")


def altered(cfg: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The same configuration with some values of its sections changed."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    )


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def step_time(cfg: RunConfig, cluster: Cluster) -> StepTime:
    """Of one update.

    Matrix products run at a fraction of the peak, attention as if it were not causal; where blocks are recomputed the
    trunk takes one more forward pass. AdamW reads a master, two moments and a gradient and writes the first three: 28
    bytes for each parameter of a rank.
    """
    model, gpu = cfg.model, cluster.hardware
    head = model.head_flops_per_token()
    trunk = (model.flops_per_token() - head) * (4 / 3 if model.activation_checkpointing else 1)
    peak = gpu.bf16_flops if cfg.train.precision == "bf16" else gpu.float32_flops
    rate = cluster.gpus * cluster.mfu * peak
    work = {"trunk": cfg.train.tokens_per_step * trunk / rate, "head": cfg.train.tokens_per_step * head / rate}
    hidden = {"nothing": 0.0, **work}
    exposed = {name: -room for name, room in hidden.items()}
    for one in collectives(cfg, cluster):
        exposed[one.behind] += one.seconds(gpu)
    own = parameters(cfg).trunk if zero_stage(cfg) == 0 else -(-parameters(cfg).trunk // cluster.gpus)
    return StepTime(
        compute_s=sum(work.values()),
        exposed_s=sum(max(0.0, seconds) for seconds in exposed.values()),
        update_s=28 * (own + prototype_elements(cfg, cluster)) / gpu.memory_bytes_s,
    )


def _fits(cfg: RunConfig, cluster: Cluster) -> bool:
    return memory(cfg, cluster).peak <= cluster.usable_bytes


def largest_micro_batch(cfg: RunConfig, cluster: Cluster) -> int | None:
    """The largest that shares the batch evenly and fits; None: not even one sequence does."""
    sizes = divisors(cfg.sequences_per_step() // cluster.gpus)
    return next((size for size in reversed(sizes) if _fits(altered(cfg, train={"micro_batch": size}), cluster)), None)


def cheapest_changes(cfg: RunConfig, cluster: Cluster) -> tuple[str, ...] | None:
    """What makes a run fit that does not: the first of activation checkpointing, a higher ZeRO stage, a larger
    vocabulary group, a smaller micro-batch and more GPUs that is enough alone; else they are added up in this order.
    Empty: it fits. None: nothing helps.
    """
    if _fits(cfg, cluster):
        return ()
    rungs = (_checkpointed, _higher_stage, _larger_group, _smaller_batch, _more_gpus)
    for rung in rungs:
        for told, changed, where in rung(cfg, cluster):
            if _fits(changed, where):
                return (told,)
    done: tuple[str, ...] = ()
    for rung in rungs:
        last = None
        for told, changed, where in rung(cfg, cluster):
            if _fits(changed, where):
                return (*done, told)
            last = told, changed, where
        if last is not None:
            told, cfg, cluster = last
            done = (*done, told)
    return None


Change = tuple[str, "RunConfig", Cluster]


def _checkpointed(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if not cfg.model.activation_checkpointing:
        changed = altered(cfg, model={"activation_checkpointing": True})
        yield "model.activation_checkpointing=true", changed, cluster


def _higher_stage(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for stage in range(zero_stage(cfg) + 1, 4):
        yield f"parallel.zero={stage}", altered(cfg, parallel={"zero": stage}), cluster


def _larger_group(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for size in divisors(cluster.gpus):
        if size > vocab_ranks(cfg, cluster):
            yield f"parallel.vocab={size}", altered(cfg, parallel={"vocab": size}), cluster


def _smaller_batch(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for size in reversed(divisors(cfg.sequences_per_step() // cluster.gpus)):
        if size < cfg.train.micro_batch:
            yield f"train.micro_batch={size}", altered(cfg, train={"micro_batch": size}), cluster


def _more_gpus(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    sequences = cfg.sequences_per_step()
    for gpus in divisors(sequences):
        if gpus > cluster.gpus and gpus % cluster.gpus == 0 and cluster.could_be(gpus):
            size = max(k for k in divisors(sequences // gpus) if k <= cfg.train.micro_batch)
            told = f"--gpus {gpus}" + (f" train.micro_batch={size}" if size != cfg.train.micro_batch else "")
            yield told, altered(cfg, train={"micro_batch": size}), replace(cluster, gpus=gpus)


def assumptions(cluster: Cluster) -> list[str]:
    """Everything that the figures of time and energy, and the room for memory, rest on."""
    gpu = cluster.hardware
    return [
        f"{USABLE:.0%} of {gpu.memory / GIB:.0f} GiB can be used: the rest is CUDA, NCCL and fragmentation",
        f"matrix products reach {cluster.mfu:.0%} of the peak of {gpu.bf16_flops / 1e12:.0f} TFLOP/s in bf16, "
        f"{gpu.float32_flops / 1e12:.0f} in float32; attention is counted whole, and nothing else costs time",
        f"{gpu.link_bytes_s / 1e9:.0f} GB/s inside a node and {gpu.network_bytes_s / 1e9:.4g} GB/s between nodes, per "
        f"GPU and direction, of which {LINK_EFFICIENCY:.0%} is reached; {HOP_S * 1e6:.0f} us from rank to rank",
        "every collective is a ring over all links at once; an all-reduce has the latency of a tree",
        "at ZeRO 3 communication of the trunk hides behind all of its computation, at 0 to 2 nothing does (without "
        "overlap_comm); the head's maxima, sums and scattered gradients hide behind its own, gathered hidden states "
        "do not; nor do prototype gradients",
        f"every GPU draws {gpu.watts:.0f} W" + ("" if cluster.watts else ", the most that its board takes"),
        "hosts, network and cooling take no energy",
    ]


def _notes(cfg: RunConfig, cluster: Cluster) -> Iterator[str]:
    """What the reader of this plan in particular should know."""
    if zero_stage(cfg) != cfg.parallel.zero:
        yield "bf16 at ZeRO stage 0 runs as stage 1"
    if not by_product(cfg):
        yield f"head.distance={cfg.head.distance} goes entry by entry: the time is a lower bound"
    if cfg.train.precision == "bf16" and not cluster.hardware.has_bf16:
        yield f"{cluster.gpu} has no bf16 units: its peak is that of float16, which bf16 will not reach"
    if cfg.model.compile:
        yield "model.compile: compiled blocks may keep less for the backward pass than is planned"
    known = {f"zero_optimization.{name}" for name in ZERO_DEFAULTS}
    given = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in cfg.deepspeed.items()
        for inner in (value if isinstance(value, dict) else ("",))
    }
    unknown = sorted(given - known)
    if unknown:
        yield f"not counted: deepspeed.{', deepspeed.'.join(unknown)}"


def parser() -> argparse.ArgumentParser:
    made = command.parser(
        "plan",
        "Plan a run: parameters, memory of a GPU, traffic, time and energy. Arithmetic on stated assumptions: needs no "
        "GPU and no data, and measures nothing.",
        [
            "configs/gpt2-124m-untied.yaml --gpus 32",
            "configs/gpt2-1.5b-untied.yaml --gpus 64 --gpu a100-40gb --link 12.5 parallel.zero=3",
            "configs/gpt2-124m-untied.yaml --budget-tokens 10e9 --json",
        ],
    )
    command.add_config(made, "gpt2-1.5b")
    default = Cluster()
    made.add_argument("--gpus", type=int, metavar="N", default=default.gpus, help="of all nodes (%(default)s)")
    made.add_argument("--gpu", metavar="NAME", default=default.gpu, help=f"{', '.join(GPUS)} (%(default)s)")
    made.add_argument("--gpus-per-node", type=int, metavar="N", default=default.per_node, help="(%(default)s)")
    made.add_argument(
        "--link", type=float, metavar="GB/S", help="between nodes, per GPU and direction (default: reference system's)"
    )
    made.add_argument(
        "--mfu", type=float, metavar="F", default=default.mfu, help="fraction of the peak that is reached (%(default)s)"
    )
    made.add_argument("--watts", type=float, metavar="W", help="drawn by a GPU (default: the most that it takes)")
    made.add_argument("--budget-tokens", type=float, metavar="N", help="of the whole run (default: of train.steps)")
    made.add_argument("--json", action="store_true", help="plain values instead of tables")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(tell, command.parse(parser(), argv))


def tell(asked: argparse.Namespace) -> None:
    """Prints the plan that the command line asks for. Raises ConfigError."""
    from pretrain.config import load

    cfg = load(asked.config, asked.overrides)
    cluster = Cluster(
        gpu=asked.gpu,
        gpus=asked.gpus,
        per_node=asked.gpus_per_node,
        network_bytes_s=None if asked.link is None else asked.link * 1e9,
        mfu=asked.mfu,
        watts=asked.watts,
    )
    found = plan(cfg, cluster, asked.budget_tokens)
    if asked.json:
        print(to_json(found.as_dict(), indent=1))
    else:
        _print(found)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _print(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(120, Console().width), highlight=False)
    own, cluster, time = found.parameters, found.cluster, found.time
    tables = [
        f"token embedding {own.token_embedding:,}" if own.token_embedding else "tied: the prototypes embed tokens too",
        *([f"positions {own.positions:,}"] if own.positions else []),
    ]
    console.print(f"{own.total:,} parameters: trunk {own.trunk:,} ({', '.join(tables)}), head {own.head:,}")
    passes = f"{found.accumulation} pass{'es' * (found.accumulation > 1)}"
    console.print(
        f"{cluster.gpus} x {cluster.gpu}, {cluster.ranks_per_node} in a node; ZeRO {found.zero}, vocabulary groups of "
        f"{found.vocab_ranks}, {passes} per step. Planned, not measured."
    )
    console.print(_memory_table(found, Table(title="memory of a GPU, GiB", title_justify="left")))
    for name, size in found.activation_bytes.items():
        console.print(f"activations {name}: {_gib(size)} GiB")
    verdict = "fits" if found.fits else "does not fit"
    console.print(
        f"{verdict}: {_gib(found.memory.peak)} of {_gib(found.usable_bytes)} GiB, in the phase `{found.memory.fullest}`"
    )
    if found.changes is None:
        console.print("no change of checkpointing, ZeRO stage, vocabulary group, micro-batch or GPUs makes it fit")
    elif found.changes:
        console.print(f"it would with {' '.join(found.changes)}")
    console.print(f"largest micro-batch that fits: {found.largest_micro_batch or 'none'}")
    table = Table(
        "", "", "ranks", "calls", "sent in its node, MB", "between nodes, MB", "takes", "hidden behind",
        title="what a GPU sends in a step", title_justify="left",
    )  # fmt: skip
    for one in found.collectives:
        sent = (one.wire - one.between_nodes, one.between_nodes)
        table.add_row(
            one.what, one.kind, str(one.ranks), f"{one.calls:,}", *(f"{size / 1e6:,.1f}" for size in sent),
            duration(one.seconds(cluster.hardware)), one.behind,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"a step takes {duration(time.total_s)}: {duration(time.compute_s)} computing, {duration(time.exposed_s)} "
        f"waiting for communication, {duration(time.update_s)} updating; {found.tokens_per_s:,.0f} tokens/s"
    )
    console.print(f"{found.budget_tokens:,} tokens take {duration(found.seconds)} and {energy(found.gpu_j)}")
    for note in found.notes:
        console.print(f"note: {note}")
    console.print("assumed:")
    for line in assumptions(cluster):
        console.print(f"- {line}")


def _memory_table(found: Plan, table: Any) -> Any:
    """Kinds of memory by ZeRO stage, standing ones and those of the fullest phase."""
    table.add_column("")
    rows: dict[str, dict[int, int]] = {}
    for stage, one in found.memory_by_stage.items():
        table.add_column(f"ZeRO {stage}", justify="right")
        for name, size in (*one.standing.items(), *one.phases[one.fullest].items()):
            if size:
                rows.setdefault(name, {})[stage] = size
    for name, sizes in rows.items():
        table.add_row(name, *(_gib(sizes[stage]) if stage in sizes else "" for stage in found.memory_by_stage))
    table.add_row("peak", *(_gib(one.peak) for one in found.memory_by_stage.values()))
    table.add_row("in the phase", *(one.fullest for one in found.memory_by_stage.values()))
    return table
