"""What the runs of a study came to: measured run by run, then head by head, as plain values."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.files import replace_file
from common.strict_json import plain, to_json
from data.shards import Split, open_split
from model.config import ExponentRamp, HeadConfig
from model.distances import DISTANCES
from pretrain.analysis import geometry, interpretation
from pretrain.analysis.evaluation import scored_documents
from pretrain.analysis.heldout import HeldOut, check_one_text
from pretrain.analysis.scoring import (
    INTERVAL,
    UNIGRAM_TOKENS,
    Evaluation,
    compare,
    unigram_bits_per_byte,
)
from pretrain.analysis.summary import summarise
from pretrain.checkpoints.saver import versions
from pretrain.config import RunConfig
from pretrain.energy.sustainability import joules_of
from pretrain.recorder import machine
from pretrain.records import JOULES, PARTS, Eval, Record, Train
from pretrain.run_folder import RunFolder
from pretrain.study.grid import DONE, Cell, LanguageConfig, cells, chosen_lr, held_out, outcome

SHOWN = 300  # prototypes of a projection: those of the most frequent tokens


def measure(cfg: RunConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """Scores a finished run's newest checkpoint by document and measures its geometry; a second call reads the first
    one's files. Raises ConfigError.
    """
    run = RunFolder(cfg.run)
    checkpoint = run.checkpoint()
    if run.measured.exists():
        found = json.loads(run.measured.read_text())
        if found["checkpoint"] == checkpoint.name:
            return found
    log(f"measuring {run.path.name}")
    scored = scored_documents(cfg.run)
    source = interpretation.open_run(cfg.run, (), strict=False)
    looked_at = interpretation.measure(source)
    spectrum = geometry.spectrum(looked_at.prototypes)
    found = plain(
        {
            "checkpoint": checkpoint.name,
            "evaluation": {**scored.as_dict(), **scored.standard_errors()},
            "geometry": looked_at.figures,
            "scree": scree(spectrum),
            "projection": projection(looked_at.prototypes, spectrum, source),
        }
    )
    replace_file(run.measured, to_json(found))
    return found


def scree(spectrum: geometry.Spectrum) -> list[float]:
    """Shares of the variance in the first 1, 2, ... principal components."""
    variances = spectrum.variances
    return [round(share, 6) for share in (variances.cumsum(0) / variances.sum()).tolist()]


def projection(rows: torch.Tensor, spectrum: geometry.Spectrum, source: interpretation.Source) -> dict[str, Any]:
    """The first two principal components of the most frequent tokens' prototypes, and how often each token is among
    the first UNIGRAM_TOKENS of training.
    """
    train = open_split(source.cfg.data.path, "train")
    counts = np.bincount(train.read(0, min(train.tokens, UNIGRAM_TOKENS)), minlength=train.vocab_size)
    chosen = counts.argsort()[::-1][:SHOWN].tolist()
    plane = geometry.plane(rows)
    points = [
        [round(x, 5), round(y, 5), source.tokenizer.decode([token]), int(counts[token])]
        for token, (x, y) in zip(chosen, plane[chosen].tolist(), strict=True)
    ]
    return {"explained": [spectrum.explained(1), spectrum.explained(2) - spectrum.explained(1)], "points": points}


# ---- head by head


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent values, with Student's interval for it; no bounds for a single one."""
    from scipy.stats import t

    mean, bounds = statistics.fmean(values), {"low": None, "high": None}
    if len(values) > 1:
        half = t.ppf((1 + INTERVAL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        bounds = {"low": mean - half, "high": mean + half}
    return {"mean": mean, **bounds, "values": list(values)}


@dataclass(frozen=True)
class Ran:
    """A run of a study, and what it came to so far."""

    cell: Cell
    cfg: RunConfig
    outcome: str | None
    summary: dict[str, Any]  # {}: it is not done
    measured: dict[str, Any]  # {}: it is not done, or its learning rate was not chosen

    @property
    def bits(self) -> float:
        """Held-out bits/byte of a run that was measured."""
        return self.measured["evaluation"]["bits_per_byte"]

    def tokens_per_s(self) -> float | None:
        """In the median of its records but the first, in which kernels are compiled; None if it has no others."""
        rates = [record.tokens_per_s for record in RunFolder(self.cfg.run).records(Train)][1:]
        return statistics.median(rates) if rates else None


def gather(study: LanguageConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """The results of all runs that are done so far. Raises ConfigError."""
    configs = {cell: study.config(cell) for cell in cells(study)}
    ends = {cell: outcome(cfg) for cell, cfg in configs.items()}
    rates = {head: chosen_lr(study, head) for head in study.heads}
    done = [cell for cell, end in ends.items() if end == DONE]
    chosen = [cell for head, lr in rates.items() for cell in done if (cell.head, cell.lr) == (head, lr)]
    measured = {cell: measure(configs[cell], log) for cell in chosen}
    summaries = {cell: summarise(configs[cell].run) for cell in done}
    check_one_text({str(configs[cell].run): HeldOut(**summary["held_out"]) for cell, summary in summaries.items()})
    parts, missing = common_parts(list(summaries.values()))
    runs = [
        Ran(cell, cfg, ends[cell], summaries.get(cell, {}), measured.get(cell, {})) for cell, cfg in configs.items()
    ]
    base = {run.cell.seed: run for run in runs if run.cell.head == study.baseline and run.measured}
    any_config = runs[0].cfg
    train, val = (open_split(any_config.data.path, name) for name in ("train", "val"))
    return plain(
        {
            "name": study.out.name,
            "title": study.title,
            **about(any_config, train, val),
            "seeds": list(study.seeds),
            "lrs": list(study.lrs),
            "baseline": study.baseline,
            "measured": parts,
            "not_measured": missing,
            "heads": [
                _head(study, head, lr, [run for run in runs if run.cell.head == head], base, parts)
                for head, lr in rates.items()
            ],
            "runs": [_row(run, base.get(run.cell.seed), parts) for run in runs],
        }
    )


def _head(
    study: LanguageConfig, name: str, lr: float | None, runs: Sequence[Ran], base: dict[int, Ran], parts: Sequence[str]
) -> dict[str, Any]:
    """A head's results. `base`: the baseline's runs at its chosen rate, by seed."""
    settings, own = study.heads[name], [run for run in runs if run.measured]
    both = [(run.cfg, base[run.cell.seed].cfg) for run in own if run.cell.seed in base and name != study.baseline]
    return {
        "name": name,
        **settings.model_dump(mode="json", include={"distance", "params"}),
        "exponent": exponent(settings),
        "lr": lr,
        "lr_at_edge": len(study.lrs) > 1 and lr in (min(study.lrs), max(study.lrs)),
        "sweep": [
            {"lr": run.cell.lr, "seed": run.cell.seed, "bits_per_byte": held_out(run.cfg), "outcome": run.outcome}
            for run in runs
        ],
        "started": sum(run.outcome is not None for run in runs),
        "diverged": sum(run.outcome not in (None, DONE) for run in runs),
        "seeds": [run.cell.seed for run in own],
        "bits_per_byte": interval([run.bits for run in own]) if own else None,
        "difference": difference(both) if both else None,
        **_speed(own),
        **_spent([run.summary for run in own], parts),
        **_shape(own),
        **(_first(own[0], parts) if own else {}),
    }


def difference(pairs: Sequence[tuple[RunConfig, RunConfig]]) -> dict[str, Any]:
    """Bits/byte of runs less those of the baseline's with the same seed, data and order: over seeds, and over
    documents of all seeds' mean.
    """
    scored = [[scored_documents(cfg.run) for cfg in pair] for pair in pairs]
    over_seeds = interval([compare(a, b).bits_per_byte_difference for a, b in scored])
    mean = [
        Evaluation(np.mean([side.nats for side in sides], 0), sides[0].hits, sides[0].tokens, sides[0].text_bytes)
        for sides in zip(*scored, strict=True)
    ]
    by_document = compare(*mean)
    return {**over_seeds, "documents_low": by_document.low, "documents_high": by_document.high}


def exponent(head: HeadConfig) -> float | str | None:
    """As it was set; None where it means nothing, as for softmax."""
    if not DISTANCES[head.distance].has_exponent:
        return None
    ramp = head.exponent
    return f"{ramp.first:g} to {ramp.last:g}" if isinstance(ramp, ExponentRamp) else ramp


def common_parts(summaries: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The parts of the machines whose energy every run measured throughout, which alone can be compared, and why the
    others were not.
    """
    parts = [part for part in PARTS if summaries and all(part in summary["measured"] for summary in summaries)]
    reasons = {part: why for summary in reversed(summaries) for part, why in summary["not_measured"].items()}
    return parts, {part: why for part, why in reasons.items() if part not in parts}


def _speed(runs: Sequence[Ran]) -> dict[str, Any]:
    """Medians over seeds."""
    rates = [rate for run in runs if (rate := run.tokens_per_s()) is not None]
    rate = statistics.median(rates) if rates else None
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
                ("gradient_stability", ("log_norm_variance", "spikes", "judged")),
                ("learning_stability", ("spikes", "judged", "largest_rise")),
            )
        },
    }


def _shape(runs: Sequence[Ran]) -> dict[str, Any]:
    """How the prototypes lie: means over seeds of runs that were measured."""
    spectra = [run.measured["geometry"]["spectra"]["prototypes"] for run in runs]
    names = ("effective_rank", "participation_ratio", "first_2")
    return {
        "pca90": _mean([spectrum["dimensions_90"] for spectrum in spectra]),
        **{name: _mean([spectrum[name] for spectrum in spectra]) for name in names},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is, or there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _first(run: Ran, parts: Sequence[str]) -> dict[str, Any]:
    """What is shown of one seed alone."""
    records = RunFolder(run.cfg.run).records(Record)
    return {
        "shown_seed": run.cell.seed,
        "train_curve": curve(records, Train, parts),
        "eval_curve": curve(records, Eval, parts),
        "unigram_bits_per_byte": run.summary["unigram_bits_per_byte"],
        "scree": run.measured["scree"],
        "projection": run.measured["projection"],
        "norms": run.measured["geometry"]["norms"],
    }


def curve(records: Sequence[Record], kind: type[Train | Eval], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Losses of a kind's records against what training had taken by then: tokens, seconds, joules of the parts."""
    points, tokens, seconds = [], 0, 0.0
    so_far: dict[str, float] = {}
    counted = all(joules_of(records, part, "train") is not None for part in parts)
    for record in records:
        if isinstance(record, Train):
            tokens, seconds = record.tokens, seconds + record.seconds
            for part in parts:
                if (spent := record.joules(part)) is not None:
                    so_far[part] = so_far.get(part, 0.0) + spent
        if isinstance(record, kind):
            loss = record.loss_mean if isinstance(record, Train) else record.loss
            more = {} if isinstance(record, Train) else {"bits_per_byte": record.bits_per_byte}
            joules = sum(so_far.values()) if so_far and counted and len(so_far) == len(parts) else None
            point = {"step": record.step, "tokens": tokens, "seconds": round(seconds, 3), "joules": joules}
            points.append({**point, "loss": loss, **more})
    return points


def _row(run: Ran, base: Ran | None, parts: Sequence[str]) -> dict[str, Any]:
    """A run in a line, for CSV. `base`: the baseline's with the same seed, if there is one."""
    figures = run.summary
    gradient, learning = ((figures.get(f"{name}_stability") or {}) for name in ("gradient", "learning"))
    names = ("bits_per_byte", "perplexity", "loss", "train_seconds", "skipped")
    return {
        **vars(run.cell),
        "chosen": bool(run.measured),
        "outcome": run.outcome,
        **{name: figures.get(name) for name in names},
        "tokens_per_s": run.tokens_per_s() if figures else None,
        "j_per_token": _j_per_token(figures, parts) if figures else None,
        **_shape([run] if run.measured else []),
        **{f"gradient_{key}": gradient.get(key) for key in ("log_norm_variance", "spikes")},
        "loss_spikes": learning.get("spikes"),
        "less_baseline": run.bits - base.bits if base and run.measured and run.cell.head != base.cell.head else None,
    }


def about(cfg: RunConfig, train: Split, val: Split) -> dict[str, Any]:
    """What all runs of a study share."""
    model, made_by = cfg.model, versions()
    return {
        "machine": machine(),
        "versions": {name: version for name, version in made_by.items() if version and name != "revision"},
        "revision": made_by["revision"],
        "data": {
            "path": str(cfg.data.path),
            "fingerprint": train.fingerprint,
            "train_tokens": train.tokens,
            "val_tokens": val.tokens,
            "val_documents": val.documents,
            "val_bytes": val.text_bytes,
            "unigram_bits_per_byte": unigram_bits_per_byte(train, val),
        },
        "model": {
            **model.model_dump(include={"layers", "dim", "heads", "seq_len", "vocab_size"}),
            "parameters": model.parameters() + model.vocab_size * model.dim,
        },
        "budget": {
            "steps": cfg.train.steps,
            "tokens": cfg.train.steps * cfg.train.tokens_per_step,
            "tokens_per_step": cfg.train.tokens_per_step,
        },
    }
