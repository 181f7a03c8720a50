"""What a run will take, before it is queued: parameters, memory of a GPU, traffic, time and energy. Arithmetic only:
no GPU, no data and no process is touched, and nothing here was measured.

Memory and traffic follow from what the code allocates and sends (launch/footprint.py, launch/traffic.py). Time and
energy rest on assumptions, all of which are told with the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common.carbon_intensity import grid_intensity
from common.errors import ConfigError
from common.gpus import GIB
from common.numbers import divisors, listed
from launch import footprint, host
from launch.cluster import HOP_S, LINK_EFFICIENCY, USABLE, Cluster
from launch.fit import altered, cheapest_changes, fits, largest_micro_batch, layouts, settings_between
from launch.footprint import ZERO_DEFAULTS, Memory, Parameters
from launch.traffic import Collective, collectives

if TYPE_CHECKING:
    from pretrain.config import EnergyConfig, RunConfig

WORTH = 0.02  # of a step's time: settings that gain less are not told


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute_s: float
    exposed_s: float  # communication that no computation hides
    update_s: float

    @property
    def total_s(self) -> float:
        """Of the whole update."""
        return self.compute_s + self.exposed_s + self.update_s


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes, seconds, tokens and joules."""

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
    faster: tuple[str, ...]  # settings of the fastest layout that fits; none: this one is as fast, or it does not fit
    faster_s: float  # seconds of its step
    host: Mapping[str, int]  # bytes of the fullest host's memory
    checkpoint_bytes: int
    disk_bytes: int  # of all checkpoints that stay, and a draft
    energy: EnergyConfig
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a GPU has room for the fullest phase, and a host for what is its."""
        return self.memory.peak <= self.usable_bytes and sum(self.host.values()) <= self.cluster.usable_host_bytes

    @property
    def tokens_per_s(self) -> float:
        """Training tokens a second, of all GPUs together."""
        return self.tokens_per_step / self.time.total_s

    @property
    def seconds(self) -> float:
        """Of the whole run's training, without evaluations and saves."""
        return self.budget_tokens / self.tokens_per_s

    @property
    def gpu_j(self) -> float:
        """Joules that all GPUs take in the whole run's training."""
        return self.seconds * self.cluster.gpus * self.cluster.hardware.watts

    @property
    def site_kwh(self) -> float:
        """Kilowatt hours at the site's meter: `energy.pue` times the GPUs'."""
        return self.gpu_j / 3.6e6 * self.energy.pue

    @property
    def gco2e(self) -> float | None:
        """Grams that making the electricity emits; None: no `energy.grid` is given."""
        return None if self.energy.grid is None else self.site_kwh * grid_intensity(self.energy.grid)

    @property
    def cost(self) -> float | None:
        """In the currency of `energy.price_per_kwh`; None: none is given."""
        return None if self.energy.price_per_kwh is None else self.site_kwh * self.energy.price_per_kwh

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
                    **asdict(collective),
                    "sent_bytes": collective.wire,
                    "between_nodes_bytes": collective.between_nodes,
                    "seconds": collective.seconds(self.cluster.hardware),
                }
                for collective in self.collectives
            ],
            "time": {**asdict(self.time), "total_s": self.time.total_s},
            "tokens_per_s": self.tokens_per_s,
            "budget_tokens": self.budget_tokens,
            "seconds": self.seconds,
            "days": self.seconds / 86400,
            "gpu_kwh": self.gpu_j / 3.6e6,
            "site_kwh": self.site_kwh,
            "gco2e": self.gco2e,
            "cost": self.cost,
            "host": dict(self.host),
            "usable_host_bytes": self.cluster.usable_host_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "largest_micro_batch": self.largest_micro_batch,
            "changes": self.changes,
            "faster": self.faster,
            "faster_s": self.faster_s,
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
    fastest = _fastest(cfg, cluster)
    return Plan(
        cluster=cluster,
        parameters=footprint.parameters(cfg),
        zero=cfg.zero_stage(),
        vocab_ranks=footprint.vocab_ranks(cfg, cluster),
        accumulation=cfg.accumulation(cluster.gpus),
        memory=footprint.memory(cfg, cluster),
        usable_bytes=cluster.usable_bytes,
        memory_by_stage={
            stage: footprint.memory(altered(cfg, parallel={"zero": stage}), cluster) for stage in range(4)
        },
        activation_bytes={
            "kept": footprint.traced(altered(cfg, model={"activation_checkpointing": False})).kept,
            "recomputed": footprint.traced(altered(cfg, model={"activation_checkpointing": True})).kept,
        },
        collectives=tuple(collectives(cfg, cluster)),
        time=step_time(cfg, cluster),
        tokens_per_step=cfg.train.tokens_per_step,
        budget_tokens=int(budget_tokens or 0) or cfg.train.steps * cfg.train.tokens_per_step,
        largest_micro_batch=largest_micro_batch(cfg, cluster),
        changes=cheapest_changes(cfg, cluster),
        notes=tuple(_notes(cfg, cluster)),
        faster=settings_between(cfg, fastest),
        faster_s=step_time(fastest, cluster).total_s,
        host=host.memory(cfg, cluster),
        checkpoint_bytes=host.checkpoint_bytes(cfg),
        disk_bytes=host.disk_bytes(cfg),
        energy=cfg.energy,
    )


