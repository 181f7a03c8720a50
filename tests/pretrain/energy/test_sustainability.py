"""The arithmetic on a run's records: against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.carbon_intensity import GRIDS, grid_intensity
from pretrain.energy.sustainability import (
    ENOUGH,
    TREND_SHARE,
    WINDOW,
    first_judged,
    footprint,
    gradient_stability,
    joules_of,
    kwh,
    learning_stability,
    measured_joules,
    measured_parts,
    to_target,
)
from pretrain.records import Counters, Record, from_plain


def record(kind: str, step: int, gpu_j: float | None, cpu_j: float | None = None, **more: Any) -> Record:
    spent = {"seconds": 1.0, "gpu_j": gpu_j, "cpu_j": cpu_j}
    return from_plain({"kind": kind, "step": step, "loss": None, **spent, **more})


def counters(step: int, *measured: str) -> Record:
    missing = {part: f"no {part}" for part in ("gpu", "cpu", "dram") if part not in measured}
    return Counters(step=step, measured=measured, missing=missing)


def test_a_null_is_a_short_window_only_where_a_counter_was_there() -> None:
    records = [record("train", 1, 5.0), record("train", 2, None)]
    assert joules_of(records, "gpu") is None, "an older run does not say why"
    assert joules_of([counters(0, "gpu"), *records], "gpu") == 5.0
    assert joules_of([counters(0, "gpu"), *records], "cpu") is None
    assert joules_of([counters(0, "gpu"), *records, counters(2)], "gpu") is None, "lost on the way"
    assert joules_of([*records, counters(2, "gpu"), record("train", 3, 5.0)], "gpu") is None, "not from the start"
    assert joules_of([], "gpu") is None


def test_only_parts_measured_throughout_count() -> None:
    records = [counters(0, "gpu", "cpu"), record("train", 1, 5.0, 2.0), record("eval", 1, 1.0, 1.0), counters(1, "gpu")]
    records.append(record("train", 2, 5.0))
    assert measured_parts(records) == ["gpu"]
    assert measured_joules(records, "train") == 10.0 and measured_joules(records) == 11.0
    assert measured_joules([record("train", 1, None)]) is None


def test_the_target_is_met_at_the_first_evaluation_at_or_below_it() -> None:
    records = [counters(0, "gpu")]
    for step, loss in ((10, 4.0), (20, 3.0), (30, 3.5), (40, 2.0)):
        records += [record("train", step, 100.0, tokens=64 * step), record("eval", step, 7.0, loss=loss)]
    assert to_target(records, 3.0) == {"loss": 3.0, "step": 20, "tokens": 1280, "joules": 200.0}
    assert to_target(records, 2.5) == {"loss": 2.0, "step": 40, "tokens": 2560, "joules": 400.0}
    assert to_target(records, 1.0) is None


def test_footprint_by_hand() -> None:
    found = footprint(7.2e6, 1.5, "france", 0.25)  # 2 kWh
    assert (found["kwh"], found["site_kwh"], found["gco2e"], found["cost"]) == (2.0, 3.0, 168.0, 0.75)
    assert found["grid_source"] == "Ember, electricity of 2023" and found["embodied_gco2e"] is None
    bare = footprint(7.2e6, 1.0, None, None)
    assert bare["site_kwh"] == 2.0 and bare["gco2e"] is None and bare["cost"] is None
    unmeasured = footprint(None, 1.5, 100.0, 0.25)
    assert [unmeasured[key] for key in ("joules", "kwh", "site_kwh", "gco2e", "cost")] == [None] * 5


@given(st.floats(0, 1e15), st.floats(1, 3), st.floats(0, 2000))
def test_emissions_grow_with_energy_pue_and_grid(joules: float, pue: float, grid: float) -> None:
    assert footprint(joules, pue, grid, None)["gco2e"] == pytest.approx(kwh(joules) * pue * grid)


def test_grids_are_plausible_and_others_are_refused() -> None:
    assert all(0 < grams < 1000 and name == name.lower() for name, grams in GRIDS.items())
    assert grid_intensity("france") == 56.0 and grid_intensity(12.5) == 12.5
    with pytest.raises(ValueError, match="one of world"):
        grid_intensity("atlantis")


STEPS, FIRST = 250, 50
CALM: dict[str, Callable[[int], float]] = {  # norms without noise, by update
    "decay": lambda k: math.exp(-2.25 * k / STEPS),
    "power law": lambda k: (k + 1) ** -1.5,
    "warm-up that lasts": lambda k: min(1.0, (k + 1) / 120),
    "warm-up and decay": lambda k: min((k + 1) / 30, (30 / (k + 1)) ** 0.5),
    "step": lambda k: 1.0 if k < 140 else 0.2,
    "step up": lambda k: 1.0 if k < 140 else 5.0,
    "slow waves": lambda k: math.exp(0.2 * math.sin(2 * math.pi * k / STEPS)),
}


def noise(seed: int, count: int, variance: float) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count) * variance**0.5


@pytest.mark.parametrize("name", CALM)
def test_a_trend_is_no_unrest(name: str) -> None:
    found = gradient_stability([CALM[name](k) for k in range(STEPS)], FIRST)
    assert found["residual_variance"] < 1e-5 and found["spikes"] == 0, "the variance itself is up to 0.9"
    assert (found["judged"], found["first"], found["window"]) == (STEPS - FIRST - 20, FIRST, WINDOW)


@pytest.mark.parametrize("name", CALM)
def test_noise_scores_its_variance_whatever_it_is_on(name: str) -> None:
    """Over 40 runs, whose mean is known to 1.7%; a step takes part in it where noise straddles it."""
    found = []
    for seed in range(40):
        norms = [CALM[name](k) * math.exp(e) for k, e in enumerate(noise(seed, STEPS, 0.004))]
        found.append(gradient_stability(norms, FIRST)["residual_variance"])
    assert np.mean(found) == pytest.approx(0.004, rel=0.05)


def test_the_trend_takes_as_much_of_noise_as_is_given_back() -> None:
    norms = np.exp(noise(0, 40_000, 0.25)).tolist()
    assert gradient_stability(norms)["residual_variance"] == pytest.approx(0.25, rel=0.02)
    windows = np.lib.stride_tricks.sliding_window_view(np.log(norms), WINDOW)
    plain = np.mean((windows[:, WINDOW // 2] - np.median(windows, axis=1)) ** 2)
    assert gradient_stability(norms)["residual_variance"] == pytest.approx(plain / TREND_SHARE)
    assert pytest.approx(0.9776, abs=5e-4) == TREND_SHARE, "simulated in 200,000 windows: 0.976"


def test_spikes_stand_out_of_the_noise_about_the_trend() -> None:
    norms = [math.exp(-3 * k / STEPS + e) for k, e in enumerate(noise(1, STEPS, 0.004))]
    assert gradient_stability(norms, FIRST)["spikes"] == 0
    for place in (70, 71, 150, 200):
        norms[place] *= 2  # below 3 medians of the steps before in a falling run
    assert gradient_stability(norms, FIRST)["spikes"] == 4
    norms[20] *= 100
    assert gradient_stability(norms, FIRST)["spikes"] == 4, "before the first one that is judged"
    rounding = [1.0 + 1e-7 * (k % 7 == 0) for k in range(STEPS)]
    assert gradient_stability(rounding)["spikes"] == 0, "most residuals are 0 there"
    dips = [0.2 if k in (100, 150) else norm for k, norm in enumerate(rounding)]
    assert gradient_stability(dips)["spikes"] == 0


def test_few_steps_are_no_figure() -> None:
    enough = WINDOW - 1 + ENOUGH
    nothing = {"residual_variance": None, "spikes": None, "first": 0, "window": WINDOW}
    assert gradient_stability([]) == gradient_stability([None, 1.0, 0.0]) == {**nothing, "judged": 0}
    assert gradient_stability([1.0] * (enough - 1)) == {**nothing, "judged": ENOUGH - 1}
    assert gradient_stability([1.0] * enough)["residual_variance"] == 0.0
    skipped = [None if k % 10 == 0 else 1.0 for k in range(enough)]
    assert gradient_stability(skipped)["judged"] == enough - -(-enough // 10) - WINDOW + 1


def test_what_is_judged_is_told_in_updates_of_the_whole_run() -> None:
    assert first_judged(250, 25) == 50 and first_judged(5, 0) == 1
    assert gradient_stability([1.0] * 100, first=50, at=30) == gradient_stability([9.0] * 20 + [1.0] * 80, 50, at=30)
    late = gradient_stability([1.0] * 100, first=50, at=300)
    assert (late["first"], late["judged"]) == (300, 80)


@given(st.lists(st.floats(1e-3, 1e3), min_size=WINDOW + ENOUGH, max_size=60))
def test_gradient_stability_has_no_unit(norms: list[float]) -> None:
    one, scaled = (gradient_stability([k * norm for norm in norms]) for k in (1.0, 1024.0))
    assert one["residual_variance"] == pytest.approx(scaled["residual_variance"], rel=1e-9, abs=1e-12)


def test_learning_stability() -> None:
    losses: list[float | None] = [8.0 - 0.1 * k + 0.01 * (k % 5) for k in range(60)]
    calm = learning_stability(losses, [5.0, 4.0, 3.0])
    assert (calm["spikes"], calm["judged"], calm["rises"], calm["largest_rise"]) == (0, 40, 0, 0.0)
    assert calm["residual_variance"] < 1e-3
    losses[30] = 5.5  # below the losses of ten steps before, in a run that learns
    rough = learning_stability(losses, [5.0, 4.0, 4.5, 4.25, 3.0])
    assert rough["spikes"] == 1 and rough["rises"] == 2 and rough["largest_rise"] == 0.5
    nothing = {"residual_variance": None, "spikes": None, "judged": 0, "rises": None, "largest_rise": None}
    assert learning_stability([], [5.0]) == {**nothing, "first": 0, "window": WINDOW}
    assert learning_stability(losses, [], first=10)["judged"] == 30
