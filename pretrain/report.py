"""`python -m pretrain.report RUN [RUN ...]`: what runs came to, side by side, from their metrics.jsonl, those that
were scored on one held-out text in one table.

With `--interpret`, also how their prototypes, embeddings and hidden states lie (docs/interpretability.md): measured on
the newest whole checkpoint and held-out text, and written to interpret.json in each run folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT
from common.plain import plain, to_json
from data.shards import open_split
from pretrain.analysis.heldout import HeldOut, comparable, held_out_of, told_of
from pretrain.analysis.scoring import unigram_bits_per_byte
from pretrain.config import RunConfig, load
from pretrain.energy.sustainability import (
    LOSS_SPIKE,
    NORM_SPIKE,
    PARTS,
    PHASES,
    footprint,
    gradient_stability,
    joules_of,
    learning_stability,
    measured_joules,
    measured_parts,
    missing_parts,
    to_target,
)
from pretrain.metrics import clock, read_records

UNMEASURED = "not measured: no energy counter"
INTERPRETED = "interpret.json"  # in the run folder
PER_TOKEN = (  # rows whose figures depend on how a text is cut into tokens
    "final training loss (nats/token)",
    "held-out perplexity",
    "training energy to the target loss",
    "largest rise of the held-out loss (nats)",
)


def summarise(run: Path, energy: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a run folder; None for what is not there. `energy` overrides the run's own settings of that
    section, as `key=value`. Raises ConfigError if it is no run folder.
    """
    if not (run / "config.yaml").exists() or not (run / "metrics.jsonl").exists():
        raise ConfigError(
            f"{run}: not a run folder (no config.yaml and metrics.jsonl in it); give one that was trained"
        )
    cfg = load(run / "config.yaml", [f"energy.{setting}" for setting in energy])
    records = read_records(run)
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    last = held_out[-1] if held_out else {}
    seconds = sum(record["seconds"] for record in train)
    tokens = train[-1]["tokens"] if train else 0
    joules = {f"{part}_j": {kind: joules_of(records, part, kind) for kind in PHASES} for part in PARTS}
    train_j = measured_joules(records, "train")
    settings = cfg.energy
    scored_on = held_out_of(run, cfg, last)
    of_this_text = [one["loss"] for one in held_out if one.get("text_sha256") == last.get("text_sha256")]
    return {
        "head": cfg.head.distance,
        "step": max((record["step"] for record in records), default=0),
        "steps": cfg.train.steps,
        "tokens": tokens,
        "loss": train[-1]["loss_mean"] if train else None,
        "perplexity": last.get("perplexity"),
        "bits_per_byte": last.get("bits_per_byte"),
        "held_out": vars(scored_on),
        "unigram_bits_per_byte": _unigram(cfg, scored_on.data_fingerprint),
        "train_seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else None,
        "gflops_per_token": cfg.model.flops_per_token() / 1e9,
        "mfu": _mfu(train),
        **joules,
        "gpu_j_per_token": _per(joules["gpu_j"]["train"], tokens),
        "measured": measured_parts(records),
        "not_measured": missing_parts(records),
        "j_per_token": _per(train_j, tokens),
        "j_per_step": _per(train_j, train[-1]["step"] if train else 0),
        "footprint": footprint(measured_joules(records), settings.pue, settings.grid, settings.price_per_kwh),
        "target_loss": settings.target_loss,
        "to_target": None if settings.target_loss is None else to_target(records, settings.target_loss),
        "skipped": sum(record["skipped"] for record in train),
        "gradient_stability": gradient_stability(_of_steps(train, "grad_norms"), cfg.optim.warmup_steps),
        "learning_stability": learning_stability(_of_steps(train, "losses"), of_this_text),
    }


def _per(joules: float | None, count: int) -> float | None:
    return joules / count if joules is not None and count else None


def _mfu(train: Sequence[dict[str, Any]]) -> float | None:
    """Mean over time; None if it is not known for every record."""
    if not train or any(record["mfu"] is None for record in train):
        return None
    return sum(record["mfu"] * record["seconds"] for record in train) / sum(record["seconds"] for record in train)


