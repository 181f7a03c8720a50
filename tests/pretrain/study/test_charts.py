"""Plots of pages: ticks, labels, and what cannot be shown."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.intervals import intervals
from pretrain.study.page.charts.lines import Series, line_chart, spread
from pretrain.study.page.charts.numbers import log_ticks, short, ticks
from pretrain.study.page.charts.points import Point, scatter
from pretrain.study.page.charts.radar import Outline, radar


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_and_within(low: float, span: float, count: int) -> None:
    high = low + span
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high, count)
    assert len(found) <= count + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)


@given(st.floats(1e-12, 1e9), st.floats(1.01, 1e15))
def test_logarithmic_ticks_are_within(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 7
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in found)


@given(st.lists(st.floats(0, 200), min_size=1, max_size=10).map(sorted))
def test_labels_do_not_overlap_and_stay_in_order(places: list[float]) -> None:
    found = spread(places, 13.0, 0.0, 230.0)
    assert all(b - a >= 13.0 - 1e-6 for a, b in zip(found, found[1:], strict=False))
    assert found[0] >= -1e-6 and found[-1] <= 230.0 + 1e-6


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread([10.0, 50.0, 90.0], 13.0, 0.0, 100.0) == [10.0, 50.0, 90.0]
    assert spread([50.0, 50.0], 10.0, 0.0, 100.0) == [45.0, 55.0]


@pytest.mark.parametrize(
    "value, told",
    [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (0.003, "0.003"), (3e-5, "3e-5"), (1e-6, "10⁻⁶"), (12_500, "12.5k")],
)
def test_short_numbers(value: float, told: str) -> None:
    assert short(value) == told


def test_a_chart_leaves_out_what_an_axis_cannot_show() -> None:
    nan = float("nan")
    points = [(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, nan), (4.0, 5.0)]
    chart = line_chart("a", [Series("s", points)], Axis("x", log=True), Axis("y"))
    tips = re.search("data-tips='(.*?)'", chart)
    assert tips is not None and len(json.loads(tips[1])) == 2 and "nan" not in chart


def test_a_line_is_cut_at_the_upper_edge() -> None:
    chart = line_chart("a", [Series("s", [(0, 10), (1, 1), (2, 0)])], Axis("x"), Axis("y", low=0, high=2))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search('class="line" d="(.*?)"', chart)[1])]
    assert len(heights) == 3 and min(heights) == 22.0


def test_a_band_and_the_name_of_a_line_are_drawn() -> None:
    band = Series("a & b", [(0, 1), (1, 2)], 3, band=[(0, 0.5, 1.5), (1, 1, 3)])
    chart = line_chart("a", [band], Axis("x"), Axis("y"))
    assert 'class="band"' in chart and 'class="k3" data-k="3"' in chart and ">a &amp; b</text>" in chart
    assert 'class="direct"' not in line_chart("a", [band], Axis("x"), Axis("y"), direct=False)


def test_charts_without_data_are_empty() -> None:
    assert line_chart("a", [Series("s", [(1.0, None)])], Axis("x"), Axis("y")) == ""
    assert scatter("a", [Point(float("nan"), 1, "t")], Axis("x"), Axis("y")) == ""
    assert intervals("a", [], Axis("x")) == ""


def test_one_value_has_an_axis() -> None:
    for value in (0.0, 5.0, -3.0):
        assert "<path" in line_chart("a", [Series("s", [(value, value)])], Axis("x"), Axis("y"))


@pytest.mark.parametrize("axes", [3, 4, 5, 6])
def test_a_radar_of_any_number_of_axes_stays_within_its_box(axes: int) -> None:
    names = [f"axis {place}" for place in range(axes)]
    drawn = radar("a", names, [Outline("s", [1.0] * axes, 1)], size=(150, 142))
    places = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn)]
    assert places and all(0 <= x <= 150 and 0 <= y <= 142 for x, y in places)