def _fastest(cfg: RunConfig, cluster: Cluster) -> RunConfig:
    """The fastest layout that fits, or this one where it gains less than WORTH, or does not fit itself."""
    if not fits(cfg, cluster):
        return cfg
    limit = step_time(cfg, cluster).total_s / (1 + WORTH)
    quicker = ((step_time(layout, cluster).total_s, layout) for layout in layouts(cfg, cluster))
    by_time = sorted((pair for pair in quicker if pair[0] < limit), key=lambda pair: pair[0])
    return next((layout for _, layout in by_time if fits(layout, cluster)), cfg)


def _check(cfg: RunConfig, cluster: Cluster) -> None:
    from pretrain.config import check_layout  # brings pydantic, which a command's help does without

    sequences = cfg.sequences_per_step()
    if sequences % cluster.gpus:
        possible = [gpus for gpus in divisors(sequences) if cluster.could_be(gpus)]
        raise ConfigError(
            f"--gpus {cluster.gpus}: train.tokens_per_step={cfg.train.tokens_per_step} is {sequences} sequences, which "
            f"{cluster.gpus} GPUs cannot share. Possible: {listed(possible, 'none')}; or another batch, such as "
            f"train.tokens_per_step={-(-sequences // cluster.gpus) * cluster.gpus * cfg.model.seq_len} "
            "train.micro_batch=1."
        )
    check_layout(cfg, cluster.gpus, cluster.ranks_per_node)
    zero = cfg.deepspeed.get("zero_optimization", {})
    for name in ZERO_DEFAULTS:
        value = zero.get(name, 1) if isinstance(zero, dict) else zero
        if name != "overlap_comm" and not (isinstance(value, int | float) and value > 0):
            raise ConfigError(f"deepspeed.zero_optimization.{name}: given {value}; a plan needs a number above 0")


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
    exposed = {name: -room for name, room in hidden.items()}  # below 0: computing still hides communication
    for collective in collectives(cfg, cluster):
        exposed[collective.behind] += collective.seconds(gpu)
    return StepTime(
        compute_s=sum(work.values()),
        exposed_s=sum(max(0.0, seconds) for seconds in exposed.values()) + host.moving_s(cfg, cluster),
        update_s=host.update_s(cfg, cluster),
    )


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
        "hosts and network take no energy; cooling and losses are energy.pue times the GPUs', 1 unless it is given",
        f"a GPU's share of its host is {gpu.host_link_bytes_s / 1e9:.0f} GB/s each way and "
        f"{gpu.host_memory_bytes_s / 1e9:.0f} GB/s of memory, of which {cluster.usable_host_bytes / GIB:,.0f} GiB of a "
        "host can be used; nothing hides what is offloaded",
    ]


def _notes(cfg: RunConfig, cluster: Cluster) -> Iterator[str]:
    """What the reader of this plan in particular should know."""
    if cfg.zero_stage() != cfg.parallel.zero:
        yield "bf16 at ZeRO stage 0 runs as stage 1"
    if not cfg.head.settings.by_product:
        yield f"head.distance={cfg.head.distance} goes entry by entry: the time is a lower bound"
    if cfg.train.precision == "bf16" and not cluster.hardware.has_bf16:
        yield f"{cluster.gpu} has no bf16 units: its peak is that of float16, which bf16 will not reach"
    if cfg.model.compile:
        yield "model.compile: compiled blocks may keep less for the backward pass than is planned"
    known = {f"zero_optimization.{name}" for name in (*ZERO_DEFAULTS, "offload_optimizer", "offload_param")}
    given = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in cfg.deepspeed.items()
        for inner in (value if isinstance(value, dict) else ("",))
    }
    unknown = sorted(given - known)
    if unknown:
        yield f"not counted: deepspeed.{', deepspeed.'.join(unknown)}"
