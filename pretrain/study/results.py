"""What the runs of a study came to: measured run by run, then head by head, as plain values."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import replace_file
from common.strict_json import plain, to_json
from data.shards import Split, open_split
from model.config import ExponentRamp, HeadConfig
from model.distances import DISTANCES
from pretrain.analysis import geometry, interpretation
from pretrain.analysis.evaluation import open_task, run_task
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
from pretrain.runtime.ranks import alone
from pretrain.study.grid import DONE, Cell, LanguageConfig, cells, chosen_lr, held_out, outcome

SHOWN = 300  # prototypes of a projection: those of the most frequent tokens


def measure(cfg: RunConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """Scores a finished run's newest checkpoint by document and measures its geometry; a second call reads the first
    one's files. Raises ConfigError.
    """
    run = RunFolder(cfg.run)
    checkpoint = run.checkpoint()
    if run.measured.exists() and run.documents.exists():
        found = json.loads(run.measured.read_text())
        if found["checkpoint"] == checkpoint.name:
            return found
    log(f"measuring {run.path.name}")
    scored, _ = run_task(open_task(cfg.run), alone())
    with run.documents.open("wb") as stream:
        np.savez(stream, **vars(scored))
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
class Outcomes:
    """What the runs of a study came to so far."""

    configs: dict[Cell, RunConfig]  # of all runs
    summaries: dict[Cell, dict[str, Any]]  # of those that are done
    measured: dict[Cell, dict[str, Any]]  # of those whose learning rate was chosen
    parts: list[str]  # whose energy every run measured

    def bits(self, cell: Cell) -> float:
        return self.measured[cell]["evaluation"]["bits_per_byte"]


def gather(study: LanguageConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """The results of all runs that are done so far. Raises ConfigError."""
    runs = {cell: study.config(cell) for cell in cells(study)}
    rates = {head: chosen_lr(study, head) for head in study.heads}
    finished = {
        head: {cell.seed: cell for cell in runs if (cell.head, cell.lr) == (head, rates[head]) and _done(runs[cell])}
        for head in study.heads
    }
    kept = [cell for of_head in finished.values() for cell in of_head.values()]
    measured = {cell: measure(runs[cell], log) for cell in kept}
    summaries = {cell: summarise(cfg.run) for cell, cfg in runs.items() if _done(cfg)}
    check_one_text({str(runs[cell].run): HeldOut(**summary["held_out"]) for cell, summary in summaries.items()})
    parts, missing = common_parts(list(summaries.values()))
    outcomes = Outcomes(runs, summaries, measured, parts)
    base = finished[study.baseline]
    apart = {
        cell: outcomes.bits(cell) - outcomes.bits(base[cell.seed])
        for cell in kept
        if cell.head != study.baseline and cell.seed in base
    }
    any_config = next(iter(runs.values()))
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
            "heads": [_head(study, head, rates[head], finished[head], base, outcomes) for head in study.heads],
            "runs": [
                _row(cell, cfg, parts, summaries.get(cell), measured.get(cell)) | {"less_baseline": apart.get(cell)}
                for cell, cfg in runs.items()
            ],
        }
    )


def _head(
    study: LanguageConfig,
    name: str,
    lr: float | None,
    finished: dict[int, Cell],
    base: dict[int, Cell],
    outcomes: Outcomes,
) -> dict[str, Any]:
    """A head's results; `finished` and `base` are its runs and the baseline's at their chosen rates, by seed."""
    configs, summaries, measured = outcomes.configs, outcomes.summaries, outcomes.measured
    settings, own = study.heads[name], list(finished.values())
    both = [seed for seed in finished if seed in base] if name != study.baseline else []
    ends = {cell: outcome(cfg) for cell, cfg in configs.items() if cell.head == name}
    return {
        "name": name,
        **settings.model_dump(mode="json", include={"distance", "params"}),
        "exponent": exponent(settings),
        "lr": lr,
        "lr_at_edge": len(study.lrs) > 1 and lr in (min(study.lrs), max(study.lrs)),
        "sweep": [_swept(cell, configs[cell]) for cell in ends],
        "started": sum(end is not None for end in ends.values()),
        "diverged": sum(end not in (None, DONE) for end in ends.values()),
        "seeds": list(finished),
        "bits_per_byte": interval([outcomes.bits(cell) for cell in own]) if own else None,
        "difference": difference([(configs[finished[seed]], configs[base[seed]]) for seed in both]) if both else None,
        **_speed([configs[cell] for cell in own]),
        **_spent([summaries[cell] for cell in own], outcomes.parts),
        **_shape([measured[cell]["geometry"] for cell in own]),
        **(_first(own[0], configs[own[0]], summaries[own[0]], measured[own[0]], outcomes.parts) if own else {}),
    }


def _done(cfg: RunConfig) -> bool:
    return outcome(cfg) == DONE


def difference(pairs: Sequence[tuple[RunConfig, RunConfig]]) -> dict[str, Any]:
    """Bits/byte of runs less those of the baseline's with the same seed, data and order: over seeds, and over
    documents of all seeds' mean.
    """
    scored = [[_documents(cfg.run) for cfg in pair] for pair in pairs]
    over_seeds = interval([compare(a, b).bits_per_byte_difference for a, b in scored])
    mean = [
        Evaluation(np.mean([side.nats for side in sides], 0), sides[0].hits, sides[0].tokens, sides[0].text_bytes)
        for sides in zip(*scored, strict=True)
    ]
    by_document = compare(*mean)
    return {**over_seeds, "documents_low": by_document.low, "documents_high": by_document.high}


def _documents(run: Path) -> Evaluation:
    with np.load(RunFolder(run).documents, allow_pickle=False) as found:
        return Evaluation(**found)


def _swept(cell: Cell, cfg: RunConfig) -> dict[str, Any]:
    return {"lr": cell.lr, "seed": cell.seed, "bits_per_byte": held_out(cfg), "outcome": outcome(cfg)}


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


def _speed(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """Medians over seeds."""
    rates = [rate for cfg in configs if (rate := _rate(cfg.run)) is not None]
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


def _rate(run: Path) -> float | None:
    """Tokens per second in the median of a run's records but the first, in which kernels are compiled."""
    rates = [record.tokens_per_s for record in RunFolder(run).records(Train)][1:]
    return statistics.median(rates) if rates else None


