"""What a run keeps in a GPU's memory, from its configuration alone: the trunk as DeepSpeed 0.19's ZeRO holds it, the
prototypes beside it, and the head's working memory; the model's sizes are model/config.py's. Activations are traced.

`python -m benchmarks.plan` compares this with what is really allocated.

Legend: P parameters of the trunk, V prototypes in all, R rows of them on a rank, D width, n tokens of a rank's pass, k
ranks in a vocabulary group, b bytes of the compute dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.command import importing
from common.gpus import GIB
from launch.cluster import Cluster

if TYPE_CHECKING:
    from pretrain.activations import Traced
    from pretrain.config import RunConfig

# Those of model.harmonic on a GPU; a test compares them, as plans are made without torch's modules.
CHUNK_BYTES = 2 * GIB
CHUNK_SHARE = 1 / 16
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
class Parameters:
    """How many parameters a model has, by what they are."""

    trunk: int  # all of the DeepSpeed engine's module, the embeddings below included
    token_embedding: int  # 0: tied
    positions: int  # 0: no table
    head: int  # the prototypes, and what the distance and the exponent add

    @property
    def total(self) -> int:
        """All that are trained."""
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
        """Bytes in the fullest phase, with what stands."""
        return sum(self.standing.values()) + sum(self.phases[self.fullest].values())


def replicated_head(cfg: RunConfig) -> int:
    """Trained parameters of the head that every rank holds: Mahalanobis' factor, a learned exponent."""
    return sum(size for name, size in cfg.head.parameters(1, cfg.model.dim).items() if name != "prototypes")


def parameters(cfg: RunConfig) -> Parameters:
    """Of the whole model, on however many GPUs."""
    sizes = module_sizes(cfg)
    return Parameters(
        trunk=cfg.model.parameters(),
        token_embedding=sizes.get("tokens", 0),
        positions=sizes.get("positions", 0),
        head=sum(cfg.head.parameters(cfg.model.vocab_size, cfg.model.dim).values()),
    )


def module_sizes(cfg: RunConfig, least: float = 0) -> dict[str, int]:
    """Of the trunk's modules, the elements in parameters of more than `least`."""
    sizes: dict[str, int] = {}
    for weight in cfg.model.weights():
        sizes[weight.module] = sizes.get(weight.module, 0) + (weight.size if weight.size > least else 0)
    return sizes


