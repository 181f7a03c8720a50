"""What a run will take, before it is queued: parameters, memory of a GPU, traffic, time and energy. Arithmetic only:
no GPU, no data and no process is touched, and nothing here was measured.

Memory and traffic follow from what the code allocates and sends: the trunk under DeepSpeed 0.19's ZeRO, the prototypes
beside it (`python -m benchmarks.plan` compares them with what is really allocated and sent). Time and energy rest on
assumptions, all of which are printed with the plan.

Legend: P parameters of the trunk, V prototypes in all, R rows of them on a rank, D width, n tokens of a rank's pass, k
ranks in a vocabulary group, b bytes of the compute dtype.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data.settings import ConfigError
from pretrain.config import RunConfig, check_layout
from pretrain.gpus import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU from its maker's data sheet, and the network of the maker's reference system.

    `link_bytes_s` and `network_bytes_s` count one direction: half of the bidirectional figure that is advertised.
    """

    memory: int  # bytes
    bf16_flops: float  # dense
    float32_flops: float  # without tensor cores, as torch's default is
    memory_bytes_s: float
    link_bytes_s: float  # to the GPUs of its node
    network_bytes_s: float  # to other nodes, its share of the node's adapters
    watts: float  # most that the board draws
    has_bf16: bool = True


# NVIDIA's data sheets (H100 and H200: SXM; A100: SXM4; V100: SXM2), read in 2025, for memory, FLOP/s, bandwidths and
# board power. Networks: DGX H100 and H200 have a 400 Gb/s adapter per GPU, DGX A100 one of 200 Gb/s, DGX-1 four of
# 100 Gb/s for eight V100s, and L40S systems commonly 200 Gb/s per GPU. L40S have no NVLink: PCIe 4.0 x16.
GPUS = {
    "h100-80gb": Gpu(80 * GIB, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9, 700),
    "h200-141gb": Gpu(141 * GIB, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9, 700),
    "a100-80gb": Gpu(80 * GIB, PEAK_FLOPS["A100"], 19.5e12, 2.039e12, 300e9, 25e9, 400),
    "a100-40gb": Gpu(40 * GIB, PEAK_FLOPS["A100"], 19.5e12, 1.555e12, 300e9, 25e9, 400),
    "l40s": Gpu(48 * GIB, PEAK_FLOPS["L40S"], 91.6e12, 0.864e12, 32e9, 25e9, 350),
    "v100-32gb": Gpu(32 * GIB, PEAK_FLOPS["V100"], 15.7e12, 0.9e12, 150e9, 6.25e9, 300, has_bf16=False),
}

# Assumptions, printed with every plan.
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragmentation
MFU = 0.4  # of the peak, reached by the matrix products, recomputed ones included
LINK_EFFICIENCY = 0.8  # of a link's data sheet bandwidth
HOP_S = 5e-6  # from one rank to the next

