"""What a run asks of its hosts, from its configuration alone: memory, disk, and the time of ZeRO's offload.

Legend: S elements of the trunk that a rank steps, b bytes of the compute dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch import footprint
from launch.cluster import LINK_EFFICIENCY, Cluster

if TYPE_CHECKING:
    from pretrain.config import RunConfig

SAVED = 12  # bytes that a checkpoint holds of each parameter: the master and two moments
STEPPED = 28  # bytes that AdamW moves for each parameter: it reads a gradient too, and writes those three


def share(cfg: RunConfig, cluster: Cluster) -> int:
    """S."""
    return -(-footprint.parameters(cfg).trunk // cluster.gpus)


def memory(cfg: RunConfig, cluster: Cluster) -> dict[str, int]:
    """Bytes of host memory by what they are, on the fullest host: of all its ranks, without the program's own."""
    own, b, stage = share(cfg, cluster), footprint.width(cfg), cfg.zero_stage()
    ranks = cluster.ranks_per_node
    writing = min(ranks, footprint.vocab_ranks(cfg, cluster))  # one replica of each shard of the prototypes
    rows = footprint.prototype_elements(cfg, cluster)
    found = {"copies that a save writes from": SAVED * (ranks * own + writing * rows)}
    if cfg.offloads("optimizer"):
        largest = max(max(group) for group in footprint.optimizer_groups(cfg))
        # gradients of all passes; or weights on their way back, and a parameter's gradient
        buffers = 4 * own if stage == 3 else b * (own + largest)
        found["offloaded masters and moments"] = ranks * SAVED * own
        found["offloaded gradients and buffers"] = ranks * (4 * own + buffers)
    if cfg.offloads("param"):
        found["offloaded weights"] = ranks * b * own
    return found


def checkpoint_bytes(cfg: RunConfig) -> int:
    """Of one checkpoint."""
    return SAVED * footprint.parameters(cfg).total


def disk_bytes(cfg: RunConfig) -> int:
    """Of all checkpoints that stay at the end of a run, and the draft of one more."""
    kept = cfg.checkpoint
    lasting = cfg.train.steps // kept.keep_every if kept.keep_every else 0
    return checkpoint_bytes(cfg) * (kept.keep + lasting + kept.keep_best + 1)


def update_s(cfg: RunConfig, cluster: Cluster) -> float:
    """Seconds of AdamW's pass over the trunk's share and the prototypes' rows, each where it is."""
    gpu, total = cluster.hardware, footprint.parameters(cfg).trunk
    own = total if cfg.zero_stage() == 0 else share(cfg, cluster)
    where = gpu.host_memory_bytes_s if cfg.offloads("optimizer") else gpu.memory_bytes_s
    rows = footprint.prototype_elements(cfg, cluster)
    return STEPPED * own / where + STEPPED * rows / gpu.memory_bytes_s


def moving_s(cfg: RunConfig, cluster: Cluster) -> float:
    """Seconds of an update in which a GPU and its host's memory send each other what is offloaded."""
    own, b, passes = share(cfg, cluster), footprint.width(cfg), cfg.accumulation(cluster.gpus)
    moved = 0
    if cfg.offloads("optimizer"):
        there_and_back = 2 * (passes - 1) if cfg.zero_stage() == 3 else 0  # what earlier passes added up
        moved += (4 * (1 + there_and_back) + b) * own
    if cfg.offloads("param"):
        gathered, _, staying = footprint.stage3_gathers(cfg)
        moved += b * (gathered * passes + staying) // cluster.gpus
    return moved / (cluster.hardware.host_link_bytes_s * LINK_EFFICIENCY)
