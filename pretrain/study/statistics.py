"""The statistics of a study: differences over seeds and documents together, corrected for how many were compared.

A difference has two sources of chance that are crossed: every seed scores every document. y[s, d] is what a head's nats
of a document differ by from the baseline's of the same seed. Documents alone call a difference certain whose seeds lie
far apart, and seeds alone one that a few documents made; the variance here has both.

Legend: S seeds, D documents, m comparisons with the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95  # of intervals
NODES = 200  # of a quadrature over a distribution: more give the same six figures
POWER = 0.8  # with which the smallest difference is found that `smallest_difference` gives


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom, which are None where there is nothing to tell them by.

    `seeds_alone`: error and freedom of the seeds by themselves, where documents count too. Where seeds lie close by
    chance, the freedom of both together comes out too large, which strict levels do not bear; so whatever is told is
    told by the one of the two that says less.
    """

    mean: float
    standard_error: float | None = None
    freedom: float | None = None
    seeds_alone: tuple[float, float] | None = None

    def errors(self) -> list[tuple[float, float]]:
        """Standard errors with their degrees of freedom, of which the widest counts; empty without an error."""
        if self.standard_error is None or self.freedom is None:
            return []
        return [(self.standard_error, self.freedom), *([self.seeds_alone] if self.seeds_alone else [])]

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Student's interval; None without an error."""
        from scipy.stats import t

        halves = [float(t.ppf((1 + level) / 2, freedom)) * error for error, freedom in self.errors()]
        return (self.mean - max(halves), self.mean + max(halves)) if halves else None

    @property
    def p(self) -> float | None:
        """Two-sided, of the hypothesis that the true mean is 0; None without an error."""
        from scipy.stats import t

        def one(error: float, freedom: float) -> float:
            return float(2 * t.sf(abs(self.mean) / error, freedom)) if error else float(not self.mean)

        return max((one(*error) for error in self.errors()), default=None)

    def smallest(self, comparisons: int) -> float | None:
        """`smallest_difference` of this error; None without one."""
        return max((smallest_difference(*error, comparisons) for error in self.errors()), default=None)


@dataclass(frozen=True)
class Components:
    """Mean squares of a table of S seeds and D documents."""

    seeds: int
    documents: int
    free_documents: float  # degrees of freedom that the documents have
    of_seeds: float
    of_documents: float
    of_rest: float

    def variance(self) -> tuple[float, float]:
        """Of the table's mean, with its degrees of freedom (Satterthwaite, 1946).

        With effects of seeds and of documents and a rest, all random, the variance of the mean is
        (of_seeds + of_documents - of_rest) / (S D). Estimates of it may come out below what seeds or documents alone
        say; then the larger of those two is taken.
        """
        of_seeds, of_documents, of_rest = self.of_seeds, self.of_documents, self.of_rest
        free_seeds, free_documents = self.seeds - 1, self.free_documents
        both = of_seeds + of_documents - of_rest
        alone = [(of_seeds, float(free_seeds)), (of_documents, free_documents)]
        value, freedom = max(alone)
        if both > value:
            terms = ((of_seeds, free_seeds), (of_documents, free_documents), (of_rest, free_seeds * free_documents))
            value, freedom = both, both**2 / sum(square**2 / free for square, free in terms)
        return value / (self.seeds * self.documents), freedom


def components(table: np.ndarray, text_bytes: np.ndarray) -> Components:
    """The mean squares of a table (S, D), S and D at least 2, of documents of these bytes (D,).

    Long documents count for more in the mean, so that there are fewer degrees of freedom than D - 1: as many as in a
    sum of squares with these weights (Satterthwaite again), one less than (sum b^2)^2 / sum b^4.
    """
    squares = (text_bytes / text_bytes.mean()) ** 2
    seeds, documents = table.shape
    mean, by_seed, by_document = table.mean(), table.mean(1), table.mean(0)
    rest = table - by_seed[:, None] - by_document[None, :] + mean
    return Components(
        seeds,
        documents,
        max(1.0, float(squares.sum() ** 2 / (squares**2).sum()) - 1),
        float(documents * ((by_seed - mean) ** 2).sum() / (seeds - 1)),
        float(seeds * ((by_document - mean) ** 2).sum() / (documents - 1)),
        float((rest**2).sum() / ((seeds - 1) * (documents - 1))),
    )


def bits_per_byte(nats: np.ndarray, text_bytes: np.ndarray) -> np.ndarray:
    """A table (S, D) whose mean is the bits/byte of nats (S, D) over bytes (D,), and that varies as they do.

    Bits/byte is a ratio of two sums over documents. To first order its error is that of the mean of
    (bits - ratio * bytes) / mean bytes (Cochran, Sampling Techniques, section 2.11), to which the ratio is added.
    """
    bits = nats / math.log(2)
    ratio = bits.sum() / (len(bits) * text_bytes.sum())
    return ratio + (bits - ratio * text_bytes) / text_bytes.mean()


