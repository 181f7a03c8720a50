"""`python -m benchmarks.train CONFIG [key=value ...] [--steps N]`: how fast a training step is, and where it goes.

In one run: Overtone's step on one process with all cores (or one GPU) and, in turn with it, the same model in a
process of plain PyTorch: eager, bf16 autocast, softmax cross-entropy over materialised logits, fused AdamW. On a CPU
also the same global step on two ranks with half the cores each: what ZeRO and the vocabulary-parallel head add to
ideal. Times are medians. Phases are timed in steps of their own, since on a GPU timing a phase waits for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.measuring import batches_of, machine, parser, timed, trainer_of, wait, wide_console
from benchmarks.plain import LEARNING_RATE, Plain
from common.errors import ConfigError
from common.strict_json import to_json
from launch.hosts import place
from launch.invocation import command, environment
from model.decoder import Decoder
from pretrain.config import RunConfig, check_data, check_layout, load
from pretrain.runtime import ranks as process

if TYPE_CHECKING:  # DeepSpeed's start takes seconds
    from pretrain.batches import Batches
    from pretrain.engine import Trainer

WARM_UP = 2
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce", "all_gather")


def product_rate(device: torch.device, tokens: int, dim: int) -> float:
    """The machine's bf16 matrix-product rate in FLOP/s at the decoder's own largest shape: (tokens, D) @ (D, 4D)."""
    a, b = (torch.randn(s, device=device).bfloat16() for s in ((tokens, dim), (dim, 4 * dim)))
    times = [timed(lambda: a @ b, device) for _ in range(25)]
    return 2 * tokens * dim * 4 * dim / statistics.median(times[5:])


class PlainProcess:
    """The baseline in a process of its own, as its user would start it, stepped in turn with ours."""

    def __init__(self, config: str, overrides: list[str]) -> None:
        words = [sys.executable, "-m", "benchmarks.train", config, *overrides, "--plain"]
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.child.stdin is not None and self.child.stdout is not None
        self.stdin, self.stdout = self.child.stdin, self.child.stdout

    def step(self, number: int) -> float:
        """Seconds of one step."""
        print(number, file=self.stdin, flush=True)
        return float(self.stdout.readline())

    def close(self) -> None:
        """Ends the child by closing its input, and waits for it."""
        self.stdin.close()
        self.child.wait()


def serve_plain(cfg: RunConfig) -> None:
    """The child of PlainProcess: reads step numbers, answers with seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = Decoder(cfg.model.model_copy(update={"compile": False, "tied": False}), seed=1)
    for block in decoder.blocks:
        block.attention.short = 0  # type: ignore[union-attr, assignment]  # torch's own attention kernel
    plain = Plain(cfg, device, decoder)
    batches = batches_of(cfg, process.Ranks(0, 1, 0, 1, device))
    for line in sys.stdin:
        read = [batch.to(device) for batch in batches.of(int(line))]
        print(timed(lambda r=read: plain.step(r), device), flush=True)  # type: ignore[misc]


