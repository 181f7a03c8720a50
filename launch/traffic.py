"""What the GPUs of a run send each other in one update, from its configuration alone.

`python -m benchmarks.plan` compares this with what collectives are called with. The legend is launch/footprint.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.gpus import Gpu
from launch import footprint
from launch.cluster import HOP_S, LINK_EFFICIENCY, Cluster

if TYPE_CHECKING:
    from pretrain.config import RunConfig

Behind = Literal["nothing", "trunk", "head"]


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in one update, as seen by one GPU.

    `payload` is what the calls handle in all, in bytes: the tensor of an all-reduce, the gathered side of an
    all-gather, the side before the sum of a reduce-scatter. `behind` is the work that hides it, as far as that lasts.
    """

    what: str
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    ranks: int
    ranks_in_node: int  # of this group
    payload: int
    calls: int
    behind: Behind

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
        """In a ring over all links of the group at once; an all-reduce has the latency of a tree."""
        bandwidth = gpu.link_bytes_s
        if self.ranks > self.ranks_in_node:
            bandwidth = min(bandwidth, self.ranks_in_node * gpu.network_bytes_s)
        hops = 2 * math.ceil(math.log2(self.ranks)) if self.kind == "all-reduce" else self.ranks - 1
        return self.wire / (bandwidth * LINK_EFFICIENCY) + self.calls * hops * HOP_S


def collectives(cfg: RunConfig, cluster: Cluster) -> list[Collective]:
    """What one GPU takes part in during one update; groups of one are left out, and so are norms and flags of a few
    bytes.
    """
    kinds = [*_of_trunk(cfg, cluster), *_of_vocabulary_group(cfg, cluster), _of_replicas(cfg, cluster)]
    return [kind for kind in kinds if kind.ranks > 1]


def _of_trunk(cfg: RunConfig, cluster: Cluster) -> Iterator[Collective]:
    """ZeRO's, as DeepSpeed 0.19 makes them: at stage 2 whole gradients are reduced, in every pass."""
    total, b = footprint.parameters(cfg).trunk, footprint.width(cfg)
    stage, zero = cfg.zero_stage(), footprint.zero_settings(cfg)
    passes, bucket = cfg.accumulation(cluster.gpus), int(zero["reduce_bucket_size"])
    world = cluster.gpus, cluster.ranks_per_node
    overlaps = zero["overlap_comm"] if zero["overlap_comm"] is not None else stage == 3
    behind: Behind = "trunk" if stage > 1 and overlaps else "nothing"
    if stage == 3:
        gathered, _, staying = footprint.stage3_gathers(cfg)
        ahead = max(1, min(zero["stage3_prefetch_bucket_size"], gathered))
        calls = min(len(footprint.module_order(cfg)), -(-gathered // ahead)) * passes
        yield Collective("trunk weights", "all-gather", *world, b * (gathered * passes + staying), calls, behind)
        calls = -(-total // bucket) * passes
        yield Collective("trunk gradients", "reduce-scatter", *world, b * total * passes, calls, behind)
        return
    times = passes if stage == 2 else 1
    at_once = footprint.FLAT_BUCKET if stage == 0 or (stage == 1 and b == 2) else bucket
    calls = -(-total // at_once) * times
    yield Collective("trunk gradients", "all-reduce", *world, b * total * times, calls, behind)
    if stage:
        groups = len(footprint.optimizer_groups(cfg))
        yield Collective("trunk weights", "all-gather", *world, b * total, groups, "nothing")


def _of_vocabulary_group(cfg: RunConfig, cluster: Cluster) -> Iterator[Collective]:
    """The head's, chunk by chunk of tokens (model/harmonic.py), and the tied embedding's."""
    k, d, b = footprint.vocab_ranks(cfg, cluster), cfg.model.dim, footprint.width(cfg)
    group, passes = (k, min(k, cluster.ranks_per_node)), cfg.accumulation(cluster.gpus)
    chunks, _ = footprint.head_chunks(cfg, k, cluster.hardware.memory)
    tokens, calls = footprint.pass_tokens(cfg) * k * passes, chunks * passes
    yield Collective("hidden states and targets", "all-gather", *group, tokens * (d * b + 8), 2 * calls, "nothing")
    sums = 3 if cfg.head.options.apart is None else 6  # with smoothing or a cap those of all scores too
    yield Collective("maxima and sums of scores", "all-reduce", *group, tokens * 4 * (1 + sums), 2 * calls, "head")
    yield Collective("gradient of hidden states", "reduce-scatter", *group, tokens * d * 4, calls, "head")
    if footprint.replicated_head(cfg):
        size = 4 * footprint.replicated_head(cfg) * passes
        yield Collective("head's replicated parameters", "all-reduce", *group, size, passes, "nothing")
    if cfg.model.tied:
        yield Collective("embedded tokens", "reduce-scatter", *group, tokens * d * 4, passes, "nothing")
        size = tokens * (d * 4 + 8)  # and the tokens themselves
        yield Collective("gradient of embedded tokens", "all-gather", *group, size, 2 * passes, "nothing")


def _of_replicas(cfg: RunConfig, cluster: Cluster) -> Collective:
    """Ranks that hold the same prototypes: one of each vocabulary group."""
    k = footprint.vocab_ranks(cfg, cluster)
    ranks, near = cluster.gpus // k, max(1, cluster.ranks_per_node // k)
    size = 4 * footprint.prototype_elements(cfg, cluster)
    return Collective("prototype gradients", "all-reduce", ranks, near, size, 1, "nothing")