# model.harmonic.CHUNK_BYTES on a GPU; a test compares them, as plans are made without torch's modules.
CHUNK_BYTES = 2 * GIB
FLAT_BUCKET = 500_000_000  # elements that DeepSpeed's engine reduces at a time outside its ZeRO optimisers
# Settings of deepspeed.zero_optimization that the plan knows, with DeepSpeed's defaults.
ZERO_DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": None,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run is planned for; None takes the data sheet's figure.

    Raises:
        ConfigError: an unknown GPU, or numbers that no cluster has.
    """

    gpu: str = "h100-80gb"
    gpus: int = 8
    per_node: int = 8
    network_bytes_s: float | None = None  # between nodes, per GPU and direction
    mfu: float = MFU
    watts: float | None = None  # drawn by each GPU

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ConfigError(f"--gpu {self.gpu}: expected one of {', '.join(GPUS)}")
        if self.gpus < 1 or self.per_node < 1:
            raise ConfigError(f"--gpus {self.gpus} --gpus-per-node {self.per_node}: expected 1 or more of both")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            below = self.gpus // self.per_node * self.per_node
            raise ConfigError(
                f"--gpus {self.gpus}: expected whole nodes of {self.per_node}, such as {below} or "
                f"{below + self.per_node}; or give another --gpus-per-node"
            )
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu {self.mfu}: expected a fraction of the peak, above 0 and at most 1")
        for name, value in (("--link", self.network_bytes_s), ("--watts", self.watts)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected more than 0")

    @property
    def hardware(self) -> Gpu:
        given = {"network_bytes_s": self.network_bytes_s, "watts": self.watts}
        return replace(GPUS[self.gpu], **{name: value for name, value in given.items() if value is not None})

    @property
    def ranks_per_node(self) -> int:
        return min(self.per_node, self.gpus)

    @property
    def usable_bytes(self) -> int:
        return int(self.hardware.memory * USABLE)


@dataclass(frozen=True)
class Parameters:
    trunk: int  # all of the DeepSpeed engine's module, the embeddings below included
    token_embedding: int  # 0: tied
    positions: int
    head: int

    @property
    def total(self) -> int:
        return self.trunk + self.head


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: what stands through the step, and what comes on top in each of its phases."""

    standing: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def fullest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        return sum(self.standing.values()) + sum(self.phases[self.fullest].values())


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in one update, as seen by one GPU.

    `payload` is what the calls handle in all, in bytes: the tensor of an all-reduce, the gathered side of an all-gather,
    the side before the sum of a reduce-scatter. `behind` is the work that hides it, as far as that lasts.
    """

    what: str
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    ranks: int
    ranks_in_node: int  # of this group
    payload: int
    calls: int
    behind: Literal["nothing", "trunk", "head"]

    @property
    def wire(self) -> float:
        """Bytes that a GPU sends, in a ring."""
        once = self.payload * (self.ranks - 1) / self.ranks
        return 2 * once if self.kind == "all-reduce" else once

    @property
    def between_nodes(self) -> float:
        """Of `wire`, on average over GPUs: one link of a ring in `ranks_in_node` leaves the node."""
        return self.wire / self.ranks_in_node if self.ranks > self.ranks_in_node else 0.0

    def seconds(self, gpu: Gpu) -> float:
        """In a ring over all links of the group at once; an all-reduce that is small climbs a tree instead."""
        bandwidth = gpu.link_bytes_s
        if self.ranks > self.ranks_in_node:
            bandwidth = min(bandwidth, self.ranks_in_node * gpu.network_bytes_s)
        hops = 2 * math.ceil(math.log2(self.ranks)) if self.kind == "all-reduce" else self.ranks - 1
        return self.wire / (bandwidth * LINK_EFFICIENCY) + self.calls * hops * HOP_S


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes, seconds and joules; None where the plan has no say."""

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
    compute_s: float  # of a step
    update_s: float
    exposed_s: float  # communication that nothing hides
    tokens_per_step: int
    budget_tokens: int
    largest_micro_batch: int | None  # that fits; None: not even one sequence
    changes: tuple[str, ...] | None  # the cheapest that make it fit; None: none was found
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable_bytes

    @property
    def step_s(self) -> float:
        return self.compute_s + self.update_s + self.exposed_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s

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
            "memory": _told(self.memory),
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "memory_by_stage": {str(stage): _told(memory) for stage, memory in self.memory_by_stage.items()},
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
            "compute_s": self.compute_s,
            "update_s": self.update_s,
            "exposed_s": self.exposed_s,
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "budget_tokens": self.budget_tokens,
            "days": self.seconds / 86400,
            "gpu_kwh": self.gpu_j / 3.6e6,
            "largest_micro_batch": self.largest_micro_batch,
            "changes": self.changes,
            "assumed": assumptions(self.cluster),
            "notes": self.notes,
        }


def _told(memory: Memory) -> dict[str, Any]:
    phases = {name: dict(items) for name, items in memory.phases.items()}
    return {"standing": dict(memory.standing), "phases": phases, "fullest": memory.fullest, "peak": memory.peak}


def plan(cfg: RunConfig, cluster: Cluster, budget_tokens: int | None = None) -> Plan:
    """What a run of `cfg` takes on `cluster`.

    Args:
        budget_tokens: of the whole run; None: the configuration's steps.
    Raises:
        ConfigError: the cluster's ranks cannot share the batch or the prototypes.
    """
    _check(cfg, cluster)
    if budget_tokens is not None and budget_tokens < 1:
        raise ConfigError(f"--budget-tokens {budget_tokens}: expected 1 or more")
    found = collectives(cfg, cluster)
    trunk_s, head_s = compute_seconds(cfg, cluster)
    spent = {behind: sum(c.seconds(cluster.hardware) for c in found if c.behind == behind) for behind in _HIDES}
    room = {"nothing": 0.0, "trunk": trunk_s, "head": head_s}
    return Plan(
        cluster=cluster,
        parameters=parameters(cfg),
        zero=zero_stage(cfg),
        vocab_ranks=_vocab_ranks(cfg, cluster),
        accumulation=cfg.accumulation(cluster.gpus),
        memory=memory(cfg, cluster),
        usable_bytes=cluster.usable_bytes,
        memory_by_stage={stage: memory(_with(cfg, parallel={"zero": stage}), cluster) for stage in range(4)},
        activation_bytes={
            "kept": activations(_with(cfg, model={"activation_checkpointing": False})),
            "recomputed": activations(_with(cfg, model={"activation_checkpointing": True})),
        },
        collectives=tuple(found),
        compute_s=trunk_s + head_s,
        update_s=update_seconds(cfg, cluster),
        exposed_s=sum(max(0.0, spent[behind] - room[behind]) for behind in _HIDES),
        tokens_per_step=cfg.train.tokens_per_step,
        budget_tokens=budget_tokens or cfg.train.steps * cfg.train.tokens_per_step,
        largest_micro_batch=largest_micro_batch(cfg, cluster),
        changes=cheapest_changes(cfg, cluster),
        notes=tuple(_notes(cfg, cluster)),
    )


