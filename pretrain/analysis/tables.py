"""Runs side by side, as tables for a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from common.units import clock
from pretrain.analysis.heldout import HeldOut, told_of
from pretrain.analysis.summary import groups_of
from pretrain.energy.sustainability import SPIKE, WINDOW
from pretrain.records import JOULES, PARTS, PHASES

UNMEASURED = "not measured: no energy counter"


PER_TOKEN = (  # rows whose figures depend on how a text is cut into tokens
    "final training loss (nats/token)",
    "held-out perplexity",
    "training energy to the target loss",
    f"variance of the loss about its median of {WINDOW} steps (nats^2)",
    "largest rise of the held-out loss (nats)",
)


def tables_of(summaries: dict[str, dict[str, Any]]) -> Iterator[Table | str]:
    """A table for each held-out text, and why there are several."""
    groups, about = groups_of(summaries), {name: HeldOut(**summary["held_out"]) for name, summary in summaries.items()}
    if len(groups) > 1:
        yield (
            "These runs were scored on held-out texts that differ, or are not known to be the same, or by another "
            "objective: their held-out figures do not compare. A table for each:"
        )
    for group in groups:
        if len(groups) > 1:
            yield f"\n{told_of(group, about)}"
        of_group = {name: summaries[name] for name in group}
        yield table_of(of_group)
        if _many_tokenizers(of_group):
            yield (
                "Their tokenizers differ: bits/byte compare, figures per token do not. Left out: "
                + ", ".join(PER_TOKEN)
                + " (one RUN at a time, or --json, shows them)."
            )


def _many_tokenizers(summaries: dict[str, dict[str, Any]]) -> bool:
    scored = [summary["held_out"] for summary in summaries.values() if summary["held_out"]["scored"]]
    return len({text["tokenizer_sha256"] for text in scored}) > 1


def table_of(summaries: dict[str, dict[str, Any]]) -> Table:
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
        if part == "gpu" or any(part in summary["measured"] for summary in summaries.values()):
            for kind, phase in zip(PHASES, ("training", "evaluation", "saving"), strict=True):
                rows[f"{part.upper()} energy, {phase}"] = partial(_joules, part, kind)
    rows["J/token"] = lambda s: _number(s["j_per_token"], "{:.3e}", UNMEASURED)
    rows["J/step"] = lambda s: _number(s["j_per_step"], "{:.4g}", UNMEASURED)
    rows |= _footprint_rows(summaries) | _stability_rows() | _length_rows(summaries)
    left_out = PER_TOKEN if _many_tokenizers(summaries) else ()
    return _table(summaries, {name: cell for name, cell in rows.items() if name not in left_out})


def _joules(part: str, kind: str, summary: dict[str, Any]) -> str:
    missing = "-" if part in summary["measured"] else UNMEASURED
    return _number(summary[JOULES[part]][kind], "{:,.0f} J", missing)


def _footprint_rows(summaries: dict[str, dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Energy of the site, and what was asked for: emissions, cost, joules to a target."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "energy, all phases": lambda s: (
            f"{_number(s['footprint']['site_kwh'], '{:.4g} kWh', UNMEASURED)}"
            + (f" ({', '.join(s['measured'])}; PUE {s['footprint']['pue']:g})" if s["measured"] else "")
        )
    }
    if any(summary["footprint"]["grid_g_per_kwh"] is not None for summary in summaries.values()):
        rows["emissions, without embodied carbon"] = lambda s: (
            _number(s["footprint"]["gco2e"], "{:.4g} gCO2e", UNMEASURED)
            + _number(s["footprint"]["grid_g_per_kwh"], " (at {:g} g/kWh, ", "")
            + (f"{s['footprint']['grid_source']})" if s["footprint"]["grid_source"] else "")
        )
    if any(summary["footprint"]["price_per_kwh"] is not None for summary in summaries.values()):
        rows["cost of electricity"] = lambda s: (
            _number(s["footprint"]["cost"], "{:,.2f}", UNMEASURED)
            + _number(s["footprint"]["price_per_kwh"], " (at {:g}/kWh)", "")
        )
    if any(summary["target_loss"] is not None for summary in summaries.values()):
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
    def unrest(stability: dict[str, Any]) -> str:
        """Over how many steps, from which on."""
        told = f"({stability['judged']:,} steps, from step {stability['first']:,} on)"
        return f"{_number(stability['residual_variance'], '{:.3g}')} {told}"

    def spikes(stability: dict[str, Any]) -> str:
        return _number(stability["spikes"], f"{{}} of {stability['judged']:,} steps")

    return {
        f"variance of ln(gradient norm) about its median of {WINDOW} steps": lambda s: unrest(s["gradient_stability"]),
        f"gradient spikes (above {SPIKE:g} sigma)": lambda s: spikes(s["gradient_stability"]),
        f"variance of the loss about its median of {WINDOW} steps (nats^2)": lambda s: unrest(s["learning_stability"]),
        f"loss spikes (above {SPIKE:g} sigma)": lambda s: spikes(s["learning_stability"]),
        "largest rise of the held-out loss (nats)": lambda s: _number(
            s["learning_stability"]["largest_rise"], "{:.4f}"
        ),
    }


def _length_rows(summaries: dict[str, dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Whether prototypes and hidden states stop growing; nothing of runs without records of it."""

    def median(of: str, summary: dict[str, Any]) -> str:
        steps = summary["lengths"][of]["median"]
        return (
            " -> ".join(f"{steps[at]:.3g} (step {at})" for at in dict.fromkeys([*[*steps][:1], *[*steps][-1:]])) or "-"
        )

    def slope(of: str, summary: dict[str, Any]) -> str:
        return _number(summary["lengths"][of]["slope"], "{:+.3f}")

    rows: dict[str, Callable[[dict[str, Any]], str]] = {}
    for of, name in (("prototypes", "prototypes"), ("hidden", "final states")):
        if any(summary["lengths"][of]["median"] for summary in summaries.values()):
            rows[f"{name}: median length"] = partial(median, of)
            rows[f"{name}: d ln(length) / d ln(step), last half"] = partial(slope, of)
    return rows


