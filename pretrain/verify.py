"""`python -m pretrain.verify RUN [key=value ...]`: is a run folder whole, and does its training repeat?

Every checkpoint's files are compared with its manifest. Then the last logged steps are trained again, from the checkpoint
before them, in a folder of their own: batch fingerprints must be those of metrics.jsonl, and losses too, bit for bit on
the same layout and machine, to rounding elsewhere. Prints PASS (exit code 0) or the first difference (1).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.settings import ConfigError
from pretrain import checkpoint
from pretrain.config import EXIT_BAD_INPUT, RunConfig, check_data, check_layout, load
from pretrain.metrics import read_records

TOLERANCE = {"float32": 2e-5, "bf16": 2e-2}  # of a loss, on another layout


@dataclass(frozen=True)
class Replay:
    """From which checkpoint, and what metrics.jsonl says of the steps after it."""

    start: Path
    records: list[dict[str, Any]]


def check_files(folder: Path) -> str | None:
    """What is wrong with the files of a run's checkpoints, or None."""
    found = checkpoint.checkpoints(folder)
    if not found:
        return f"{folder}: there is no checkpoint"
    for path in found:
        wrong = checkpoint.damage(path)
        if wrong:
            return wrong
    named = folder / checkpoint.LATEST
    name = named.read_text().strip() if named.exists() else "missing"
    return None if name == found[-1].name else f"{named}: {name}, but the newest checkpoint is {found[-1].name}"


def plan(run: Path, steps: int) -> Replay | None:
    """What to train again: the last `steps` steps that were logged, or as many as follow a checkpoint."""
    records = [record for record in read_records(run) if record["kind"] == "train"]
    last = records[-1]["step"] if records else 0
    before = [path for path in checkpoint.checkpoints(run / "checkpoints") if checkpoint.step_of(path) < last]
    if not before:
        return None
    start = next((p for p in reversed(before) if checkpoint.step_of(p) <= last - steps), before[0])
    first = checkpoint.step_of(start)
    return Replay(start, [record for record in records if record["step"] > first])


def replay(cfg: RunConfig, planned: Replay) -> str | None:
    """Trains the planned steps again on the ranks of this process group; the first difference, or None."""
    from pretrain import ranks as process

    ranks = process.start()
    from pretrain.loop import Run

    ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        shared = ranks.gather(folder)[0]
        aside = {"run": Path(shared) / "run", "resume": str(planned.start)}
        run = Run(cfg.model_copy(update=aside), ranks)
        try:
            return _compared(run, cfg, planned)
        finally:
            run.close()
            ranks.barrier()


def _compared(run: Any, cfg: RunConfig, planned: Replay) -> str | None:
    wanted = {record["step"]: record for record in planned.records}
    for step in range(run.progress.step, max(wanted)):
        taken = run.step(step)
        batch = run.batches.fingerprint()
        loss = (run.ranks.sum(taken.loss.double().clone()) / run.ranks.world).item()
        record = wanted.get(step + 1)
        if record is None:
            continue
        if batch != record["batch"]:
            return f"step {step + 1}: the batch {batch} is not the logged {record['batch']}"
        if abs(loss - record["loss"]) > TOLERANCE[cfg.train.precision]:
            return f"step {step + 1}: the loss {loss!r} is not the logged {record['loss']!r}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.verify", description="Check a run folder.")
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the layout, such as train.micro_batch=4")
    parser.add_argument("--steps", type=int, default=5, help="logged steps to train again (default %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds this one
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if not (args.run / "config.yaml").exists() or not (args.run / "metrics.jsonl").exists():
            raise ConfigError(f"{args.run}: not a run folder (no config.yaml and metrics.jsonl in it)")
        cfg = load(args.run / "config.yaml", args.overrides)
        return _told(args.run, cfg, args.steps)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _told(folder: Path, cfg: RunConfig, steps: int) -> int:
    import os

    world = int(os.environ.get("WORLD_SIZE", "1"))
    first = os.environ.get("RANK", "0") == "0"
    wrong = check_files(folder / "checkpoints")
    planned = None if wrong else plan(folder, steps)
    if planned is not None:
        check_layout(cfg, world, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world))
        check_data(cfg)
        wrong = replay(cfg, planned)
    if first:
        count = len(checkpoint.checkpoints(folder / "checkpoints"))
        if wrong:
            print(f"FAIL: {wrong}")
        elif planned is None:
            print(f"PASS: {count} checkpoints are whole; no step was logged after one, so none was trained again")
        else:
            span = f"{planned.records[0]['step']} to {planned.records[-1]['step']}"
            print(f"PASS: {count} checkpoints are whole; steps {span}, trained again from {planned.start.name}, agree")
    if planned is not None:
        from pretrain import ranks as process

        process.stop()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
