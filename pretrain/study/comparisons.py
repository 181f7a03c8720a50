"""Heads against the baseline, on the test split: with `statistics.py`, of what the runs of fresh seeds left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pretrain.study.language_config import Cell, LanguageConfig
from pretrain.study.records import DONE, Kept, Records
from pretrain.study.statistics import (
    Corrected,
    Estimate,
    crossed,
    holm,
    over_documents,
    over_seeds,
    trend,
)

FEW_SIZES = 3  # fewer have no trend


@dataclass(frozen=True)
class Ran:
    """A run of a study, and what it came to so far."""

    cell: Cell
    records: Records
    record: Kept | None

    @property
    def outcome(self) -> str | None:
        """None: it has not ended."""
        return self.record["outcome"] if self.record else None

    @property
    def summary(self) -> dict[str, Any]:
        """{}: it is not done."""
        return self.record["summary"] if self.record and self.outcome == DONE else {}

    @property
    def measured(self) -> dict[str, Any]:
        """{}: it is not done, or a trial."""
        return self.record["measured"] if self.record else {}

    @property
    def bits(self) -> float:
        """Bits/byte of the test split, of a run that was measured."""
        found: float = self.measured["evaluation"]["bits_per_byte"]
        return found

    @cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Nats and bytes (documents,) of the test split, of a run that was measured."""
        return self.records.documents(self.cell)

    def tokens_per_s(self) -> float | None:
        """None where it was not measured, or other runs ran beside it."""
        return self.record["tokens_per_s"] if self.record else None


ByHead = Mapping[str, Sequence[Ran]]


def at_size(study: LanguageConfig, runs: ByHead) -> dict[str, dict[str, Any]]:
    """Of the runs of fresh seeds at one size: each head's bits/byte and its difference to the baseline, corrected for
    all heads of the study at this size, those without a result too.
    """
    base = _by_seed(runs[study.baseline])
    others = [head for head in study.heads if head != study.baseline]
    pairs = {head: _pairs(_by_seed(runs[head]), base) for head in others}
    found = {head: crossed(*_differences(both)) if both else None for head, both in pairs.items()}
    corrected = dict(zip(others, holm([None if one is None else one.p for one in found.values()]), strict=True))
    means = {head: [run for run in runs[head] if run.measured] for head in study.heads}
    return {
        head: {
            "seeds": [run.cell.seed for run in means[head]],
            "bits_per_byte": _mean(means[head]) if means[head] else None,
            "difference": _difference(pairs[head], one, corrected[head], len(others))
            if (one := found.get(head)) is not None
            else None,
        }
        for head in study.heads
    }


def _by_seed(runs: Sequence[Ran]) -> dict[int, Ran]:
    return {run.cell.seed: run for run in runs if run.measured}


def _pairs(one: Mapping[int, Ran], other: Mapping[int, Ran]) -> list[tuple[Ran, Ran]]:
    """Runs of the same seed, which have the same data in the same order."""
    return [(one[seed], other[seed]) for seed in one if seed in other]


def _differences(pairs: Sequence[tuple[Ran, Ran]]) -> tuple[np.ndarray, np.ndarray]:
    """Nats (seeds, documents) of the first of each pair less those of the second, and the documents' bytes."""
    return np.stack([one.documents[0] - other.documents[0] for one, other in pairs]), pairs[0][0].documents[1]


def _mean(runs: Sequence[Ran]) -> dict[str, Any]:
    nats = np.stack([run.documents[0] for run in runs])
    values = [run.bits for run in runs]
    return {**_bounds(crossed(nats, runs[0].documents[1])), "values": values}


def _bounds(estimate: Estimate, prefix: str = "", level: float | None = None) -> dict[str, Any]:
    low, high = (estimate.interval() if level is None else estimate.interval(level)) or (None, None)
    return {**({} if prefix else {"mean": estimate.mean}), f"{prefix}low": low, f"{prefix}high": high}


def _told(estimate: Estimate, corrected: Corrected) -> dict[str, Any]:
    """Mean, interval and p, as they are and as they are corrected."""
    return {
        **_bounds(estimate),
        "p": estimate.p,
        **_bounds(estimate, "corrected_", corrected.level),
        "corrected_p": corrected.p,
    }


def _difference(
    pairs: Sequence[tuple[Ran, Ran]], estimate: Estimate, corrected: Corrected, count: int
) -> dict[str, Any]:
    nats, text_bytes = _differences(pairs)
    values = (nats.sum(1) / math.log(2) / text_bytes.sum()).tolist()
    error, freedom = estimate.standard_error, estimate.freedom
    return {
        **_told(estimate, corrected),
        **_bounds(over_seeds(values), "seeds_"),
        **_bounds(over_documents(nats, text_bytes), "documents_"),
        "standard_error": error,
        "degrees_of_freedom": freedom,
        "smallest": estimate.smallest(count),
        "values": values,
    }


def median_smallest(compared: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The median over heads of the smallest difference that the budget could have shown."""
    found = [one["difference"]["smallest"] for one in compared.values() if one["difference"]]
    known = [value for value in found if value is not None]
    return statistics.median(known) if known else None


def best(study: LanguageConfig, runs: ByHead) -> str | None:
    """The head with the lowest mean, of those with a result for every seed; None while a run has not ended."""
    if not all(run.outcome for head in study.heads for run in runs[head]):
        return None
    whole = {head: [run.bits for run in runs[head]] for head in study.heads if all(run.measured for run in runs[head])}
    means = {head: statistics.fmean(bits) for head, bits in whole.items() if bits}
    return min(means, key=means.__getitem__) if means else None


def trends(study: LanguageConfig, at: Mapping[str, ByHead]) -> dict[str, dict[str, Any] | None]:
    """Each head's trend, corrected for all heads of the study as differences are."""
    estimates = {head: _trend(study, at, head) for head in study.heads}
    others = [head for head in study.heads if head != study.baseline]
    corrected = dict(zip(others, holm([found[0].p if (found := estimates[h]) else None for h in others]), strict=True))
    told: dict[str, dict[str, Any] | None] = dict.fromkeys(study.heads)
    for head, found in estimates.items():
        if found:
            estimate, seeds = found
            told[head] = {
                **_told(estimate, corrected[head]),
                "parameters": [parameters_at(study, size) for size in at],
                "seeds": seeds,
            }
    return told


def _trend(study: LanguageConfig, at: Mapping[str, ByHead], head: str) -> tuple[Estimate, list[int]] | None:
    """The slope of a head's difference to the baseline for each tenfold of the parameters, of the seeds that both have
    at every size; None with fewer than FEW_SIZES sizes, or without such a seed.
    """
    if head == study.baseline or len(study.sizes) < FEW_SIZES:
        return None
    pairs = {
        size: {
            one.cell.seed: (one, other) for one, other in _pairs(*(_by_seed(runs[h]) for h in (head, study.baseline)))
        }
        for size, runs in at.items()
    }
    seeds = [seed for seed in study.seeds if all(seed in both for both in pairs.values())]
    if not seeds:
        return None
    tables = [_differences([both[seed] for seed in seeds]) for both in pairs.values()]
    parameters = [parameters_at(study, size) for size in at]
    return trend([nats for nats, _ in tables], tables[0][1], parameters), seeds


def parameters_at(study: LanguageConfig, size: str) -> int:
    """Of decoder and prototypes of the baseline at a size."""
    model = study.config(Cell(study.baseline, size, study.seeds[0], study.settings(study.baseline)[0])).model
    return model.parameters() + model.vocab_size * model.dim
