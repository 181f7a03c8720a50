"""What a run keeps in a GPU's memory, from its configuration alone: the trunk as DeepSpeed 0.19's ZeRO holds it, the
prototypes beside it, activations, and the head's working memory.

`python -m benchmarks.plan` compares this with what is really allocated.

Legend: P parameters of the trunk, V prototypes in all, R rows of them on a rank, D width, n tokens of a rank's pass, k
ranks in a vocabulary group, b bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cluster import Cluster
from pretrain.config import RunConfig
from pretrain.gpus import GIB

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


def block_modules(cfg: RunConfig) -> list[int]:
    """Parameters of a block's modules, in the order of the forward pass."""
    d, bias = cfg.model.dim, int(cfg.model.bias)
    norm = d * (1 + bias)
    return [norm, 3 * d * (d + bias), d * (d + bias), norm, 4 * d * (d + bias), d * (4 * d + bias)]


def outer_modules(cfg: RunConfig) -> list[int]:
    """Token embedding (unless tied) and positions."""
    positions = cfg.model.seq_len * cfg.model.dim
    return [positions] if cfg.model.tied else [cfg.model.vocab_size * cfg.model.dim, positions]


def final_norm(cfg: RunConfig) -> int:
    return cfg.model.dim * (1 + int(cfg.model.bias))


def replicated_head(cfg: RunConfig) -> int:
    """Trained parameters of the head that every rank holds: Mahalanobis' factor, a learned exponent."""
    d = cfg.model.dim
    factor = {"diagonal": d, "full": d * d}[str(cfg.head.params.get("factor", "diagonal"))]
    return factor * (cfg.head.distance == "mahalanobis") + (cfg.head.exponent == "learned")


def parameters(cfg: RunConfig) -> Parameters:
    outer = outer_modules(cfg)
    return Parameters(
        trunk=sum(outer) + cfg.model.layers * sum(block_modules(cfg)) + final_norm(cfg),
        token_embedding=0 if cfg.model.tied else outer[0],
        positions=outer[-1],
        head=cfg.model.vocab_size * cfg.model.dim + replicated_head(cfg),
    )


