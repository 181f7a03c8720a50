"""`python -m pretrain.report RUN [RUN ...]`: what runs came to, side by side, from their metrics.jsonl.

With `--interpret`, also how their prototypes, embeddings and hidden states lie (docs/interpretability.md): measured on
the newest whole checkpoint and held-out text, and written to interpret.json in each run folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
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
INTERPRETED = "interpret.json"  # in the run folder


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
    return _table(found, rows)


def _table(found: dict[str, dict[str, Any]], rows: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    table = Table("", *found)
    for name, told in rows.items():
        table.add_row(name, *(told(one) for one in found.values()))
    return table


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)


def geometry_of(runs: Sequence[Path], words: Sequence[str] | None) -> dict[str, Any]:
    """The measures of pretrain/geometry.py: `runs`, by folder, and `cka`, of every two of them. Raises ConfigError."""
    from pretrain import geometry
    from pretrain.words import NEAREST

    warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # that one process reads it, on purpose
    sources = {str(run): geometry.open_run(run, words or NEAREST, strict=words is not None) for run in runs}
    measured = {name: geometry.measure(source) for name, source in sources.items()}
    figures = {name: one.figures for name, one in measured.items()}
    return _plain({"runs": figures, "cka": geometry.compare(measured)})


def _plain(tree: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def geometry_tables(found: dict[str, Any]) -> list[Table]:
    """Figures by run, CKA by pair of runs, and each run's nearest prototypes."""
    runs = found["runs"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "checkpoint's step": lambda f: f"{f['step']:,}",
        "held-out tokens looked at": lambda f: f"{f['held_out_tokens']:,}",
    }

    def row(name: str, form: str, *keys: str) -> None:
        rows[name] = lambda figures: _number(_at(figures, keys), form)

    for what in ("prototypes", "embedding", "hidden"):
        row(f"{what}: dimensions for 90% of the variance", "{:,}", "spectra", what, "dimensions_90")
        row(f"{what}: dimensions for 95%", "{:,}", "spectra", what, "dimensions_95")
        row(f"{what}: variance in the first 2", "{:.1%}", "spectra", what, "first_2")
        row(f"{what}: variance in the first 5", "{:.1%}", "spectra", what, "first_5")
        row(f"{what}: effective rank", "{:.1f}", "spectra", what, "effective_rank")
        row(f"{what}: participation ratio", "{:.1f}", "spectra", what, "participation_ratio")
    rows["prototypes: median length, by step"] = lambda f: _by_step(f, "median")
    rows["prototypes: longest over median, by step"] = lambda f: _by_step(f, "max/median")
    row("classes (tokens) with enough hidden states", "{:,}", "classes", "classes")
    row("prototype to class mean, in spreads", "{:.3f}", "classes", "centre_distance", "prototype")
    row("... a true centre would read", "{:.3f}", "classes", "centre_distance", "true_centre")
    row("... another class's prototype reads", "{:.3f}", "classes", "centre_distance", "other_prototype")
    row("scatter within / between classes", "{:.3f}", "classes", "scatter")
    row("NC1", "{:.3g}", "classes", "nc1")
    for what in ("means", "prototypes"):
        row(f"NC2, {what}: equinorm", "{:.3f}", "classes", "nc2", what, "equinorm")
        row(f"NC2, {what}: deviation of cosines", "{:.3f}", "classes", "nc2", what, "deviation")
        row(f"NC2, {what}: gap to a simplex", "{:.3f}", "classes", "nc2", what, "simplex_gap")
    row("NC3", "{:.3f}", "classes", "nc3")
    for relation in next(iter(runs.values()))["parallelograms"]["prototypes"]:
        rows[f"parallelogram loss, {relation}"] = partial(_loss, relation)
    tables = [_table(runs, rows)]
    if found["cka"]:
        tables.append(Table("linear CKA", "hidden states", "prototypes"))
        for pair in found["cka"]:
            told = (_number(pair[what], "{:.3f}", "other data") for what in ("hidden", "prototypes"))
            tables[-1].add_row(" and ".join(pair["runs"]), *told)
    for run, figures in runs.items():
        tables.append(Table(f"{run}: nearest to", f"by its own distance ({figures['distance']})", "by cosine"))
        for word, nearest in figures["nearest"].items():
            tables[-1].add_row(word, *(" ".join(repr(text) for text, _ in nearest[by]) for by in ("own", "cosine")))
    return tables


def _at(figures: Any, keys: Sequence[str]) -> Any:
    """A figure of nested ones; None if a part above it is None."""
    for key in keys:
        if figures is None:
            return None
        figures = figures[key]
    return figures


def _by_step(figures: dict[str, Any], name: str) -> str:
    return "  ".join(f"{step}: {_number(norms[name], '{:.3g}')}" for step, norms in figures["norms"].items())


def _loss(relation: str, figures: dict[str, Any]) -> str:
    found = figures["parallelograms"]["prototypes"][relation]
    pairs = f"{found['pairs']} of {found['pairs'] + found['left_out']} pairs"
    if found["loss"] is None:
        return f"- ({pairs})"
    return f"{found['loss']:.2f}, random {found['random']:.2f}, shuffled {found['shuffled']:.2f} ({pairs})"


def _write(run: Path, figures: dict[str, Any], cka: list[dict[str, Any]]) -> Path:
    """Writes a run's own figures and its comparisons to its folder, whole or not at all."""
    path = run / INTERPRETED
    draft = path.with_suffix(".draft")
    mine = [pair for pair in cka if str(run) in pair["runs"]]
    draft.write_text(json.dumps({**figures, "cka": mine}, indent=1, allow_nan=False) + "\n")
    os.replace(draft, path)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description="What runs came to, side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--interpret", action="store_true", help=f"measure geometry too, and write {INTERPRETED} to each run folder"
    )
    parser.add_argument(
        "--words", nargs="+", metavar="WORD", help="with --interpret: show the nearest prototypes of these"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables; writes no file")
    args = parser.parse_args(argv)
    try:
        if args.words and not args.interpret:
            raise ConfigError("--words: only with --interpret")
        found = {str(run): summarise(run) for run in args.runs}
        locked = [str(run) for run in args.runs if not os.access(run, os.W_OK)]
        if args.interpret and locked and not args.json:
            raise ConfigError(f"{locked[0]}: {INTERPRETED} cannot be written there; use --json, which writes no file")
        geometry = geometry_of(args.runs, args.words) if args.interpret else None
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if args.json:
        print(json.dumps(_plain({"runs": found, **({"geometry": geometry} if geometry else {})}), allow_nan=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table_of(found))
    if geometry:
        console.print(*geometry_tables(geometry), sep="\n")
        for run in args.runs:
            console.print(f"written: {_write(run, geometry['runs'][str(run)], geometry['cka'])}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