def prototype_elements(cfg: RunConfig, cluster: Cluster) -> int:
    """Of the head's parameters, those that a rank holds."""
    return -(-cfg.model.vocab_size // vocab_ranks(cfg, cluster)) * cfg.model.dim + replicated_head(cfg)


def optimizer_groups(cfg: RunConfig) -> list[list[int]]:
    """Elements of the trunk's parameters in the groups of pretrain.optim.parameter_groups, which a test compares:
    matrices first. DeepSpeed flattens each group.
    """
    groups: dict[tuple[float, float], list[int]] = {}
    for weight in cfg.model.weights():
        scale = cfg.model.width_scale() if weight.kind == "matrices" else 1.0
        settings = (cfg.optim.decay_of(weight.kind), scale)
        groups.setdefault(settings, []).append(weight.size)
    return [sizes for _, sizes in sorted(groups.items(), reverse=True)]


def vocab_ranks(cfg: RunConfig, cluster: Cluster) -> int:
    """k: ranks that hold all prototypes together."""
    return cfg.parallel.vocab_ranks(cluster.gpus, cluster.ranks_per_node)


def width(cfg: RunConfig) -> int:
    """Bytes of the compute dtype."""
    return 2 if cfg.train.precision == "bf16" else 4


def zero_settings(cfg: RunConfig) -> dict[str, Any]:
    """DeepSpeed's defaults, and what the configuration's `deepspeed.zero_optimization` says instead."""
    return {**ZERO_DEFAULTS, **cfg.deepspeed.get("zero_optimization", {})}


def pass_tokens(cfg: RunConfig) -> int:
    """n: of one rank and pass."""
    return cfg.train.micro_batch * cfg.model.seq_len


def traced(cfg: RunConfig) -> Traced:
    """What the trunk's passes keep and need, traced through its modules: brings torch."""
    with importing():
        from pretrain.activations import traced
    return traced(cfg.model, cfg.train.micro_batch, width(cfg))


def tokens_kept(cfg: RunConfig, cluster: Cluster) -> int:
    """Bytes of the group's tokens, which a tied embedding's lookup keeps."""
    return 8 * pass_tokens(cfg) * vocab_ranks(cfg, cluster) if cfg.model.tied else 0


def head_chunks(cfg: RunConfig, vocab_ranks: int, gpu_memory: int) -> tuple[int, int]:
    """Chunks of a pass and bytes of working memory, as model.harmonic cuts them on a GPU of `gpu_memory` bytes (which
    may make chunks a little larger, so that no multiprocessor idles); for distances that are no product, an upper
    bound of both.
    """
    n, d, rows = pass_tokens(cfg), cfg.model.dim, -(-cfg.model.vocab_size // vocab_ranks)
    alive, narrow = 2 if vocab_ranks > 1 else 1, width(cfg)
    if not cfg.head.settings.by_product:
        pair = 4 * (2 * alive + 2)
    else:
        pair = alive * narrow if cfg.head.fused and narrow == 2 else 4 * alive + narrow
    per_token = vocab_ranks * (rows * pair + d * 3 * 4)
    budget = max(CHUNK_BYTES, int(gpu_memory * CHUNK_SHARE))
    if cfg.head.chunk_mib is not None:
        budget = cfg.head.chunk_mib * 2**20
    chunks = -(-n // max(1, budget // per_token))
    return chunks, -(-n // chunks) * per_token


def memory(cfg: RunConfig, cluster: Cluster) -> Memory:
    """Of one GPU, at the fullest moment of each phase of a step."""
    world, k, b = cluster.gpus, vocab_ranks(cfg, cluster), width(cfg)
    n, d, several = pass_tokens(cfg), cfg.model.dim, cfg.accumulation(world) > 1
    rows = prototype_elements(cfg, cluster)
    trunk = _trunk_memory(cfg, world)
    head_standing = {"head masters": 4 * rows, "head moments": 8 * rows, "head gradients": 4 * rows}
    _, workspace = head_chunks(cfg, k, cluster.hardware.memory)
    passes, hidden = traced(cfg), n * d * b
    looked_up = tokens_kept(cfg, cluster)
    head = {
        "activations": passes.kept + looked_up,
        "head workspace": workspace,
        "prototypes in the compute dtype": rows * b,
        "gradient of this pass's prototypes": 4 * rows if several else 0,
        "gradient of hidden states": hidden,
    }
    backward = {
        "activations": min(passes.kept, passes.fullest) + looked_up,
        "gradients of activations, recomputed ones": max(0, passes.fullest - passes.kept),
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
    total, b, stage = parameters(cfg).trunk, width(cfg), cfg.zero_stage()
    share, bucket = -(-total // world), int(zero_settings(cfg)["reduce_bucket_size"])
    groups = optimizer_groups(cfg)
    largest = max(map(sum, groups))
    several = cfg.accumulation(world) > 1

    def made(
        standing: dict[str, int], gradients: int, update: dict[str, int], **phases: dict[str, int]
    ) -> _TrunkMemory:
        last = {"trunk gradients": gradients}
        stays, comes = (last, {}) if several else ({}, last)
        return _TrunkMemory(
            {**standing, **stays}, phases.get("turn", {}), phases.get("backward", {}), {**update, **comes}
        )

    if stage == 0:
        standing = {"trunk weights": 4 * total, "trunk moments": 8 * total}
        return made(standing, 4 * total, {"gradients in one piece": 4 * min(total, FLAT_BUCKET)})
    offloads = cfg.offloads("optimizer")
    stepped = {} if offloads else {"trunk masters": 4 * share, "trunk moments": 8 * share}
    standing = {"trunk weights": b * total, **stepped}
    if stage == 1 and b == 2 and not offloads:  # BF16_Optimizer: every rank adds all gradients up in float32
        reduced = {"gradients to be reduced": 2 * largest if sum(groups[0]) > FLAT_BUCKET else 6 * total}
        return made({**standing, "trunk gradients in float32": 4 * total}, 2 * total, reduced)
    if stage < 3:  # DeepSpeedZeroOptimizer: float32 gradients stay views of whole parameters
        own = share if b == 2 else sum(_most_overlapped(group, world) for group in groups)
        times = several * (1 + offloads) if stage == 1 else 0  # with offload, copies that go to the host too
        whole = {"gradients before they are reduced": 4 * total * times} if times else {}
        buckets = 2 if zero_settings(cfg)["overlap_comm"] else 1  # and a copy while one is reduced
        buffers = {"reduction buffers": b * (buckets * bucket + min(bucket, total))}
        flat = {} if offloads else {"gradients in one piece": 4 * -(-largest // world)}
        if offloads:  # a parameter's gradient on its way
            standing["reduction buffers"] = b * max(max(group) for group in groups)
        return made(standing, 4 * own, flat, turn=whole, backward={**buffers, **whole})
    standing = {"trunk weights": 0 if cfg.offloads("param") else b * share, **stepped}
    if not offloads:
        standing["trunk gradients in float32"] = 4 * share
    _, live, _ = stage3_gathers(cfg)
    gathered = {"gathered weights": b * live}
    update = {} if offloads else {"gradients in one piece": 4 * share}
    return _TrunkMemory({**standing, "reduction buffers": b * bucket}, gathered, gathered, update)


def _most_overlapped(sizes: Sequence[int], world: int) -> int:
    """Elements of the parameters that a rank's share of a flat group reaches into, for the rank with most."""
    share = max(1, -(-sum(sizes) // world))
    reached = [0] * world
    first = 0
    for size in sizes:
        for rank in range(first // share, (first + size - 1) // share + 1):
            reached[rank] += size
        first += size
    return max(reached)


def stage3_gathers(cfg: RunConfig) -> tuple[int, int, int]:
    """Elements that a pass gathers at ZeRO 3, the most that are there at once, and those that stay from pass to pass.

    DeepSpeed's rules (runtime/zero/partitioned_param_coordinator.py): a module's parameters are gathered when it runs,
    and those of the next modules while `stage3_prefetch_bucket_size` and `stage3_max_live_parameters` allow; they are
    freed behind it unless they are used again within `stage3_max_reuse_distance`, or prefetching has passed over that
    use. Parameters up to `stage3_param_persistence_threshold` are gathered once in an update, and so is the table of
    positions where the decoder reads it itself.
    """
    zero = zero_settings(cfg)
    whole, sizes = module_sizes(cfg), module_sizes(cfg, zero["stage3_param_persistence_threshold"])
    if not cfg.model.document_mask and "positions" in sizes:
        sizes["positions"] = 0
    order = module_order(cfg)
    walked = [0]  # elements before each step of the order
    for i in order:
        walked.append(walked[-1] + whole[i])
    following: list[int | None] = [None] * len(order)  # the step that uses a step's module again
    last: dict[str, int] = {}
    for step in reversed(range(len(order))):
        following[step] = last.get(order[step])
        last[order[step]] = step
    there: set[str] = set()
    gathered = live = most = passed = 0
    for step, i in enumerate(order):
        wanted = [] if i in there else [i]
        passed, ahead = max(passed, step + 1), 0
        room = min(zero["stage3_max_live_parameters"] - live - sum(sizes[j] for j in wanted),
                   zero["stage3_prefetch_bucket_size"])  # fmt: skip
        while passed < len(order) and ahead < room:
            j = order[passed]
            if j not in there and j not in wanted:
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
    staying = sum(whole.values()) - sum(sizes.values())
    return gathered, most + staying, staying


def module_order(cfg: RunConfig) -> list[str]:
    """Modules as a pass runs through them: forward, then backward, blocks again where they are recomputed."""
    forward = list(cfg.model.modules())
    if not cfg.model.activation_checkpointing:
        return forward + forward[::-1]
    parts = [list(part) for _, part in itertools.groupby(forward, key=lambda name: name.split(".")[:2])]
    backward = [
        name
        for part in reversed(parts)
        for name in ((part[-1], *part, *part[-2::-1]) if part[0].startswith("blocks.") else part)
    ]
    return forward + backward
