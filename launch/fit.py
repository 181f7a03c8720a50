"""What makes a run fit into the memory of its GPUs: its largest micro-batch, and the cheapest changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from common.numbers import divisors
from launch import host
from launch.cluster import Cluster
from launch.footprint import memory, vocab_ranks

if TYPE_CHECKING:
    from pretrain.config import RunConfig


def altered(cfg: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The same configuration with some values of its sections changed."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    )


def fits(cfg: RunConfig, cluster: Cluster) -> bool:
    """Whether the run's memory has room on each of these GPUs, and on their hosts."""
    on_host = sum(host.memory(cfg, cluster).values())
    return on_host <= cluster.usable_host_bytes and memory(cfg, cluster).peak <= cluster.usable_bytes


def largest_micro_batch(cfg: RunConfig, cluster: Cluster) -> int | None:
    """The largest that shares the batch evenly and fits; None: not even one sequence does."""
    sizes = divisors(cfg.sequences_per_step() // cluster.gpus)
    return next((size for size in reversed(sizes) if fits(altered(cfg, train={"micro_batch": size}), cluster)), None)


def cheapest_changes(cfg: RunConfig, cluster: Cluster) -> tuple[str, ...] | None:
    """What makes a run fit that does not: the first of activation checkpointing, a higher ZeRO stage, a larger
    vocabulary group, a smaller micro-batch and more GPUs that is enough alone; else they are added up in this order;
    last, all but more GPUs with offload to the hosts' memory. Empty: it fits. None: nothing helps.
    """
    if fits(cfg, cluster):
        return ()
    rungs = (_checkpointed, _higher_stage, _larger_group, _smaller_batch)
    alone = (
        change for rung in (*rungs, _more_gpus) for change, changed, where in rung(cfg, cluster) if fits(changed, where)
    )
    if (enough := next(alone, None)) is not None:
        return (enough,)
    return _added_up(cfg, cluster, (*rungs, _more_gpus)) or _added_up(cfg, cluster, (*rungs, _offloaded))


def _added_up(cfg: RunConfig, cluster: Cluster, rungs: tuple[Rung, ...]) -> tuple[str, ...] | None:
    """Change upon change, until it fits; None: it does not."""
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


def layouts(
    cfg: RunConfig, cluster: Cluster, groups: Sequence[int | str] = (1, "node", "world")
) -> Iterator[RunConfig]:
    """The same training in every ZeRO stage, vocabulary group and micro-batch, blocks recomputed or kept."""
    stages = range(0 if cfg.train.precision == "float32" else 1, 4)
    sizes = divisors(cfg.sequences_per_step() // cluster.gpus)
    for zero, group, again, size in itertools.product(stages, groups, (False, True), sizes):
        yield altered(
            cfg,
            parallel={"zero": zero, "vocab": group},
            model={"activation_checkpointing": again},
            train={"micro_batch": size},
        )


def settings_between(cfg: RunConfig, other: RunConfig) -> tuple[str, ...]:
    """What makes one of `layouts` of the other, as key=value."""
    keys = (
        ("parallel", "zero"),
        ("parallel", "vocab"),
        ("model", "activation_checkpointing"),
        ("train", "micro_batch"),
    )
    pairs = ((f"{a}.{b}", getattr(getattr(cfg, a), b), getattr(getattr(other, a), b)) for a, b in keys)
    return tuple(f"{key}={str(now).lower()}" for key, was, now in pairs if was != now)


Rung = Callable[["RunConfig", Cluster], Iterator["Change"]]
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


def _offloaded(cfg: RunConfig, cluster: Cluster) -> Iterator[Change]:
    zero, words = dict(cfg.deepspeed.get("zero_optimization", {})), []
    parts: tuple[Literal["optimizer", "param"], ...] = ("optimizer", "param")
    for what in parts[: 1 + (cfg.zero_stage() == 3)]:
        if cfg.zero_stage() and not cfg.offloads(what):
            zero[f"offload_{what}"] = {"device": "cpu"}
            words.append(f"deepspeed.zero_optimization.offload_{what}.device=cpu")
            changed = cfg.model_copy(update={"deepspeed": {**cfg.deepspeed, "zero_optimization": dict(zero)}})
            yield " ".join(words), changed, cluster
