"""The statistics of a study against hand-worked examples, scipy, and simulations whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pretrain.study.statistics import (
    Estimate,
    bits_per_byte,
    components,
    crossed,
    holm,
    in_deviations,
    over_documents,
    over_seeds,
    slope_weights,
    smallest_difference,
    trend,
)

LN2 = math.log(2)


def drawn(
    random: np.random.Generator,
    *,
    seeds: int,
    documents: int,
    truth: float = 0.0,
    by_seed: float = 0.0,
    by_document: float = 0.0,
    rest: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats (S, D) and bytes (D,) of unlike documents; the deviations are in bits/byte."""
    text_bytes = np.exp(random.normal(7, 0.7, documents))
    effect = (
        truth
        + by_seed * random.normal(size=(seeds, 1))
        + by_document * random.normal(size=documents)
        + rest * random.normal(size=(seeds, documents))
    )
    return effect * text_bytes * LN2, text_bytes


def coverage(times: int, **settings: float) -> float:
    random = np.random.default_rng(5)
    inside = 0
    for _ in range(times):
        bounds = crossed(*drawn(random, truth=-0.1, **settings)).interval()
        assert bounds is not None
        inside += bounds[0] <= -0.1 <= bounds[1]
    return inside / times


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"seeds": 5, "documents": 60, "by_seed": 0.02}, 0.96),
        ({"seeds": 5, "documents": 60, "by_seed": 0.02, "by_document": 0.05, "rest": 0.05}, 0.985),
        ({"seeds": 5, "documents": 60, "by_document": 0.1, "rest": 0.05}, 0.985),
        ({"seeds": 3, "documents": 53, "by_seed": 0.02, "rest": 0.1}, 0.99),
        ({"seeds": 8, "documents": 300, "rest": 0.1}, 1.0),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(settings: dict[str, float], most: float) -> None:
    times = 1500
    error = math.sqrt(0.95 * 0.05 / times)
    assert 0.95 - 3 * error <= coverage(times, **settings) <= most + 3 * error


def test_neither_seeds_nor_documents_alone_make_a_difference_certain() -> None:
    """Of 3,000 documents and seeds that lie 0.2 apart, documents alone say that it is certain; and one seed's opposite:
    seeds that agree on few documents that do not.
    """
    random = np.random.default_rng(3)
    text_bytes = np.exp(random.normal(7, 0.5, 3000))
    apart = np.array([-0.25, -0.05, 0.02])[:, None] + 0.1 * random.normal(size=(3, 3000))
    nats = apart * text_bytes * LN2
    alone, both = over_documents(nats, text_bytes), crossed(nats, text_bytes)
    assert alone.p is not None and alone.p < 1e-6
    assert both.p is not None and both.p > 0.3
    few = np.exp(random.normal(7, 0.5, 6))
    nats = (random.normal(-0.02, 0.2, 6) + 0.0005 * random.normal(size=(5, 6))) * few * LN2
    by_seed = over_seeds([float(one.sum() / LN2 / few.sum()) for one in nats])
    both = crossed(nats, few)
    assert by_seed.p is not None and by_seed.p < 1e-4
    assert both.p is not None and both.p > 0.1


def test_mean_squares_are_those_of_two_way_analysis() -> None:
    table = np.array([[1.0, 2.0, 6.0], [2.0, 5.0, 8.0]])  # means by row 3 and 5, by column 1.5, 3.5 and 7, of all 4
    found = components(table, np.ones(3))
    assert found.free_documents == pytest.approx(2)
    assert found.of_seeds == pytest.approx(3 * (1 + 1) / 1)
    assert found.of_documents == pytest.approx(2 * (6.25 + 0.25 + 9) / 2)
    residual = np.array([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]])
    assert found.of_rest == pytest.approx((residual**2).sum() / 2)
    variance, freedom = found.variance()
    assert variance == pytest.approx((6 + 15.5 - 0.5) / 6)
    assert freedom == pytest.approx(21.0**2 / (36 / 1 + 15.5**2 / 2 + 0.25 / 2))


def test_the_variance_is_never_below_what_one_source_says() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        table = random.normal(size=(3, 5))
        found = components(table, np.ones(5))
        variance, freedom = found.variance()
        assert variance >= max(found.of_seeds, found.of_documents) / 15 and freedom >= 0.5
    same = np.tile(random.normal(size=7), (4, 1))  # seeds that are all alike say nothing against documents
    variance, freedom = components(same, np.ones(7)).variance()
    assert (variance, freedom) == pytest.approx((same[0].var(ddof=1) / 7, 6))


def test_documents_that_are_unlike_count_as_fewer() -> None:
    """One of 2 bytes beside two of 1: (4 + 1 + 1)^2 / (16 + 1 + 1) - 1."""
    table = np.array([[1.0, 2.0, 6.0], [2.0, 5.0, 8.0]])
    assert components(table, np.array([2.0, 1.0, 1.0])).free_documents == pytest.approx(1)
    assert components(table, np.array([2.0, 2.0, 1.0])).free_documents == pytest.approx(81 / 33 - 1)


def test_the_mean_is_the_ratio_of_the_sums() -> None:
    nats, text_bytes = np.array([[30.0, 1.0, 5.0], [10.0, 2.0, 0.0]]), np.array([100.0, 3.0, 40.0])
    assert bits_per_byte(nats, text_bytes).mean() == pytest.approx(48 / LN2 / (2 * 143))
    assert crossed(nats, text_bytes).mean == pytest.approx(48 / LN2 / (2 * 143))
    assert crossed(nats[:1], text_bytes) == Estimate(pytest.approx(36 / LN2 / 143))
    assert crossed(nats[:, :1], text_bytes[:1]).interval() is None