@contextlib.contextmanager
def phases(trainer: Any, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs inside; `communication` is part of the others."""
    spent: dict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as watches:

        def watch(owner: Any, name: str, phase: str) -> None:
            inner = getattr(owner, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                wait(device)
                began = time.perf_counter()
                result = inner(*args, **kwargs)
                wait(device)
                spent[phase] += time.perf_counter() - began
                return result

            watches.enter_context(mock.patch.object(owner, name, watched))

        watch(trainer, "hidden", "trunk forward")
        watch(trainer.head, "forward", "head, gradient included")
        watch(trainer.engine, "backward", "trunk backward")
        watch(trainer.engine, "step", "optimiser: trunk, norm and clip")
        watch(trainer, "_step_head", "optimiser: head")
        for name in COLLECTIVES:
            watch(dist, name, "communication")
        yield spent


def phases_of(trainer: Trainer, batches: Batches, steps: Callable[[], float]) -> dict[str, float]:
    """Seconds by phase of what `steps` takes, which gives its seconds in all; `rest` is what is in no phase."""
    batches.restart()
    with phases(trainer, trainer.ranks.device) as spent:
        whole = steps()
    where = {"data wait": batches.waited_s, **spent}
    return {**where, "rest": whole - sum(where.values()) + where.get("communication", 0.0)}


def measure(cfg: RunConfig, steps: int, plain: PlainProcess | None = None) -> dict[str, Any]:
    """Times this rank's world: steps in turn with the baseline's, then steps with their phases."""
    trainer = trainer_of(cfg)
    batches, device = batches_of(cfg, trainer.ranks), trainer.ranks.device

    def seconds_of(step: int) -> float:
        return timed(lambda: trainer.train_step(batches.of(step), LEARNING_RATE), device)

    ours, theirs = [], []
    for step in range(WARM_UP + steps):
        ours.append(seconds_of(step))
        if plain is not None:
            time.sleep(0.1)  # until our threads have stopped to spin
            theirs.append(plain.step(step))
            time.sleep(0.1)
    where = phases_of(trainer, batches, lambda: sum(map(seconds_of, range(steps))))
    communication = where.pop("communication", 0.0)
    return {
        "step_s": statistics.median(ours[WARM_UP:]),
        "plain_step_s": statistics.median(theirs[WARM_UP:]) if theirs else None,
        "phases_s": {name: seconds / steps for name, seconds in where.items()},
        "communication_s": communication / steps,
        "rate": product_rate(device, cfg.train.micro_batch * cfg.model.seq_len, cfg.model.dim),
        "rank": trainer.ranks.rank,
    }


def in_two_ranks(config: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """The same measurement on two ranks under the deepspeed launcher; rank 0's figures."""
    placement = place(per_host=2)
    words = command(config, overrides, placement, module="benchmarks.train") + ["--steps", str(steps), "--inner"]
    done = subprocess.run(words, env={**os.environ, **environment(placement)}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"the two ranks failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def show(cfg: RunConfig, figures: dict[str, Any], two: dict[str, Any] | None, device: torch.device) -> None:
    """Prints speeds and phases, of one rank and, if they were measured, of two."""
    console = wide_console()
    tokens = cfg.train.tokens_per_step
    used = cfg.model.flops_per_token() * tokens / figures["step_s"]
    plain = figures["plain_step_s"]
    console.print(f"{machine(device)}; {tokens:,} tokens per step; medians")
    console.print(
        f"{cfg.model.layers} layers, D {cfg.model.dim}, T {cfg.model.seq_len}, V {cfg.model.vocab_size}, "
        f"{cfg.head.distance} head, {cfg.train.precision}, ZeRO {cfg.parallel.zero}"
    )
    table = Table("", "s/step", "tokens/s", "against plain PyTorch")
    steps = {"Overtone": figures["step_s"], "plain PyTorch, softmax": plain}
    if two is not None:
        steps["Overtone, 2 ranks"] = two["step_s"]
    for name, seconds in steps.items():
        table.add_row(name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{plain / seconds:.2f}x")
    console.print(table)
    console.print(
        f"share of the machine's bf16 product rate ({figures['rate'] / 1e9:,.0f} GFLOP/s): {used / figures['rate']:.0%}"
    )
    if two is not None:
        console.print(f"two ranks against one on the same cores: {two['step_s'] / figures['step_s'] - 1:+.0%}")
    where = Table("phase", "1 rank, s", "share", *(["2 ranks, s", "share"] if two else []))
    for name in figures["phases_s"]:
        row = [name]
        for rank in (figures, two):
            if rank is not None:
                seconds = rank["phases_s"].get(name, 0.0)
                row += [f"{seconds:.4f}", f"{seconds / sum(rank['phases_s'].values()):.0%}"]
        where.add_row(*row)
    where.add_row(
        "(of these, communication)",
        *(f for rank in (figures, two) if rank for f in (f"{rank['communication_s']:.4f}", "")),
    )
    console.print(where)


def trainable(config: str, overrides: list[str]) -> RunConfig:
    """A configuration that one rank can train. Raises ConfigError."""
    cfg = load(config, overrides)
    check_layout(cfg, 1, 1)
    check_data(cfg)
    return cfg


def main(argv: list[str] | None = None) -> int:
    """The command, a rank of its two, or its baseline's process; 2: input that is refused."""
    command = parser("train", __doc__)
    command.add_argument("config")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument("--steps", type=int, default=9, help="timed steps of each kind")
    command.add_argument("--one", action="store_true", help="leave the two ranks out")
    command.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)  # a rank of in_two_ranks
    command.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # the child of PlainProcess
    args = command.parse_intermixed_args(argv)
    try:
        cfg = trainable(args.config, args.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.plain:
        serve_plain(cfg)
        return 0
    if args.inner:
        figures = measure(cfg, args.steps)
        if figures["rank"] == 0:
            print(to_json(figures))
        process.stop()
        return 0
    two = None
    if not args.one and not torch.cuda.is_available():
        two = in_two_ranks(args.config, args.overrides, args.steps)
    plain = PlainProcess(args.config, args.overrides)
    figures = measure(cfg, args.steps, plain)
    plain.close()
    show(cfg, figures, two, process.start().device)
    process.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