_HIDES: tuple[Literal["nothing", "trunk", "head"], ...] = ("nothing", "trunk", "head")


def _check(cfg: RunConfig, cluster: Cluster) -> None:
    sequences = cfg.sequences_per_step()
    if sequences % cluster.gpus:
        possible = [n for n in _divisors(sequences) if n <= cluster.per_node or n % cluster.per_node == 0]
        raise ConfigError(
            f"--gpus {cluster.gpus}: train.tokens_per_step={cfg.train.tokens_per_step} is {sequences} sequences, which "
            f"{cluster.gpus} GPUs cannot share. Possible: {', '.join(map(str, possible))}."
        )
    check_layout(cfg, cluster.gpus, cluster.ranks_per_node)


def _with(cfg: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The same configuration with some values of its sections changed."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    )


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _vocab_ranks(cfg: RunConfig, cluster: Cluster) -> int:
    return cfg.parallel.vocab_ranks(cluster.gpus, cluster.ranks_per_node)


def zero_stage(cfg: RunConfig) -> int:
    """As pretrain.engine.zero_stage, which brings DeepSpeed: a test compares them."""
    return max(cfg.parallel.zero, 1) if _bf16(cfg) else cfg.parallel.zero


def _bf16(cfg: RunConfig) -> bool:
    return cfg.train.precision == "bf16"


def _width(cfg: RunConfig) -> int:
    """Bytes of the compute dtype."""
    return 2 if _bf16(cfg) else 4


def _zero(cfg: RunConfig) -> dict[str, Any]:
    return {**ZERO_DEFAULTS, **cfg.deepspeed.get("zero_optimization", {})}


def _tokens(cfg: RunConfig) -> int:
    """n: of one rank and pass."""
    return cfg.train.micro_batch * cfg.model.seq_len


# Parameters


def _block(cfg: RunConfig) -> list[int]:
    """Parameters of a block's modules, in the order of the forward pass."""
    d, bias = cfg.model.dim, int(cfg.model.bias)
    norm = d * (1 + bias)
    return [norm, 3 * d * (d + bias), d * (d + bias), norm, 4 * d * (d + bias), d * (4 * d + bias)]


def _outer(cfg: RunConfig) -> list[int]:
    """Token embedding (unless tied) and positions."""
    positions = cfg.model.seq_len * cfg.model.dim
    return [positions] if cfg.model.tied else [cfg.model.vocab_size * cfg.model.dim, positions]


def _final_norm(cfg: RunConfig) -> int:
    return cfg.model.dim * (1 + int(cfg.model.bias))


def _head_extra(cfg: RunConfig) -> int:
    """Trained parameters of the head that every rank holds: Mahalanobis' factor, a learned exponent."""
    d = cfg.model.dim
    factor = {"diagonal": d, "full": d * d}[str(cfg.head.params.get("factor", "diagonal"))]
    return factor * (cfg.head.distance == "mahalanobis") + (cfg.head.exponent == "learned")


def parameters(cfg: RunConfig) -> Parameters:
    outer = _outer(cfg)
    return Parameters(
        trunk=sum(outer) + cfg.model.layers * sum(_block(cfg)) + _final_norm(cfg),
        token_embedding=0 if cfg.model.tied else outer[0],
        positions=outer[-1],
        head=cfg.model.vocab_size * cfg.model.dim + _head_extra(cfg),
    )


def _optimizer_groups(cfg: RunConfig) -> tuple[list[int], list[int]]:
    """Trunk parameters that decay by default (matrices), and the rest: DeepSpeed flattens them apart."""
    d = cfg.model.dim
    matrices = [3 * d * d, d * d, 4 * d * d, 4 * d * d]
    others = sum(_block(cfg)) - sum(matrices)
    return matrices * cfg.model.layers, [*_outer(cfg), *[others] * cfg.model.layers, _final_norm(cfg)]


# Memory


def activations(cfg: RunConfig) -> int:
    """Bytes that the trunk's forward pass keeps for the backward pass.

    Of a block per token: its input, two normalised inputs, q, k, v and their mix, the sum before the MLP, and the MLP's
    inside before and after GELU: 16 D; means and deviations of two norms, and the attention's log-sum-exp per head, in
    float32; a byte per masked entry where there is dropout. Recomputed: only the block's input.
    """
    model, b = cfg.model, _width(cfg)
    kept = model.dim * b if model.activation_checkpointing else _block_activations(cfg)
    return _tokens(cfg) * model.layers * kept + _final_activations(cfg)


def _final_activations(cfg: RunConfig) -> int:
    """Bytes of the last block's output and of the hidden states, which are gone when the blocks' gradients are taken."""
    return 2 * _tokens(cfg) * cfg.model.dim * _width(cfg)


def _block_activations(cfg: RunConfig) -> int:
    """Bytes per token."""
    model = cfg.model
    masks = 2 * model.dim if model.dropout else 0
    return 16 * model.dim * _width(cfg) + 4 * (4 + model.heads) + masks


def _backward_work(cfg: RunConfig) -> int:
    """Bytes on top at the widest place of a block, GELU's gradient: 9 D of gradients where 4 D are no longer needed; and
    the block itself where it is recomputed.
    """
    again = _block_activations(cfg) if cfg.model.activation_checkpointing else 0
    return _tokens(cfg) * (5 * cfg.model.dim * _width(cfg) + again)


def by_product(cfg: RunConfig) -> bool:
    """Whether the head's distance is a matrix product; the others go entry by entry, at a speed of their own."""
    head = cfg.head
    special = {"hamming": head.params.get("kind") == "hard", "minkowski": head.params.get("p") == 2}
    return head.distance in ("euclidean", "cosine", "mahalanobis", "dot") or special.get(head.distance, False)


def head_chunks(cfg: RunConfig, vocab_ranks: int) -> tuple[int, int]:
    """Chunks of a pass and bytes of working memory, as model.harmonic cuts them; for distances that are no product, an
    upper bound of both.
    """
    n, d, rows = _tokens(cfg), cfg.model.dim, -(-cfg.model.vocab_size // vocab_ranks)
    kept, temporaries, narrow = (1, 1, _width(cfg)) if by_product(cfg) else (2, 2, 0)
    pairs = kept * (2 if vocab_ranks > 1 else 1) + temporaries
    per_token = vocab_ranks * (rows * (pairs * 4 + narrow) + d * 3 * 4)
    budget = CHUNK_BYTES if cfg.head.chunk_mib is None else cfg.head.chunk_mib * 2**20
    chunks = -(-n // max(1, budget // per_token))
    return chunks, -(-n // chunks) * per_token


def memory(cfg: RunConfig, cluster: Cluster) -> Memory:
    """Of one GPU, at the fullest moment of each phase of a step."""
    world, k, b = cluster.gpus, _vocab_ranks(cfg, cluster), _width(cfg)
    n, d, several = _tokens(cfg), cfg.model.dim, cfg.accumulation(world) > 1
    rows = -(-cfg.model.vocab_size // k) * d + _head_extra(cfg)  # elements
    trunk = _trunk_memory(cfg, world)
    head_standing = {"head masters": 4 * rows, "head moments": 8 * rows, "head gradients": 4 * rows}
    _, workspace = head_chunks(cfg, k)
    kept, hidden = activations(cfg), n * d * b
    head = {
        "activations": kept,
        "head workspace": workspace,
        "prototypes in the compute dtype": rows * b,
        "gradient of this pass's prototypes": 4 * rows if several else 0,
        "gradient of hidden states": hidden,
    }
    backward = {
        "activations": kept - _final_activations(cfg),
        "gradients of activations, recomputed ones": _backward_work(cfg),
    }
    phases = {"head": {**head, **trunk.turn}, "backward": {**backward, **trunk.backward}, "update": trunk.update}
    if cfg.model.tied:
        phases["tied embedding"] = {"rows of the group's tokens": 2 * k * n * d * 4, "gradient of rows": 8 * rows}
    return Memory({**trunk.standing, **head_standing}, phases)


@dataclass(frozen=True)
class _TrunkMemory:
    """Bytes by kind: always there; at the end of the forward pass; in the backward pass; in the update. Gradients that
    the update frees stand only where several passes add to them.
    """

    standing: dict[str, int]
    turn: dict[str, int]
    backward: dict[str, int]
    update: dict[str, int]


def _trunk_memory(cfg: RunConfig, world: int) -> _TrunkMemory:
    """As DeepSpeed 0.19's optimiser classes hold the trunk; which class runs is pretrain.engine's doing."""
    total, b, stage = parameters(cfg).trunk, _width(cfg), zero_stage(cfg)
    share, bucket = -(-total // world), int(_zero(cfg)["reduce_bucket_size"])
    matrices, rest = _optimizer_groups(cfg)
    largest = max(sum(matrices), sum(rest))
    several = cfg.accumulation(world) > 1

    def made(standing: dict[str, int], gradients: int, update: dict[str, int], **phases: dict[str, int]) -> _TrunkMemory:
        last = {"trunk gradients": gradients}
        stays, comes = (last, {}) if several else ({}, last)
        return _TrunkMemory(
            {**standing, **stays}, phases.get("turn", {}), phases.get("backward", {}), {**update, **comes}
        )

    if stage == 0:
        standing = {"trunk weights": 4 * total, "trunk moments": 8 * total}
        return made(standing, 4 * total, {"gradients in one piece": 4 * min(total, FLAT_BUCKET)})
    standing = {"trunk weights": b * total, "trunk masters": 4 * share, "trunk moments": 8 * share}
    if stage == 1 and b == 2:  # BF16_Optimizer: every rank adds all gradients up in float32
        reduced = {"gradients to be reduced": 2 * largest if sum(matrices) > FLAT_BUCKET else 6 * total}
        return made({**standing, "trunk gradients in float32": 4 * total}, 2 * total, reduced)
    if stage < 3:  # DeepSpeedZeroOptimizer: float32 gradients stay views of whole parameters
        own = share if b == 2 else sum(_most_overlapped(group, world) for group in (matrices, rest))
        whole = {"gradients before they are reduced": 4 * total} if stage == 1 and several else {}
        buffers = {"reduction buffers": b * (bucket + min(bucket, total))}
        flat = {"gradients in one piece": 4 * -(-largest // world)}
        return made(standing, 4 * own, flat, turn=whole, backward={**buffers, **whole})
    standing = {**standing, "trunk weights": b * share, "trunk gradients in float32": 4 * share}
    _, live, _ = stage3_gathers(cfg)
    gathered = {"gathered weights": b * live}
    update = {"gradients in one piece": 4 * share}
    return _TrunkMemory({**standing, "reduction buffers": b * bucket}, gathered, gathered, update)


def _most_overlapped(sizes: Sequence[int], world: int) -> int:
    """Elements of the parameters that a rank's share of a flat group reaches into, for the rank with most."""
    share = max(1, -(-sum(sizes) // world))
    found = [0] * world
    first = 0
    for size in sizes:
        for rank in range(first // share, (first + size - 1) // share + 1):
            found[rank] += size
        first += size
    return max(found)


def stage3_gathers(cfg: RunConfig) -> tuple[int, int, int]:
    """Elements that a pass gathers at ZeRO 3, the most that are there at once, and those that stay from pass to pass.

    DeepSpeed's rules (runtime/zero/partitioned_param_coordinator.py): a module's parameters are gathered when it runs,
    and those of the next modules while `stage3_prefetch_bucket_size` and `stage3_max_live_parameters` allow; they are
    freed behind it unless they are used again within `stage3_max_reuse_distance`, or prefetching has passed over that
    use. Parameters up to `stage3_param_persistence_threshold` are gathered once in an update.
    """
    zero = _zero(cfg)
    sizes = [*_outer(cfg), *_block(cfg) * cfg.model.layers, _final_norm(cfg)]
    order = _module_order(cfg)
    persistent = {i for i, size in enumerate(sizes) if size <= zero["stage3_param_persistence_threshold"]}
    persistent.add(len(_outer(cfg)) - 1)  # the positions, which the decoder reads itself
    walked = [0]  # elements before each step of the order
    for i in order:
        walked.append(walked[-1] + sizes[i])
    following: list[int | None] = [None] * len(order)  # the step that uses a step's module again
    last: dict[int, int] = {}
    for step in reversed(range(len(order))):
        following[step] = last.get(order[step])
        last[order[step]] = step
    there: set[int] = set()
    gathered = live = most = passed = 0
    for step, i in enumerate(order):
        wanted = [] if i in there or i in persistent else [i]
        passed, ahead = max(passed, step + 1), 0
        room = min(zero["stage3_max_live_parameters"] - live - sum(sizes[j] for j in wanted),
                   zero["stage3_prefetch_bucket_size"])  # fmt: skip
        while passed < len(order) and ahead < room:
            j = order[passed]
            if j not in there and j not in persistent and j not in wanted:
                wanted.append(j)
                ahead += sizes[j]
            passed += 1
        there.update(wanted)
        more = sum(sizes[j] for j in wanted)
        gathered, live = gathered + more, live + more
        most = max(most, live)
        again = following[step]
        near = again is not None and walked[again] - walked[step + 1] < zero["stage3_max_reuse_distance"]
        if i in there and not near and not (again is not None and again < passed):
            there.discard(i)
            live -= sizes[i]
    staying = sum(sizes[i] for i in persistent)
    return gathered, most + staying, staying


def _module_order(cfg: RunConfig) -> list[int]:
    """Modules by index, as a pass runs through them: forward, then backward, blocks again where they are recomputed."""
    first, per_block = len(_outer(cfg)), len(_block(cfg))
    blocks = [
        list(range(first + layer * per_block, first + (layer + 1) * per_block)) for layer in range(cfg.model.layers)
    ]
    outer, norm = list(range(first)), first + cfg.model.layers * per_block
    forward = [*outer, *(i for block in blocks for i in block), norm]
    if not cfg.model.activation_checkpointing:
        return forward + forward[::-1]
    backward = [i for block in reversed(blocks) for i in (block[-1], *block, *block[-2::-1])]
    return [*forward, norm, *backward, *reversed(outer)]


# Traffic


def collectives(cfg: RunConfig, cluster: Cluster) -> list[Collective]:
    """What one GPU takes part in during one update; groups of one are left out, and so are norms and flags of a few
    bytes."""
    world, k, passes = cluster.gpus, _vocab_ranks(cfg, cluster), cfg.accumulation(cluster.gpus)
    near = cluster.ranks_per_node
    found = [
        *_trunk_collectives(cfg, world, near, passes),
        *_head_collectives(cfg, k, min(k, near), passes),
    ]
    rows = -(-cfg.model.vocab_size // k) * cfg.model.dim + _head_extra(cfg)
    replicas = Collective(
        "prototype gradients", "all-reduce", world // k, max(1, near // k), 4 * rows, 1, "nothing"
    )
    return [one for one in (*found, replicas) if one.ranks > 1]


def _trunk_collectives(cfg: RunConfig, world: int, near: int, passes: int) -> list[Collective]:
    total, b, stage, zero = parameters(cfg).trunk, _width(cfg), zero_stage(cfg), _zero(cfg)

    def one(what: str, kind: Any, elements: int, calls: int, behind: Any) -> Collective:
        return Collective(what, kind, world, near, b * elements, calls, behind)

    if stage == 3:
        behind = "nothing" if zero["overlap_comm"] is False else "trunk"
        gathered, _, staying = stage3_gathers(cfg)
        modules = len(_module_order(cfg))
        per_pass = min(modules, -(-gathered // max(1, min(zero["stage3_prefetch_bucket_size"], gathered))))
        buckets = -(-total // int(zero["reduce_bucket_size"]))
        return [
            one("trunk weights", "all-gather", gathered * passes + staying, per_pass * passes, behind),
            one("trunk gradients", "reduce-scatter", total * passes, buckets * passes, behind),
        ]
    reductions = passes if stage == 2 else 1
    bucket = int(zero["reduce_bucket_size"]) if stage and (stage == 2 or b == 4) else FLAT_BUCKET
    behind = "trunk" if stage == 2 and zero["overlap_comm"] else "nothing"
    reduced = one("trunk gradients", "all-reduce", total * reductions, -(-total // bucket) * reductions, behind)
    return [reduced] if stage == 0 else [reduced, one("trunk weights", "all-gather", total, 2, "nothing")]


def _head_collectives(cfg: RunConfig, k: int, near: int, passes: int) -> list[Collective]:
    n, d, b = _tokens(cfg), cfg.model.dim, _width(cfg)
    chunks, _ = head_chunks(cfg, k)
    tokens, calls = n * k * passes, chunks * passes
    found = [
        Collective("hidden states and targets", "all-gather", k, near, tokens * (d * b + 8), 2 * calls, "nothing"),
        Collective("maxima and sums of scores", "all-reduce", k, near, tokens * (4 + 12), 2 * calls, "head"),
        Collective("gradient of hidden states", "reduce-scatter", k, near, tokens * d * 4, calls, "head"),
    ]
    if _head_extra(cfg):
        payload = 4 * _head_extra(cfg) * passes
        found.append(Collective("head's own parameters", "all-reduce", k, near, payload, passes, "nothing"))
    if cfg.model.tied:
        embedded = tokens * d * 4
        found += [
            Collective("embedded tokens", "reduce-scatter", k, near, embedded, passes, "nothing"),
            Collective("gradient of embedded tokens", "all-gather", k, near, embedded + 8 * tokens, 2 * passes, "nothing"),
        ]  # fmt: skip
    return found


# Time


def compute_seconds(cfg: RunConfig, cluster: Cluster) -> tuple[float, float]:
    """Of trunk and head, per update: matrix products at a fraction of the peak; attention as if it were not causal."""
    model, gpu = cfg.model, cluster.hardware
    head = 6 * model.vocab_size * model.dim
    trunk = model.flops_per_token() - head
    if model.activation_checkpointing:
        trunk = trunk * 4 // 3  # one more forward pass
    rate = cluster.gpus * cluster.mfu * (gpu.bf16_flops if _bf16(cfg) else gpu.float32_flops)
    return cfg.train.tokens_per_step * trunk / rate, cfg.train.tokens_per_step * head / rate


def update_seconds(cfg: RunConfig, cluster: Cluster) -> float:
    """AdamW reads a master, two moments and a gradient, and writes the first three: 28 bytes for each of a rank's."""
    trunk = parameters(cfg).trunk
    own = trunk if zero_stage(cfg) == 0 else -(-trunk // cluster.gpus)
    rows = -(-cfg.model.vocab_size // _vocab_ranks(cfg, cluster)) * cfg.model.dim
    return 28 * (own + rows) / cluster.hardware.memory_bytes_s


# What fits


def _fits(cfg: RunConfig, cluster: Cluster) -> bool:
    return memory(cfg, cluster).peak <= cluster.usable_bytes


def largest_micro_batch(cfg: RunConfig, cluster: Cluster) -> int | None:
    """The largest that shares the batch evenly and fits; None: not even one sequence does."""
    sizes = _divisors(cfg.sequences_per_step() // cluster.gpus)
    return next((size for size in reversed(sizes) if _fits(_with(cfg, train={"micro_batch": size}), cluster)), None)


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


Change = tuple[str, RunConfig, Cluster]


def _checkpointed(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if not cfg.model.activation_checkpointing:
        changed = _with(cfg, model={"activation_checkpointing": True})
        yield "model.activation_checkpointing=true", changed, cluster


def _higher_stage(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for stage in range(zero_stage(cfg) + 1, 4):
        yield f"parallel.zero={stage}", _with(cfg, parallel={"zero": stage}), cluster


def _larger_group(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for size in _divisors(cluster.gpus):
        if size > _vocab_ranks(cfg, cluster):
            yield f"parallel.vocab={size}", _with(cfg, parallel={"vocab": size}), cluster


def _smaller_batch(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for size in reversed(_divisors(cfg.sequences_per_step() // cluster.gpus)):
        if size < cfg.train.micro_batch:
            yield f"train.micro_batch={size}", _with(cfg, train={"micro_batch": size}), cluster


def _more_gpus(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    sequences = cfg.sequences_per_step()
    for gpus in _divisors(sequences):
        if gpus > cluster.gpus and gpus % cluster.gpus == 0 and (gpus <= cluster.per_node or not gpus % cluster.per_node):
            size = max(k for k in _divisors(sequences // gpus) if k <= cfg.train.micro_batch)
            told = f"--gpus {gpus}" + (f" train.micro_batch={size}" if size != cfg.train.micro_batch else "")
            yield told, _with(cfg, train={"micro_batch": size}), replace(cluster, gpus=gpus)


# Telling


def assumptions(cluster: Cluster) -> list[str]:
    """Everything that the figures of time and energy, and the room for memory, rest on."""
    gpu = cluster.hardware
    return [
        f"{USABLE:.0%} of {gpu.memory / GIB:.0f} GiB can be used: the rest is CUDA, NCCL and fragmentation",
        f"matrix products reach {cluster.mfu:.0%} of the peak of {gpu.bf16_flops / 1e12:.0f} TFLOP/s in bf16, "
        f"{gpu.float32_flops / 1e12:.0f} in float32; attention is counted whole, and nothing else costs time",
        f"{gpu.link_bytes_s / 1e9:.0f} GB/s inside a node and {gpu.network_bytes_s / 1e9:.4g} GB/s between nodes, per "
        f"GPU and direction, of which {LINK_EFFICIENCY:.0%} is reached; {HOP_S * 1e6:.0f} us from rank to rank",
        "rings over all links; only small all-reduces climb a tree",
        "at ZeRO 3 communication of the trunk hides behind all of its computation, at 0 to 2 nothing does (without "
        "overlap_comm); the head's maxima, sums and scattered gradients hide behind its own, gathered hidden states "
        "do not; nor do prototype gradients",
        f"every GPU draws {gpu.watts:.0f} W, the most that its board takes; hosts, network and cooling are not counted",
    ]


def _notes(cfg: RunConfig, cluster: Cluster) -> Iterator[str]:
    """What the reader of this plan in particular should know."""
    if zero_stage(cfg) != cfg.parallel.zero:
        yield "bf16 at ZeRO stage 0 runs as stage 1"
    if not by_product(cfg):
        yield f"head.distance={cfg.head.distance} goes entry by entry, slower than its products: the time is a lower bound"
    if _bf16(cfg) and not cluster.hardware.has_bf16:
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


def add_arguments(commands: Any) -> argparse.ArgumentParser:
    """The `plan` command."""
    parser = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="what a config will take: memory of a GPU, traffic, time and energy, without running anything",
        description="Plan a run: parameters, memory of a GPU, traffic, time and energy. Arithmetic on stated "
        "assumptions: needs no GPU and no data, and measures nothing. Exit code 2: bad input.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/gpt2-1.5b.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes a setting, such as parallel.zero=3")
    default = Cluster()
    parser.add_argument("--gpus", type=int, metavar="N", default=default.gpus, help="of all nodes (%(default)s)")
    parser.add_argument("--gpu", metavar="NAME", default=default.gpu, help=f"{', '.join(GPUS)} (%(default)s)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", default=default.per_node, help="(%(default)s)")
    parser.add_argument(
        "--link", type=float, metavar="GB/S", help="between nodes, per GPU and direction (default: reference system's)"
    )
    parser.add_argument(
        "--mfu", type=float, metavar="F", default=default.mfu, help="fraction of the peak that is reached (%(default)s)"
    )
    parser.add_argument("--watts", type=float, metavar="W", help="drawn by a GPU (default: the most that it takes)")
    parser.add_argument("--budget-tokens", type=float, metavar="N", help="of the whole run (default: of train.steps)")
    parser.add_argument("--json", action="store_true", help="plain values instead of tables")
    return parser


def tell(asked: argparse.Namespace, cfg: RunConfig) -> int:
    """Prints the plan that the command line asks for. Raises ConfigError."""
    cluster = Cluster(
        gpu=asked.gpu,
        gpus=asked.gpus,
        per_node=asked.gpus_per_node,
        network_bytes_s=None if asked.link is None else asked.link * 1e9,
        mfu=asked.mfu,
        watts=asked.watts,
    )
    found = plan(cfg, cluster, None if asked.budget_tokens is None else int(asked.budget_tokens))
    if asked.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        _print(found)
    return 0


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _print(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(110, Console().width), highlight=False)
    own, cluster = found.parameters, found.cluster
    console.print(
        f"{own.total / 1e6:,.1f} M parameters: trunk {own.trunk / 1e6:,.1f} M "
        f"({'tied embedding' if not own.token_embedding else f'token embedding {own.token_embedding / 1e6:,.1f} M'}, "
        f"positions {own.positions / 1e6:,.1f} M), head {own.head / 1e6:,.1f} M"
    )
    console.print(
        f"{cluster.gpus} x {cluster.gpu}, {cluster.ranks_per_node} in a node; ZeRO {found.zero}, vocabulary groups of "
        f"{found.vocab_ranks}, {found.accumulation} passes per step. Planned, not measured."
    )
    console.print(_memory_table(found, Table(title="memory of a GPU, GiB", title_justify="left")))
    for name, size in found.activation_bytes.items():
        console.print(f"activations {name}: {_gib(size)} GiB")
    verdict = "fits" if found.fits else "does not fit"
    console.print(f"{verdict}: {_gib(found.memory.peak)} of {_gib(found.usable_bytes)} GiB, in the phase `{found.memory.fullest}`")
    if found.changes is None:
        console.print("no change of checkpointing, ZeRO stage, vocabulary group, micro-batch or GPUs makes it fit")
    elif found.changes:
        console.print(f"it would with {' '.join(found.changes)}")
    console.print(f"largest micro-batch that fits: {found.largest_micro_batch or 'none'}")
    table = Table(
        "", "collective", "ranks", "calls", "payload, MB", "sent inside a node, MB", "sent between nodes, MB", "ms",
        "hidden behind", title="traffic of a GPU in a step", title_justify="left",
    )  # fmt: skip
    for one in found.collectives:
        outside = one.between_nodes
        megabytes = (one.payload, one.wire - outside, outside)
        table.add_row(
            one.what, one.kind, str(one.ranks), f"{one.calls:,}", *(f"{size / 1e6:,.1f}" for size in megabytes),
            f"{one.seconds(cluster.hardware) * 1e3:,.2f}", one.behind,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"a step takes {found.step_s * 1e3:,.1f} ms: {found.compute_s * 1e3:,.1f} computing, "
        f"{found.exposed_s * 1e3:,.1f} waiting for communication, {found.update_s * 1e3:,.1f} updating; "
        f"{found.tokens_per_s:,.0f} tokens/s"
    )
    console.print(
        f"{found.budget_tokens:,} tokens take {found.seconds / 86400:,.2f} days and {found.gpu_j / 3.6e6:,.0f} kWh of GPUs"
    )
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
            rows.setdefault(name, {})[stage] = size
    for name, sizes in rows.items():
        table.add_row(name, *(_gib(sizes[stage]) if stage in sizes else "" for stage in found.memory_by_stage))
    table.add_row("peak", *(_gib(one.peak) for one in found.memory_by_stage.values()))
    table.add_row("in the phase", *(one.fullest for one in found.memory_by_stage.values()))
    return table