def prototype_elements(cfg: RunConfig, cluster: Cluster) -> int:
    """Of the head's parameters, those that a rank holds."""
    return -(-cfg.model.vocab_size // vocab_ranks(cfg, cluster)) * cfg.model.dim + replicated_head(cfg)


def optimizer_groups(cfg: RunConfig) -> tuple[list[int], list[int]]:
    """Trunk parameters that decay by default (matrices), and the rest: DeepSpeed flattens them apart."""
    d = cfg.model.dim
    matrices = [3 * d * d, d * d, 4 * d * d, 4 * d * d]
    others = sum(block_modules(cfg)) - sum(matrices)
    return matrices * cfg.model.layers, [*outer_modules(cfg), *[others] * cfg.model.layers, final_norm(cfg)]


def vocab_ranks(cfg: RunConfig, cluster: Cluster) -> int:
    return cfg.parallel.vocab_ranks(cluster.gpus, cluster.ranks_per_node)


def zero_stage(cfg: RunConfig) -> int:
    """As pretrain.engine.zero_stage, which brings DeepSpeed: a test compares them."""
    return max(cfg.parallel.zero, 1) if cfg.train.precision == "bf16" else cfg.parallel.zero


def width(cfg: RunConfig) -> int:
    """Bytes of the compute dtype."""
    return 2 if cfg.train.precision == "bf16" else 4


def zero_settings(cfg: RunConfig) -> dict[str, Any]:
    return {**ZERO_DEFAULTS, **cfg.deepspeed.get("zero_optimization", {})}


def pass_tokens(cfg: RunConfig) -> int:
    """n: of one rank and pass."""
    return cfg.train.micro_batch * cfg.model.seq_len


def activations(cfg: RunConfig) -> int:
    """Bytes that the trunk's forward pass keeps for the backward pass.

    Of a block per token: its input, two normalised inputs, q, k, v and their mix, the sum before the MLP, and the MLP's
    inside before and after GELU: 16 D; means and deviations of two norms, and the attention's log-sum-exp per head, in
    float32; a byte per masked entry where there is dropout. Recomputed: only the block's input.
    """
    model, b = cfg.model, width(cfg)
    kept = model.dim * b if model.activation_checkpointing else _block_activations(cfg)
    return pass_tokens(cfg) * model.layers * kept + _final_activations(cfg)


def _final_activations(cfg: RunConfig) -> int:
    """Bytes of the last block's output and of the hidden states: gone when the blocks' gradients are taken."""
    return 2 * pass_tokens(cfg) * cfg.model.dim * width(cfg)


def _block_activations(cfg: RunConfig) -> int:
    """Bytes per token."""
    model = cfg.model
    masks = 2 * model.dim if model.dropout else 0
    return 16 * model.dim * width(cfg) + 4 * (4 + model.heads) + masks


def _backward_work(cfg: RunConfig) -> int:
    """Bytes on top at the widest place of a block, GELU's gradient: 9 D of gradients where 4 D are no longer needed;
    and the block itself where it is recomputed.
    """
    again = _block_activations(cfg) if cfg.model.activation_checkpointing else 0
    return pass_tokens(cfg) * (5 * cfg.model.dim * width(cfg) + again)


def by_product(cfg: RunConfig) -> bool:
    """Whether the head's distance is a matrix product; the others go entry by entry, at a speed of their own."""
    head = cfg.head
    special = {"hamming": head.params.get("kind") == "hard", "minkowski": head.params.get("p") == 2}
    return head.distance in ("euclidean", "cosine", "mahalanobis", "dot") or special.get(head.distance, False)


def head_chunks(cfg: RunConfig, vocab_ranks: int) -> tuple[int, int]:
    """Chunks of a pass and bytes of working memory, as model.harmonic cuts them; for distances that are no product, an
    upper bound of both.
    """
    n, d, rows = pass_tokens(cfg), cfg.model.dim, -(-cfg.model.vocab_size // vocab_ranks)
    kept, temporaries, narrow = (1, 1, width(cfg)) if by_product(cfg) else (2, 2, 0)
    pairs = kept * (2 if vocab_ranks > 1 else 1) + temporaries
    per_token = vocab_ranks * (rows * (pairs * 4 + narrow) + d * 3 * 4)
    budget = CHUNK_BYTES if cfg.head.chunk_mib is None else cfg.head.chunk_mib * 2**20
    chunks = -(-n // max(1, budget // per_token))
    return chunks, -(-n // chunks) * per_token


def memory(cfg: RunConfig, cluster: Cluster) -> Memory:
    """Of one GPU, at the fullest moment of each phase of a step."""
    world, k, b = cluster.gpus, vocab_ranks(cfg, cluster), width(cfg)
    n, d, several = pass_tokens(cfg), cfg.model.dim, cfg.accumulation(world) > 1
    rows = prototype_elements(cfg, cluster)
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
    total, b, stage = parameters(cfg).trunk, width(cfg), zero_stage(cfg)
    share, bucket = -(-total // world), int(zero_settings(cfg)["reduce_bucket_size"])
    matrices, rest = optimizer_groups(cfg)
    largest = max(sum(matrices), sum(rest))
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
    standing = {"trunk weights": b * total, "trunk masters": 4 * share, "trunk moments": 8 * share}
    if stage == 1 and b == 2:  # BF16_Optimizer: every rank adds all gradients up in float32
        reduced = {"gradients to be reduced": 2 * largest if sum(matrices) > FLAT_BUCKET else 6 * total}
        return made({**standing, "trunk gradients in float32": 4 * total}, 2 * total, reduced)
    if stage < 3:  # DeepSpeedZeroOptimizer: float32 gradients stay views of whole parameters
        own = share if b == 2 else sum(_most_overlapped(group, world) for group in (matrices, rest))
        whole = {"gradients before they are reduced": 4 * total} if stage == 1 and several else {}
        buckets = 2 if zero_settings(cfg)["overlap_comm"] else 1  # and a copy while one is reduced
        buffers = {"reduction buffers": b * (buckets * bucket + min(bucket, total))}
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
    zero = zero_settings(cfg)
    sizes = [*outer_modules(cfg), *block_modules(cfg) * cfg.model.layers, final_norm(cfg)]
    order = module_order(cfg)
    persistent = {i for i, size in enumerate(sizes) if size <= zero["stage3_param_persistence_threshold"]}
    persistent.add(len(outer_modules(cfg)) - 1)  # the positions, which the decoder reads itself
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


def module_order(cfg: RunConfig) -> list[int]:
    """Modules by index, as a pass runs through them: forward, then backward, blocks again where they are recomputed."""
    first, per_block = len(outer_modules(cfg)), len(block_modules(cfg))
    blocks = [
        list(range(first + layer * per_block, first + (layer + 1) * per_block)) for layer in range(cfg.model.layers)
    ]
    outer, norm = list(range(first)), first + cfg.model.layers * per_block
    forward = [*outer, *(i for block in blocks for i in block), norm]
    if not cfg.model.activation_checkpointing:
        return forward + forward[::-1]
    backward = [i for block in reversed(blocks) for i in (block[-1], *block, *block[-2::-1])]
    return [*forward, norm, *backward, *reversed(outer)]