def _shape(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = {
        "pca90": "dimensions_90",
        "effective_rank": "effective_rank",
        "participation_ratio": "participation_ratio",
        "first_2": "first_2",
    }
    return {
        ours: _mean([figure["spectra"]["prototypes"][theirs] for figure in figures]) for ours, theirs in names.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is, or there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _first(
    cell: Cell, cfg: RunConfig, summary: dict[str, Any], measured: dict[str, Any], parts: Sequence[str]
) -> dict[str, Any]:
    """What is shown of one seed alone."""
    records = RunFolder(cfg.run).records(Record)
    return {
        "shown_seed": cell.seed,
        "train_curve": curve(records, Train, parts),
        "eval_curve": curve(records, Eval, parts),
        "unigram_bits_per_byte": summary["unigram_bits_per_byte"],
        "scree": measured["scree"],
        "projection": measured["projection"],
        "norms": measured["geometry"]["norms"],
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


def _row(
    cell: Cell,
    cfg: RunConfig,
    parts: Sequence[str],
    summary: dict[str, Any] | None,
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    """A run in a line, for CSV. Its prototypes are measured if its learning rate was chosen."""
    figures = summary or {}
    gradient, learning = ((figures.get(f"{name}_stability") or {}) for name in ("gradient", "learning"))
    names = ("bits_per_byte", "perplexity", "loss", "train_seconds", "skipped")
    return {
        **vars(cell),
        "chosen": measured is not None,
        "outcome": outcome(cfg),
        **{name: figures.get(name) for name in names},
        "tokens_per_s": _rate(cfg.run) if summary else None,
        "j_per_token": _j_per_token(summary, parts) if summary else None,
        **_shape([measured["geometry"]] if measured else []),
        **{f"gradient_{key}": gradient.get(key) for key in ("log_norm_variance", "spikes")},
        "loss_spikes": learning.get("spikes"),
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
