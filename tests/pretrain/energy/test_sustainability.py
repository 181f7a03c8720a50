"""The arithmetic on a run's records: against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.carbon_intensity import GRIDS, grid_intensity
from pretrain.energy.sustainability import (
    ENOUGH,
    WINDOW,
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


def test_gradient_spikes_and_variance() -> None:
    norms: list[float | None] = [1.0, math.e] * ENOUGH
    assert gradient_stability(norms) == {"log_norm_variance": 0.25, "spikes": 0, "judged": ENOUGH}
    norms += [1.0, 20.0, None, 1.0]  # the median of the window is about 1.9
    assert gradient_stability(norms)["spikes"] == 1 and gradient_stability(norms)["judged"] == ENOUGH + 3
    assert gradient_stability([1000.0] * 5 + [1.0] * 5, warmup_steps=5)["log_norm_variance"] == 0.0
    nothing = {"log_norm_variance": None, "spikes": None, "judged": 0}
    assert gradient_stability([]) == gradient_stability([None, 1.0]) == nothing


def test_the_window_forgets() -> None:
    norms = [1.0] * ENOUGH + [10.0] * WINDOW * 2
    found = gradient_stability(norms)
    assert found["spikes"] == ENOUGH, "half of the window, then the median is the new norm"


@given(st.lists(st.floats(1e-3, 1e3), min_size=ENOUGH + 2, max_size=60))
def test_gradient_stability_has_no_unit(norms: list[float]) -> None:
    one, scaled = (gradient_stability([k * norm for norm in norms]) for k in (1.0, 1024.0))
    assert one["spikes"] == scaled["spikes"]
    assert one["log_norm_variance"] == pytest.approx(scaled["log_norm_variance"], abs=1e-6)


def test_learning_stability() -> None:
    losses: list[float | None] = [4.0 + 0.01 * (k % 5) for k in range(40)]
    calm = learning_stability(losses, [5.0, 4.0, 3.0])
    assert calm == {"spikes": 0, "judged": 40 - ENOUGH, "rises": 0, "largest_rise": 0.0}
    losses[30] = 4.5
    rough = learning_stability(losses, [5.0, 4.0, 4.5, 4.25, 3.0])
    assert rough["spikes"] == 1 and rough["rises"] == 2 and rough["largest_rise"] == 0.5
    assert learning_stability([], [5.0]) == {"spikes": None, "judged": 0, "rises": None, "largest_rise": None}
