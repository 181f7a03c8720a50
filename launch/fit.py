"""What makes a run fit into the memory of its GPUs: its largest micro-batch, and the cheapest changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.cluster import Cluster
from launch.footprint import memory, vocab_ranks

if TYPE_CHECKING:
    from pretrain.config import RunConfig


def altered(cfg: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The same configuration with some values of its sections changed."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    )


def divisors(number: int) -> list[int]:
    """All of them, from 1 to the number itself."""
    return [k for k in range(1, number + 1) if number % k == 0]


def fits(cfg: RunConfig, cluster: Cluster) -> bool:
    """Whether the run's memory has room on each of these GPUs."""
    return memory(cfg, cluster).peak <= cluster.usable_bytes


def largest_micro_batch(cfg: RunConfig, cluster: Cluster) -> int | None:
    """The largest that shares the batch evenly and fits; None: not even one sequence does."""
    sizes = divisors(cfg.sequences_per_step() // cluster.gpus)
    return next((size for size in reversed(sizes) if fits(altered(cfg, train={"micro_batch": size}), cluster)), None)


def cheapest_changes(cfg: RunConfig, cluster: Cluster) -> tuple[str, ...] | None:
    """What makes a run fit that does not: the first of activation checkpointing, a higher ZeRO stage, a larger
    vocabulary group, a smaller micro-batch and more GPUs that is enough alone; else they are added up in this order.
    Empty: it fits. None: nothing helps.
    """
    if fits(cfg, cluster):
        return ()
    rungs = (_checkpointed, _higher_stage, _larger_group, _smaller_batch, _more_gpus)
    alone = (change for rung in rungs for change, changed, where in rung(cfg, cluster) if fits(changed, where))
    if (enough := next(alone, None)) is not None:
        return (enough,)
    done: tuple[str, ...] = ()
    for rung in rungs:
        last = None
        for change, changed, where in rung(cfg, cluster):
            if fits(changed, where):
                return (*done, change)
            last = change, changed, where
        if last is not None:
            change, cfg, cluster = last
            done = (*done, change)
    return None


Change = tuple[str, "RunConfig", Cluster]  # what is changed, and the run and its GPUs with it


def _checkpointed(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if not cfg.model.activation_checkpointing:
        changed = altered(cfg, model={"activation_checkpointing": True})
        yield "model.activation_checkpointing=true", changed, cluster


def _higher_stage(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    for stage in range(cfg.zero_stage() + 1, 4):
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
            change = f"--gpus {gpus}" + (f" train.micro_batch={size}" if size != cfg.train.micro_batch else "")
            yield change, altered(cfg, train={"micro_batch": size}), replace(cluster, gpus=gpus)