def test_intervals_over_seeds_are_students() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.interval() == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 0).pvalue)
    assert over_seeds([5.0]) == Estimate(5.0) and over_seeds([5.0]).p is None
    assert Estimate(0.0, 0.0, 3).p == 1.0 and Estimate(-1.0, 0.0, 3).p == 0.0


def test_strict_levels_are_kept_too() -> None:
    """Those of Holm's first step over eleven, where seeds make most of the variance and lie close by chance."""
    level, times = 0.05 / 11, 6000
    wrong = {"as told": 0, "both together": 0}
    random = np.random.default_rng(11)
    for _ in range(times):
        found = crossed(*drawn(random, seeds=5, documents=60, by_seed=0.02, by_document=0.0, rest=0.1))
        assert found.p is not None and found.standard_error is not None
        together = Estimate(found.mean, found.standard_error, found.freedom).p
        wrong["as told"] += found.p < level
        wrong["both together"] += together is not None and together < level
    assert wrong["as told"] / times < level + 3 * math.sqrt(level / times)
    assert wrong["as told"] < wrong["both together"], "the freedom of both together is too large at such levels"


def test_holm_by_hand() -> None:
    """Of 0.01, 0.02, 0.04 and 0.03: 4 x 0.01, 3 x 0.02, 2 x 0.03 and 1 x 0.04, none less than the one before."""
    found = holm([0.01, 0.04, 0.03, 0.02])
    assert [one.p for one in found] == pytest.approx([0.04, 0.06, 0.06, 0.06])
    # 0.01 is tested at 0.05 / 4; 0.02 is not below 0.05 / 3, at which all others are told
    assert [one.level for one in found] == pytest.approx([1 - 0.05 / 4, *[1 - 0.05 / 3] * 3])
    assert [one.p for one in holm([0.6, 0.9])] == [1.0, 1.0]
    assert [one.p for one in holm([0.001])] == [0.001] and holm([]) == []
    with_none = holm([None, 0.001, 0.03])
    assert [one.p for one in with_none] == [None, 0.003, 0.06], "one without a result counts as a comparison"


def test_a_corrected_interval_says_what_the_corrected_p_says() -> None:
    random = np.random.default_rng(8)
    for _ in range(300):
        made = [Estimate(random.normal(0, 3), 1.0, float(random.integers(2, 9))) for _ in range(5)]
        for one, corrected in zip(made, holm([one.p for one in made]), strict=True):
            low, high = one.interval(corrected.level) or (0, 0)
            assert (low > 0 or high < 0) == (corrected.p is not None and corrected.p < 0.05)


def test_holm_keeps_its_promise_where_nothing_differs() -> None:
    random = np.random.default_rng(4)
    wrong = 0
    for _ in range(2000):
        values = 2 * stats.t.sf(np.abs(random.standard_t(4, size=9)), 4)
        wrong += any(one.p is not None and one.p < 0.05 for one in holm(values.tolist()))
    assert abs(wrong / 2000 - (1 - (1 - 0.05 / 9) ** 9)) < 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("seeds", "comparisons"), [(5, 1), (5, 9), (3, 9), (12, 4)])
def test_power_is_what_a_simulation_gives(seeds: int, comparisons: int) -> None:
    difference = smallest_difference(seeds**-0.5, seeds - 1, comparisons)
    assert difference == in_deviations(seeds, comparisons)
    random, times = np.random.default_rng(6), 20_000
    values = random.normal(difference, 1.0, size=(times, seeds))
    found = np.abs(values.mean(1)) / (values.std(1, ddof=1) / math.sqrt(seeds))
    share = float((found > stats.t.isf(0.025 / comparisons, seeds - 1)).mean())
    assert abs(share - 0.8) < 3 * math.sqrt(0.8 * 0.2 / times)
    assert smallest_difference(2.0, seeds - 1, comparisons) == pytest.approx(
        2 * difference * math.sqrt(seeds), rel=1e-4
    )


def test_a_single_seed_shows_nothing() -> None:
    assert in_deviations(1, 3) is None


def test_the_slope_is_that_of_least_squares() -> None:
    sizes, figures = [1e6, 4e6, 3e7], np.array([0.1, 0.05, -0.02])
    assert slope_weights(sizes) @ figures == pytest.approx(np.polyfit(np.log10(sizes), figures, 1)[0])


def test_intervals_of_a_trend_cover_the_truth() -> None:
    random, sizes, times = np.random.default_rng(9), [1e6, 3e6, 1e7], 800
    inside = 0
    for _ in range(times):
        text_bytes = np.exp(random.normal(7, 0.7, 40))
        common = 0.05 * random.normal(size=(5, 40))  # of a seed's and a document's own, at all sizes
        tables = [
            (0.02 * math.log10(size) + common + 0.02 * random.normal(size=(5, 1)) + 0.05 * random.normal(size=(5, 40)))
            * text_bytes
            * LN2
            for size in sizes
        ]
        bounds = trend(tables, text_bytes, sizes).interval()
        assert bounds is not None
        inside += bounds[0] <= 0.02 <= bounds[1]
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / times) <= inside / times <= 0.99
