"""What the runs of a study came to, head by head and size by size, as plain values."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common.strict_json import plain
from model.config import ExponentRamp, HeadConfig
from pretrain.analysis.heldout import HeldOut, check_one_text
from pretrain.recorder import machine
from pretrain.records import JOULES, PARTS
from pretrain.study import comparisons, protocol
from pretrain.study.comparisons import Ran
from pretrain.study.language_config import Cell, LanguageConfig
from pretrain.study.records import DONE, Records, bits
from pretrain.study.search import Choice, choose, fresh, tried
from pretrain.study.tuning import TUNABLE


def gather(study: LanguageConfig, records: Records, choice: Choice | None) -> dict[str, Any]:
    """The results of all runs that were recorded so far. Raises ConfigError."""
    trials = [Ran(cell, records, records.get(cell)) for head in study.heads for cell in tried(study, records, head)]
    ran = [Ran(cell, records, records.get(cell)) for cell in (fresh(study, choice) if choice else ())]
    done = [run for run in [*trials, *ran] if run.summary]
    check_one_text({run.cell.name: HeldOut(**run.summary["held_out"]) for run in done})
    parts, missing = common_parts([run.summary for run in ran if run.summary])
    at: dict[str, comparisons.ByHead] = {
        size: {head: [run for run in ran if (run.cell.size, run.cell.head) == (size, head)] for head in study.heads}
        for size in study.sizes
    }
    compared = {size: comparisons.at_size(study, runs) for size, runs in at.items()}
    shown = next(
        (size for size in reversed(study.sizes) if any(run.measured for run in at[size][study.baseline])),
        study.tuned_at,
    )
    val = {head: _val(runs) for head, runs in at[study.tuned_at].items()}
    edges = protocol.edges_of(study, choice, trials, val)
    tuned = study.tuning.trials > 1
    settled = choice is not None and tuned and not any(edge["open"] for edge in edges)
    trends = comparisons.trends(study, at)
    base = {(run.cell.size, run.cell.seed): run for run in ran if run.cell.head == study.baseline}
    return plain(
        {
            "name": study.out.name,
            "title": study.title,
            **_made_by([*ran, *trials]),
            "data": records.data(),
            **about(study, shown),
            "shown": shown,
            "baseline": study.baseline,
            "seeds": list(study.seeds),
            "protocol": protocol.told(study, records.data(), choice),
            "chosen": choice is not None,
            "settled": settled,
            "edges": edges,
            "best": comparisons.best(study, at[shown]) if settled else None,
            "measured": parts,
            "not_measured": missing,
            "sizes": [_size(study, size, at[size], compared[size], parts) for size in study.sizes],
            "heads": [
                {
                    **_searched(study, records, head, trials, choice, val[head]),
                    "trend": trends[head],
                    **_figures(at[shown][head], compared[shown][head], parts),
                    **_first(at[shown][head], parts),
                }
                for head in study.heads
            ],
            "runs": [_row(run, base, parts) for run in [*trials, *ran]],
        }
    )


def _made_by(runs: Sequence[Ran]) -> dict[str, Any]:
    """Machines and versions of the runs; of the first what only one can be told of."""
    records = [run.record for run in runs if run.record]
    versions = records[0]["versions"] if records else {}
    return {
        "machine": "; ".join(dict.fromkeys(record["machine"] for record in records)) or machine(),
        "versions": {name: version for name, version in versions.items() if version and name != "revision"},
        "revision": versions.get("revision"),
    }


def _size(
    study: LanguageConfig,
    size: str,
    runs: comparisons.ByHead,
    compared: Mapping[str, Mapping[str, Any]],
    parts: Sequence[str],
) -> dict[str, Any]:
    """What came of one size."""
    return {
        "name": size,
        **about(study, size),
        "smallest_difference": comparisons.median_smallest(compared),
        "heads": [{"name": head, **_figures(runs[head], compared[head], parts)} for head in study.heads],
    }


def _searched(
    study: LanguageConfig,
    records: Records,
    head: str,
    trials: Sequence[Ran],
    choice: Choice | None,
    val: Sequence[float],
) -> dict[str, Any]:
    """A head, and how its setting was found. `val`: bits/byte of the `val` split of its fresh runs where it was."""
    spent = (choice or choose(study, records))["heads"][head]
    own = [run for run in trials if run.cell.head == head]
    return {
        **_head(study, head),
        **protocol.searched(study, head, spent, own, choice),
        **protocol.curse(spent, val),
    }


def _val(runs: Sequence[Ran]) -> list[float]:
    """Bits/byte of the `val` split of the runs that are done."""
    return [value for run in runs if (value := bits(run.record)) is not None]


def _head(study: LanguageConfig, name: str) -> dict[str, Any]:
    settings = study.heads[name]
    return {
        "name": name,
        **settings.model_dump(mode="json", include={"distance", "params"}),
        "exponent": exponent(settings),
    }


def _figures(runs: Sequence[Ran], compared: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Of a head's runs of fresh seeds at one size."""
    own = [run for run in runs if run.measured]
    val = _val(runs)
    return {
        "started": sum(run.outcome is not None for run in runs),
        "diverged": sum(run.outcome not in (None, DONE) for run in runs),
        "waiting": sum(run.outcome is None for run in runs),
        **compared,
        "val_bits_per_byte": statistics.fmean(val) if val else None,
        **_speed(own),
        **_spent([run.summary for run in own], parts),
        **_shape(own),
    }


def exponent(head: HeadConfig) -> float | str | None:
    """As it was set; None where it means nothing, as for softmax."""
    if not head.settings.has_exponent:
        return None
    given = head.exponent
    if given is None:
        return "the distance's own"
    return f"{given.first:g} to {given.last:g}" if isinstance(given, ExponentRamp) else given


