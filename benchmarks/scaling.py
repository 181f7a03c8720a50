"""`python -m benchmarks.scaling > docs/scaling.md`: plans (launch/estimate.py) from 8 to 1,024 GPUs, not measurements.

For each number of GPUs and each kind of vocabulary group, the fastest plan that fits, over ZeRO 1 to 3, recomputed or
kept activations, and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.gpus import GIB, GPUS
from launch.cluster import Cluster
from launch.estimate import StepTime, assumptions, step_time
from launch.fit import layouts
from launch.footprint import Memory, memory, parameters, prototype_elements
from launch.traffic import collectives
from pretrain.config import RunConfig, from_tree

GPU = "h100-80gb"
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUPS: dict[str, int | str] = {"1": 1, "node": "node", "world": "world"}
MICRO_BATCHES = (1, 2, 4, 8, 16)
BAR = 40  # characters


def shape(vocab: int, sequences: int, seq_len: int, **model: Any) -> RunConfig:
    """A model to be planned, at a batch of `sequences` of `seq_len` tokens."""
    return from_tree(
        {
            "run": "unused",
            "data": {
                "path": "unused",
                "source": {"kind": "embedded"},
                "tokenizer": {"vocab_size": vocab},
                "dtype": "uint32",
            },
            "model": {"seq_len": seq_len, **model},
            "train": {"steps": 1, "tokens_per_step": sequences * seq_len, "micro_batch": 1},
            "optim": {"lr": 1e-4},
        }
    )


SHAPES = {
    "GPT-2 1.5B, untied: 48 layers, D 1600, V 51,200, T 1,024": shape(
        51_200, 1024, 1024, layers=48, heads=25, dim=1600
    ),
    "Llama 3 8B: 32 layers, D 4096, V 128,256, T 8,192": shape(
        128_256, 1024, 8192, layers=32, heads=32, kv_heads=8, dim=4096, mlp_dim=14_336, positions={"theta": 500_000},
        norm="rmsnorm", mlp="swiglu",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """The fastest plan of one number of GPUs and kind of group."""

    cfg: RunConfig
    cluster: Cluster
    time: StepTime
    memory: Memory

    @property
    def rate(self) -> float:
        """Tokens per second and GPU."""
        return self.cfg.train.tokens_per_step / self.time.total_s / self.cluster.gpus

    @property
    def head_bytes(self) -> int:
        """Of prototypes, moments and gradients on a GPU."""
        return 16 * prototype_elements(self.cfg, self.cluster)

    def head_sent(self) -> tuple[float, float]:
        """Bytes that a GPU sends in a step for the head, inside its node and out of it."""
        calls = [call for call in collectives(self.cfg, self.cluster) if not call.what.startswith("trunk")]
        between = sum(call.between_nodes for call in calls)
        return sum(call.wire for call in calls) - between, between

    @property
    def layout(self) -> str:
        """ZeRO stage, micro-batch and recomputing, as a cell."""
        words = [f"ZeRO {self.cfg.parallel.zero}", f"{self.cfg.train.micro_batch}"]
        return ", ".join(words + ["recomputed"] * self.cfg.model.activation_checkpointing)


def candidates(base: RunConfig, cluster: Cluster, group: int | str) -> Iterator[Point]:
    """The plans for a kind of group that fit the GPUs' memory."""
    for cfg in layouts(base, cluster, (group,)):
        if cfg.train.micro_batch in MICRO_BATCHES:
            point = Point(cfg, cluster, step_time(cfg, cluster), memory(cfg, cluster))
            if point.memory.peak <= cluster.usable_bytes:
                yield point


def curve(base: RunConfig) -> dict[int, dict[str, Point]]:
    """The fastest plan that fits, by GPUs and kind of group; left out where none fits."""
    by_gpus: dict[int, dict[str, Point]] = {}
    for gpus in WORLDS:
        cluster = Cluster(gpu=GPU, gpus=gpus)
        for name, group in GROUPS.items():
            best = min(candidates(base, cluster, group), key=lambda point: point.time.total_s, default=None)
            if best is not None:
                by_gpus.setdefault(gpus, {})[name] = best
    return by_gpus


