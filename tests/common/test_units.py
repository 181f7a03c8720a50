"""Times and energies for a reader."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.units import duration, energy, time_left


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0.0, "0 s"),
        (4e-7, "0.40 us"),
        (2.18e-5, "21.8 us"),
        (9.996e-4, "1,000 us"),
        (0.0156, "15.6 ms"),
        (1.0, "1.00 s"),
        (119.0, "119 s"),
        (0.02 * 86400, "28.8 minutes"),
        (7199.0, "120 minutes"),
        (7200.0, "2.00 hours"),
        (172_799.0, "48.0 hours"),
        (172_800.0, "2.00 days"),
        (1e9, "11,574 days"),
    ],
)
def test_a_time_is_told_in_the_unit_that_fits(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.mark.parametrize(("seconds", "told"), [(0, "0 min 00 s"), (3599, "59 min 59 s"), (3725, "1 h 02 min")])
def test_the_time_that_is_left_is_in_hours_and_minutes(seconds: float, told: str) -> None:
    assert time_left(seconds) == told


@pytest.mark.parametrize(
    "joules, told",
    [
        (0.0, "0 J"), (167.2, "167 J"), (7200.0, "2.00 Wh"), (3.6e6, "1.00 kWh"), (4.5e10, "12.5 MWh"),
        (1e14, "27.8 GWh"),
    ],
)  # fmt: skip
def test_an_energy_is_told_in_the_unit_that_fits(joules: float, told: str) -> None:
    assert energy(joules) == told


@given(st.floats(1e-6, 1e12))
def test_what_is_told_is_right_to_a_percent(amount: float) -> None:
    times = {"us": 1e-6, "ms": 1e-3, "s": 1, "minutes": 60, "hours": 3600, "days": 86400}
    energies = {"J": 1, "Wh": 3.6e3, "kWh": 3.6e6, "MWh": 3.6e9, "GWh": 3.6e12}
    for told, sizes in ((duration(amount), times), (energy(amount + 1), energies)):
        number, unit = told.split()
        back = float(number.replace(",", "")) * sizes[unit]
        assert back == pytest.approx(amount + (sizes is energies), rel=0.01)