def common_parts(summaries: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The parts of the machines whose energy every run measured throughout, which alone can be compared, and why the
    others were not.
    """
    parts = [part for part in PARTS if summaries and all(part in summary["measured"] for summary in summaries)]
    reasons = {part: why for summary in reversed(summaries) for part, why in summary["not_measured"].items()}
    return parts, {part: why for part, why in reasons.items() if part not in parts}


def _speed(runs: Sequence[Ran]) -> dict[str, Any]:
    """Medians over seeds; None if one of them was not timed, or had others beside it."""
    rates = [run.tokens_per_s() for run in runs]
    known = [rate for rate in rates if rate is not None]
    rate = statistics.median(known) if known and len(known) == len(rates) else None
    return {"tokens_per_s": rate, "seconds_per_token": 1 / rate if rate else None}


def _j_per_token(summary: dict[str, Any], parts: Sequence[str]) -> float | None:
    """Of training."""
    joules = [summary[JOULES[part]]["train"] for part in parts]
    return sum(joules) / summary["tokens"] if joules and None not in joules and summary["tokens"] else None


def _spent(summaries: Sequence[dict[str, Any]], parts: Sequence[str]) -> dict[str, Any]:
    """Means over seeds."""
    return {
        "j_per_token": _mean([_j_per_token(summary, parts) for summary in summaries]),
        **{
            name: {key: _mean([summary[name][key] for summary in summaries]) for key in keys}
            for name, keys in (
                ("gradient_stability", ("residual_variance", "spikes", "judged", "first", "window")),
                ("learning_stability", ("residual_variance", "spikes", "judged", "first", "window", "largest_rise")),
            )
        },
    }


def _shape(runs: Sequence[Ran]) -> dict[str, Any]:
    """How prototypes, what was learnt of them, and final states lie: means over seeds of runs that were measured."""
    found = [run.measured["geometry"] for run in runs]

    def mean(*keys: str) -> float | None:
        return _mean([functools.reduce(lambda at, key: at and at[key], keys, one) for one in found])

    return {
        "pca90": mean("spectra", "prototypes", "dimensions_90"),
        **{name: mean("spectra", "prototypes", name) for name in ("effective_rank", "participation_ratio", "first_2")},
        **{
            f"{of}_{name}": mean("spectra", of, key)
            for of in ("displacement", "hidden")
            for name, key in (("pca90", "dimensions_90"), ("effective_rank", "effective_rank"), ("first_2", "first_2"))
        },
        "effective_rank_2603_10225": mean("spectra", "hidden", "arxiv_2603_10225", "effective_rank"),
        "start_share": mean("start", "share"),
        "count_correlation": mean("first_component_with_count", "displacement", "every_token"),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is, or there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _first(runs: Sequence[Ran], parts: Sequence[str]) -> dict[str, Any]:
    """What is shown of one seed alone: the first, if it is done."""
    run = next((run for run in runs if run.measured and run.measured["projection"]), None)
    if run is None or run.record is None:
        return {}
    return {
        "shown_seed": run.cell.seed,
        **{f"{name}_curve": with_joules(run.record["curves"][name], parts) for name in ("train", "eval")},
        "unigram_bits_per_byte": run.summary["unigram_bits_per_byte"],
        "scree": run.measured["scree"],
        "projection": run.measured["projection"],
        "norms": run.measured["geometry"]["norms"],
    }


def with_joules(curve: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """A recorded curve with the joules of the parts that are compared in one sum; None without parts."""
    return [{**point, "joules": sum(point["joules"][part] for part in parts) if parts else None} for point in curve]


def _row(run: Ran, base: Mapping[tuple[str, int], Ran], parts: Sequence[str]) -> dict[str, Any]:
    """A run in a line, for CSV. `base`: the baseline's of fresh seeds, by size and seed."""
    cell, figures = run.cell, run.summary
    gradient, learning = ((figures.get(f"{name}_stability") or {}) for name in ("gradient", "learning"))
    paired = base.get((cell.size, cell.seed))
    less = (
        run.bits - paired.bits
        if run.measured and paired and paired.measured and cell.head != paired.cell.head
        else None
    )
    return {
        **{"head": cell.head, "size": cell.size, "seed": cell.seed, "trial": cell.trial},
        "rung": None if cell.trial is None else cell.rung,
        **{name: cell.setting.get(name) for name in TUNABLE},
        "outcome": run.outcome,
        "val_bits_per_byte": figures.get("bits_per_byte"),
        "test_bits_per_byte": run.bits if run.measured else None,
        "less_baseline": less,
        **{name: figures.get(name) for name in ("steps", "tokens", "loss", "train_seconds", "skipped")},
        "tokens_per_s": run.tokens_per_s() if figures else None,
        "j_per_token": _j_per_token(figures, parts) if figures else None,
        **_shape([run] if run.measured else []),
        **{f"gradient_{key}": gradient.get(key) for key in ("residual_variance", "spikes")},
        "loss_spikes": learning.get("spikes"),
    }


def about(study: LanguageConfig, size: str) -> dict[str, Any]:
    """What all runs of fresh seeds at a size share."""
    cfg = study.config(Cell(study.baseline, size, study.seeds[0], study.settings(study.baseline)[0]))
    model = cfg.model
    return {
        "model": {
            **model.model_dump(include={"layers", "dim", "heads", "seq_len", "vocab_size"}),
            "parameters": comparisons.parameters_at(study, size),
        },
        "budget": {
            "steps": cfg.train.steps,
            "tokens": cfg.train.steps * cfg.train.tokens_per_step,
            "tokens_per_step": cfg.train.tokens_per_step,
        },
    }