def table(by_gpus: dict[int, dict[str, Point]]) -> Iterator[str]:
    """Lines of Markdown: a row for each number of GPUs and kind of group, the fastest in bold."""
    numbers = ("peak, GiB", "of it the head's", "head sends in its node, MB", "between nodes, MB", "waits, ms",
               "updates, ms", "step, ms", "tokens/s")  # fmt: skip
    yield f"| GPUs | group | layout | {' | '.join(numbers)} |"
    yield "| ---: | --- | --- " + "| ---: " * len(numbers) + "|"
    for gpus, points in by_gpus.items():
        fastest = min(points.values(), key=lambda point: point.time.total_s)
        for name, point in points.items():
            inside, outside = point.head_sent()
            step = f"{point.time.total_s * 1e3:,.1f}"
            yield (
                f"| {gpus} | {name} | {point.layout} | {point.memory.peak / GIB:.1f} | {point.head_bytes / GIB:.2f} "
                f"| {inside / 1e6:,.0f} | {outside / 1e6:,.0f} | {point.time.exposed_s * 1e3:,.1f} "
                f"| {point.time.update_s * 1e3:,.1f} | {f'**{step}**' if point is fastest else step} "
                f"| {point.rate * gpus:,.0f} |"
            )


def figure(by_gpus: dict[int, dict[str, Point]]) -> Iterator[str]:
    """Tokens per second and GPU, as bars."""
    most = max(point.rate for points in by_gpus.values() for point in points.values())
    yield "```"
    yield "tokens/s per GPU"
    for gpus, points in by_gpus.items():
        for name, point in points.items():
            bar = "#" * round(BAR * point.rate / most)
            yield f"{gpus if name == next(iter(points)) else '':>5}  {name:<5}  {bar:<{BAR}}  {point.rate:>8,.0f}"
    yield "```"


def winners(by_gpus: dict[int, dict[str, Point]]) -> Iterator[str]:
    """Where vocabulary-parallel heads win over replicated ones, in words."""
    for name in list(GROUPS)[1:]:
        both = {gpus: points for gpus, points in by_gpus.items() if "1" in points and name in points}
        gains = {gpus: points["1"].time.total_s / points[name].time.total_s - 1 for gpus, points in both.items()}
        won = [f"{gpus:,}" for gpus, gain in gains.items() if gain >= 0.0005]
        saved = [(points["1"].head_bytes - points[name].head_bytes) / GIB for points in both.values()]
        percents = ", ".join(f"{gain:+.1%} at {gpus:,}" for gpus, gain in gains.items())
        yield (
            f"- `parallel.vocab: {name}` against replicated prototypes: {min(saved):.1f} to {max(saved):.1f} GiB less "
            f"on a GPU, and more tokens/s at {', '.join(won) or 'none of these'} GPUs ({percents})."
        )


def fewest(base: RunConfig) -> Iterator[str]:
    """The fewest GPUs of each kind that hold a run, by vocabulary group."""
    yield "| GPU | " + " | ".join(f"group {name}" for name in GROUPS) + " |"
    yield "| --- " + "| ---: " * len(GROUPS) + "|"
    for gpu in GPUS:
        clusters = [Cluster(gpu=gpu, gpus=gpus) for gpus in (1, 2, 4, *WORLDS)]
        held = [
            next((f"{cluster.gpus:,}" for cluster in clusters if next(candidates(base, cluster, group), None)), "none")
            for group in GROUPS.values()
        ]
        yield f"| {gpu} | {' | '.join(held)} |"


INTRODUCTION = """\
# Scaling, as planned

Made by `python -m benchmarks.scaling > docs/scaling.md`. **Everything here is a plan, not a measurement**: what
`overtone plan` computes for H100s, 8 in a node, at a fixed batch. Memory and traffic were compared with what
small runs on a CPU allocate and send (`python -m benchmarks.footprint`, and `python -m benchmarks.recipes` for every
recipe); time was compared with nothing. A plan of your own run names the faster layouts among these as key=value.

A row is the fastest plan that fits for its number of GPUs and its vocabulary group: 1 (every GPU holds all prototypes),
node or world. The layout is the ZeRO stage of the trunk, the micro-batch, and whether blocks are recomputed. Waiting is
for communication that nothing hides.
Differences of a percent are less than such a plan can tell.

Assumed:
"""


def document() -> Iterator[str]:
    """The lines of docs/scaling.md."""
    yield INTRODUCTION
    for line in assumptions(Cluster(gpu=GPU)):
        yield f"- {line}"
    for name, base in SHAPES.items():
        by_gpus = curve(base)
        yield from ("", f"## {name}, {base.train.tokens_per_step:,} tokens per step", "")
        yield from (f"{parameters(base).total:,} parameters.", "")
        yield from table(by_gpus)
        yield ""
        yield from figure(by_gpus)
        yield ""
        yield from winners(by_gpus)
        yield from ("", "The fewest GPUs that hold it, of 1, 2, 4 and those above:", "")
        yield from fewest(base)


def main() -> None:
    """Prints the document."""
    for line in document():
        print(line)


if __name__ == "__main__":
    main()