def _of_steps(train: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    """The values of every step; nothing if a record has only its last one."""
    return [value for record in train for value in record[name]] if all(name in record for record in train) else []


def _unigram(cfg: RunConfig, fingerprint: str | None) -> float | None:
    """Of the run's data, if they are where they were (and what they were, where that is known)."""
    try:
        train, val = (open_split(cfg.data.path, name) for name in ("train", "val"))
    except ConfigError:
        return None  # the data are elsewhere; the run's own figures stand
    return unigram_bits_per_byte(train, val) if fingerprint in (None, val.fingerprint) else None


def groups_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The runs in groups whose held-out figures compare."""
    return comparable({name: HeldOut(**summary["held_out"]) for name, summary in found.items()})


def tables_of(found: dict[str, dict[str, Any]]) -> Iterator[Table | str]:
    """A table for each held-out text, and why there are several."""
    groups, about = groups_of(found), {name: HeldOut(**summary["held_out"]) for name, summary in found.items()}
    if len(groups) > 1:
        yield (
            "These runs were scored on held-out texts that differ, or are not known to be the same, or by another "
            "objective: their held-out figures do not compare. A table for each:"
        )
    for group in groups:
        if len(groups) > 1:
            yield f"\n{told_of(group, about)}"
        of_group = {name: found[name] for name in group}
        yield table_of(of_group)
        if _many_tokenizers(of_group):
            yield (
                "Their tokenizers differ: bits/byte compare, figures per token do not. Left out: "
                + ", ".join(PER_TOKEN)
                + " (one RUN at a time, or --json, shows them)."
            )


def _many_tokenizers(found: dict[str, dict[str, Any]]) -> bool:
    scored = [one["held_out"] for one in found.values() if one["held_out"]["scored"]]
    return len({one["tokenizer_sha256"] for one in scored}) > 1


def table_of(found: dict[str, dict[str, Any]]) -> Table:
    """Runs by column; without what does not compare if they have several tokenizers."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "head": lambda s: s["head"],
        "steps": lambda s: f"{s['step']:,} of {s['steps']:,}",
        "tokens": lambda s: f"{s['tokens']:,}",
        "final training loss (nats/token)": lambda s: _number(s["loss"], "{:.4f}"),
        "held-out perplexity": lambda s: _number(s["perplexity"], "{:.2f}"),
        "held-out bits/byte": lambda s: _number(s["bits_per_byte"], "{:.4f}"),
        "unigram model's bits/byte": lambda s: _number(s["unigram_bits_per_byte"], "{:.4f}"),
        "training time": lambda s: clock(s["train_seconds"]),
        "tokens/s": lambda s: _number(s["tokens_per_s"], "{:,.0f}"),
        "GFLOPs/token, matrix products": lambda s: f"{s['gflops_per_token']:,.4g}",
        "MFU": lambda s: _number(s["mfu"], "{:.1%}"),
        "steps skipped (not finite)": lambda s: f"{s['skipped']}",
    }
    for part in PARTS:
        if part == "gpu" or any(part in summary["measured"] for summary in found.values()):
            for kind, told in zip(PHASES, ("training", "evaluation", "saving"), strict=True):
                rows[f"{part.upper()} energy, {told}"] = partial(_joules, part, kind)
    rows["J/token"] = lambda s: _number(s["j_per_token"], "{:.3e}", UNMEASURED)
    rows["J/step"] = lambda s: _number(s["j_per_step"], "{:.4g}", UNMEASURED)
    rows |= _footprint_rows(found) | _stability_rows()
    left_out = PER_TOKEN if _many_tokenizers(found) else ()
    return _table(found, {name: told for name, told in rows.items() if name not in left_out})


def _joules(part: str, kind: str, summary: dict[str, Any]) -> str:
    missing = "-" if part in summary["measured"] else UNMEASURED
    return _number(summary[f"{part}_j"][kind], "{:,.0f} J", missing)


def _footprint_rows(found: dict[str, dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Energy of the site, and what was asked for: emissions, cost, joules to a target."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "energy, all phases": lambda s: (
            f"{_number(s['footprint']['site_kwh'], '{:.4g} kWh', UNMEASURED)}"
            + (f" ({', '.join(s['measured'])}; PUE {s['footprint']['pue']:g})" if s["measured"] else "")
        )
    }
    if any(summary["footprint"]["grid_g_per_kwh"] is not None for summary in found.values()):
        rows["emissions, without embodied carbon"] = lambda s: (
            _number(s["footprint"]["gco2e"], "{:.4g} gCO2e", UNMEASURED)
            + _number(s["footprint"]["grid_g_per_kwh"], " (at {:g} g/kWh, ", "")
            + (f"{s['footprint']['grid_source']})" if s["footprint"]["grid_source"] else "")
        )
    if any(summary["footprint"]["price_per_kwh"] is not None for summary in found.values()):
        rows["cost of electricity"] = lambda s: (
            _number(s["footprint"]["cost"], "{:,.2f}", UNMEASURED)
            + _number(s["footprint"]["price_per_kwh"], " (at {:g}/kWh)", "")
        )
    if any(summary["target_loss"] is not None for summary in found.values()):
        rows["training energy to the target loss"] = _target
    return rows