def notes_of(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Why parts of runs were not measured, and which runs' records have lost some."""
    lost = [
        f"{run}: wrong lines of metrics.jsonl: {summary['lines_left_out']}; what they recorded is in no figure"
        for run, summary in summaries.items()
        if summary["lines_left_out"]
    ]
    lost += [
        f"{run}: no record is left of {', '.join(summary['steps_without_record'])}, which no figure has"
        for run, summary in summaries.items()
        if summary["steps_without_record"]
    ]
    return lost + [
        f"{run}: {part.upper()} energy was not measured: {why}"
        for run, summary in summaries.items()
        for part, why in summary["not_measured"].items()
    ]


def _table(found: dict[str, dict[str, Any]], rows: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    table = Table("", *found)
    for name, told in rows.items():
        table.add_row(name, *(told(one) for one in found.values()))
    return table


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)


POINTS = {  # what a table calls the points whose spectra are told
    "prototypes": "prototypes",
    "displacement": "less their start",
    "embedding": "embedding",
    "hidden": "hidden",
}
SPECTRAL = (  # a row's label, its form, and where a spectrum has it
    ("dimensions for 90% of the variance", "{:,}", "dimensions_90"),
    ("dimensions for 95%", "{:,}", "dimensions_95"),
    ("variance in the first 2", "{:.1%}", "first_2"),
    ("variance in the first 5", "{:.1%}", "first_5"),
    ("effective rank", "{:.1f}", "effective_rank"),
    ("participation ratio", "{:.1f}", "participation_ratio"),
    ("effective rank (2603.10225)", "{:.1f}", "arxiv_2603_10225", "effective_rank"),
    ("effective rank of 50 (2603.10225)", "{:.1f}", "arxiv_2603_10225", "effective_rank_50"),
    ("variance in the first 2 (2603.10225)", "{:.1%}", "arxiv_2603_10225", "first_2"),
)


def _beside_noise(form: str, what: str, keys: Sequence[str], figures: dict[str, Any]) -> str:
    """A figure of a spectrum, and what independent normal entries of that shape have."""
    value = _at(figures, ("spectra", what, *keys))
    if value is None:
        return "-"
    noise = _at(figures, ("noise", "hidden" if what == "hidden" else "prototypes", *keys))
    return f"{form.format(value)} (noise {_number(noise, form)})"


def geometry_tables(found: dict[str, Any]) -> list[Table]:
    """Figures by run, CKA by pair of runs, and each run's nearest prototypes."""
    runs = found["runs"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "checkpoint's step": lambda f: f"{f['step']:,}",
        "held-out tokens looked at": lambda f: f"{f['held_out_tokens']:,}",
    }

    def row(name: str, form: str, *keys: str) -> None:
        rows[name] = lambda figures: _number(_at(figures, keys), form)

    rows["start of the prototypes"] = lambda f: f["start"]["unknown"] or "known"
    row("... cosine with it", "{:.3f}", "start", "cosine")
    row("... share of the variance along it", "{:.1%}", "start", "share")
    row("... what is left of its length", "{:.3f}", "start", "kept")
    row("... median cosine over tokens", "{:.3f}", "start", "median_row_cosine")
    for what, name in POINTS.items():
        for label, form, *keys in SPECTRAL:
            rows[f"{name}: {label}"] = partial(_beside_noise, form, what, keys)
        if what in ("prototypes", "displacement"):
            at = ("first_component_with_count", what)
            row(f"{name}: first component with ln(1 + count)", "{:.2f}", *at, "every_token")
            row(f"{name}: the same, of tokens that occur", "{:.2f}", *at, "of_those_that_occur")
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
        rows[f"... of 2 components (2502.01628), {relation}"] = partial(_shuffled, relation, "arxiv_2502_01628", "loss")
        rows[f"... cosine of differences, {relation}"] = partial(_shuffled, relation, "function_vectors", "mean_cosine")
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


def _shuffled(relation: str, kind: str, name: str, figures: dict[str, Any]) -> str:
    """A figure of a relation, and the same with its second words shuffled."""
    found = figures["parallelograms"]["prototypes"][relation][kind]
    return "-" if found[name] is None else f"{found[name]:.2f}, shuffled {_number(found['shuffled'], '{:.2f}')}"


def _loss(relation: str, figures: dict[str, Any]) -> str:
    found = figures["parallelograms"]["prototypes"][relation]
    pairs = f"{found['pairs']} of {found['pairs'] + found['left_out']} pairs"
    if found["loss"] is None:
        return f"- ({pairs})"
    return f"{found['loss']:.2f}, random {found['random']:.2f}, shuffled {found['shuffled']:.2f} ({pairs})"
