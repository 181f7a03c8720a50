"""`python -m pretrain.report RUN [RUN ...]`: what runs came to, side by side, from their metrics.jsonl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.settings import ConfigError
from data.shards import open_split
from pretrain.config import EXIT_BAD_INPUT, RunConfig, load
from pretrain.metrics import clock, read_records
from pretrain.scoring import unigram_bits_per_byte

UNMEASURED = "not measured: no energy counter"


def summarise(run: Path) -> dict[str, Any]:
    """The figures of a run folder; None for what is not there. Raises ConfigError if it is no run folder."""
    if not (run / "config.yaml").exists() or not (run / "metrics.jsonl").exists():
        raise ConfigError(
            f"{run}: not a run folder (no config.yaml and metrics.jsonl in it); give one that was trained"
        )
    cfg = load(run / "config.yaml")
    records = read_records(run)
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    last = held_out[-1] if held_out else {}
    seconds = sum(record["seconds"] for record in train)
    tokens = train[-1]["tokens"] if train else 0
    joules = {kind: _total([r["gpu_j"] for r in records if r["kind"] == kind]) for kind in ("train", "eval", "save")}
    return {
        "head": cfg.head.distance,
        "step": max((record["step"] for record in records), default=0),
        "steps": cfg.train.steps,
        "tokens": tokens,
        "loss": train[-1]["loss_mean"] if train else None,
        "perplexity": last.get("perplexity"),
        "bits_per_byte": last.get("bits_per_byte"),
        "unigram_bits_per_byte": _unigram(cfg),
        "train_seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else None,
        "gpu_j": joules,
        "gpu_j_per_token": joules["train"] / tokens if joules["train"] is not None and tokens else None,
        "skipped": sum(record["skipped"] for record in train),
    }


def _total(joules: list[float | None]) -> float | None:
    """The sum, or None if any part of it was not measured."""
    measured = [j for j in joules if j is not None]
    return sum(measured) if measured and len(measured) == len(joules) else None


def _unigram(cfg: RunConfig) -> float | None:
    try:
        return unigram_bits_per_byte(open_split(cfg.data.path, "train"), open_split(cfg.data.path, "val"))
    except ConfigError:
        return None  # the data are elsewhere; the run's own figures stand


def table_of(found: dict[str, dict[str, Any]]) -> Table:
    """Runs by column."""
    rows = {
        "head": lambda s: s["head"],
        "steps": lambda s: f"{s['step']:,} of {s['steps']:,}",
        "tokens": lambda s: f"{s['tokens']:,}",
        "final training loss (nats/token)": lambda s: _number(s["loss"], "{:.4f}"),
        "held-out perplexity": lambda s: _number(s["perplexity"], "{:.2f}"),
        "held-out bits/byte": lambda s: _number(s["bits_per_byte"], "{:.4f}"),
        "unigram model's bits/byte": lambda s: _number(s["unigram_bits_per_byte"], "{:.4f}"),
        "training time": lambda s: clock(s["train_seconds"]),
        "tokens/s": lambda s: _number(s["tokens_per_s"], "{:,.0f}"),
        "GPU energy, training": lambda s: _number(s["gpu_j"]["train"], "{:,.0f} J", UNMEASURED),
        "GPU energy, evaluation": lambda s: _number(s["gpu_j"]["eval"], "{:,.0f} J", UNMEASURED),
        "GPU energy, saving": lambda s: _number(s["gpu_j"]["save"], "{:,.0f} J", UNMEASURED),
        "J/token": lambda s: _number(s["gpu_j_per_token"], "{:.3e}", UNMEASURED),
        "steps skipped (not finite)": lambda s: f"{s['skipped']}",
    }
    table = Table("", *found)
    for name, told in rows.items():
        table.add_row(name, *(told(summary) for summary in found.values()))
    return table


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description="What runs came to, side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    args = parser.parse_args(argv)
    try:
        found = {str(run): summarise(run) for run in args.runs}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table_of(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