def over_seeds(values: Sequence[float]) -> Estimate:
    """Of independent values, one of each seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    return Estimate(mean, float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)


def crossed(nats: np.ndarray, text_bytes: np.ndarray) -> Estimate:
    """Bits/byte of nats (S, D), such as differences, over bytes (D,): over seeds and documents together. No error with
    fewer than two of either.
    """
    return _estimate(bits_per_byte(nats, text_bytes), text_bytes)


def _estimate(table: np.ndarray, text_bytes: np.ndarray) -> Estimate:
    if min(table.shape) < 2:
        return Estimate(float(table.mean()))
    found = components(table, text_bytes)
    variance, freedom = found.variance()
    alone = math.sqrt(found.of_seeds / table.size), float(found.seeds - 1)
    return Estimate(float(table.mean()), math.sqrt(variance), freedom, alone)


def over_documents(nats: np.ndarray, text_bytes: np.ndarray) -> Estimate:
    """The same with chance in the choice of documents alone, of the mean over these seeds."""
    values = bits_per_byte(nats, text_bytes).mean(0)
    return over_seeds(values.tolist())


@dataclass(frozen=True)
class Corrected:
    """What Holm's method says of one of several comparisons."""

    p: float | None
    level: float  # of the interval that excludes 0 exactly where p is below 1 - LEVEL


def holm(values: Sequence[float | None], level: float = LEVEL) -> list[Corrected]:
    """Step-down p-values (Holm, 1979) of m comparisons; one that has none counts, as the last.

    The k-th smallest of m is tested at (1 - level) / (m - k + 1) until one fails, and those after it are tested at that
    one's. `Corrected.level` is 1 less what a comparison is tested at, so that interval and p say the same.
    """
    count, alpha = len(values), 1 - level
    order = sorted(range(count), key=lambda place: math.inf if (p := values[place]) is None else p)
    found: list[Corrected | None] = [None] * count
    highest, stopped_at = 0.0, None
    for rank, place in enumerate(order):
        value, factor = values[place], count - rank
        if value is not None:
            highest = max(highest, min(1.0, factor * value))
        if stopped_at is None and (value is None or factor * value >= alpha):
            stopped_at = factor
        found[place] = Corrected(None if value is None else highest, 1 - alpha / (stopped_at or factor))
    return [one for one in found if one is not None]


def smallest_difference(
    standard_error: float, freedom: float, comparisons: int, power: float = POWER, level: float = LEVEL
) -> float:
    """The least true difference from 0 that a two-sided test finds with probability `power`, at Holm's first and
    strictest step, (1 - level) / comparisons: what an experiment with this error could have shown.
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2, norm, t

    bound = float(t.isf((1 - level) / comparisons / 2, freedom))
    # over the chance in the error itself, by quadrature: scipy's noncentral t has no tails for few degrees of freedom
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    limits = bound * np.sqrt(chi2.ppf((nodes + 1) / 2, freedom) / freedom)

    def missing(ratio: float) -> float:
        found = norm.sf(limits - ratio) + norm.cdf(-limits - ratio)
        return float(weights @ found) / 2 - power

    top = bound + 1.0
    while missing(top) < 0:
        top *= 2
    return standard_error * float(brentq(missing, 0.0, top, xtol=1e-9))


def in_deviations(seeds: int, comparisons: int) -> float | None:
    """The same before anything is trained, if documents add nothing: in standard deviations of a paired difference from
    seed to seed. None for a single seed.
    """
    return smallest_difference(seeds**-0.5, seeds - 1, comparisons) if seeds > 1 else None


def slope_weights(sizes: Sequence[float]) -> np.ndarray:
    """Weights (sizes,) whose sum with a figure of each size is its least-squares slope against log10 of the sizes."""
    at = np.log10(np.asarray(sizes, dtype=float))
    centred = at - at.mean()
    return centred / (centred**2).sum()


def trend(by_size: Sequence[np.ndarray], text_bytes: np.ndarray, sizes: Sequence[float]) -> Estimate:
    """The slope of bits/byte for each tenfold of the size, of nats (S, D) at each: of the same seeds and documents, so
    that the slope is taken for each of these, and its error is theirs. That a line fits is assumed, not shown.
    """
    weights = slope_weights(sizes)
    tables = np.stack([bits_per_byte(nats, text_bytes) for nats in by_size])
    return _estimate(np.tensordot(weights, tables, 1), text_bytes)


# ---- as results have it


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """`mean` of the `values` that are there, one of each seed, and Student's interval for it, `low` and `high`."""
    there = [value for value in values if value is not None]
    if not there:
        return {"mean": None, "low": None, "high": None, "values": []}
    found = over_seeds(there)
    low, high = found.interval() or (None, None)
    return {"mean": found.mean, "low": low, "high": high, "values": there}


def corrected(estimates: Sequence[Estimate | None]) -> list[dict[str, Any] | None]:
    """What is told of several differences that are judged together: `mean`, `low` and `high` at the level of Holm's
    correction, its `p`, and as `could_show` the least true difference that is found with POWER. None has no result, and
    counts as one of those that are judged.
    """
    told: list[dict[str, Any] | None] = []
    for one, judged in zip(estimates, holm([one.p if one else None for one in estimates]), strict=True):
        if one is None:
            told.append(None)
            continue
        low, high = one.interval(judged.level) or (None, None)
        could = one.smallest(len(estimates)) if one.standard_error else None
        told.append({"mean": one.mean, "low": low, "high": high, "p": judged.p, "could_show": could})
    return told