def _target(summary: dict[str, Any]) -> str:
    target, reached = summary["target_loss"], summary["to_target"]
    if target is None:
        return "-"
    if reached is None:
        return f"{target:g} nats: not reached"
    joules = _number(reached["joules"], "{:,.0f} J", UNMEASURED)
    return f"{joules} ({reached['loss']:.4f} <= {target:g} nats at step {reached['step']:,})"


def _stability_rows() -> dict[str, Callable[[dict[str, Any]], str]]:
    def spikes(stability: dict[str, Any]) -> str:
        return _number(stability["spikes"], f"{{}} of {stability['judged']:,} steps")

    return {
        "variance of ln(gradient norm)": lambda s: _number(s["gradient_stability"]["log_norm_variance"], "{:.3g}"),
        f"gradient spikes (above {NORM_SPIKE:g} medians)": lambda s: spikes(s["gradient_stability"]),
        f"loss spikes (above {LOSS_SPIKE:g} sigma)": lambda s: spikes(s["learning_stability"]),
        "largest rise of the held-out loss (nats)": lambda s: _number(
            s["learning_stability"]["largest_rise"], "{:.4f}"
        ),
    }


def notes_of(found: dict[str, dict[str, Any]]) -> list[str]:
    """Why parts of runs were not measured."""
    return [
        f"{run}: {part.upper()} energy was not measured: {why}"
        for run, summary in found.items()
        for part, why in summary["not_measured"].items()
    ]


def _table(found: dict[str, dict[str, Any]], rows: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    table = Table("", *found)
    for name, told in rows.items():
        table.add_row(name, *(told(one) for one in found.values()))
    return table


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)


def geometry_of(runs: Sequence[Path], words: Sequence[str] | None) -> dict[str, Any]:
    """The measures of pretrain/analysis/interpretation.py: `runs`, by folder, and `cka`, of every two of them.

    Raises ConfigError.
    """
    from pretrain.analysis import interpretation
    from pretrain.analysis.words import NEAREST

    sources = {str(run): interpretation.open_run(run, words or NEAREST, strict=words is not None) for run in runs}
    measured = {name: interpretation.measure(source) for name, source in sources.items()}
    figures = {name: one.figures for name, one in measured.items()}
    return plain({"runs": figures, "cka": interpretation.compare(measured)})


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
    draft.write_text(to_json({**figures, "cka": mine}, indent=1) + "\n")
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
    parser.add_argument(
        "--energy",
        nargs="+",
        default=[],
        metavar="key=value",
        help="instead of the runs' own settings: grid, price_per_kwh, pue, target_loss",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables; writes no file")
    args = parser.parse_args(argv)
    try:
        if args.words and not args.interpret:
            raise ConfigError("--words: only with --interpret")
        found = {str(run): summarise(run, args.energy) for run in args.runs}
        locked = [str(run) for run in args.runs if not os.access(run, os.W_OK)]
        if args.interpret and locked and not args.json:
            raise ConfigError(f"{locked[0]}: {INTERPRETED} cannot be written there; use --json, which writes no file")
        geometry = geometry_of(args.runs, args.words) if args.interpret else None
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if args.json:
        compare = {"comparable": groups_of(found)} if len(found) > 1 else {}
        print(to_json({"runs": found, **compare, **({"geometry": geometry} if geometry else {})}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in tables_of(found):
        console.print(part, soft_wrap=isinstance(part, str))
    for note in notes_of(found):
        console.print(note, soft_wrap=True)
    if geometry:
        for group in groups_of(found):
            of_group = {name: geometry["runs"][name] for name in group}
            pairs = [pair for pair in geometry["cka"] if set(pair["runs"]) <= set(group)]
            console.print(*geometry_tables({"runs": of_group, "cka": pairs}), sep="\n")
        for run in args.runs:
            console.print(f"written: {_write(run, geometry['runs'][str(run)], geometry['cka'])}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
