"""Times and energies in the unit that fits them, to three digits, for a reader."""

from __future__ import annotations

import math

# Unit, its size, and the least amount that is told in it.
TIMES = (("days", 86400.0, 2 * 86400.0), ("hours", 3600.0, 2 * 3600.0), ("minutes", 60.0, 120.0), ("s", 1.0, 1.0),
         ("ms", 1e-3, 1e-3), ("us", 1e-6, 0.0))  # fmt: skip
ENERGIES = (
    ("GWh", 3.6e12, 3.6e12),
    ("MWh", 3.6e9, 3.6e9),
    ("kWh", 3.6e6, 3.6e6),
    ("Wh", 3.6e3, 3.6e3),
    ("J", 1.0, 0.0),
)


def duration(seconds: float) -> str:
    """Such as 14.4 minutes: from us to days."""
    return _fitting(seconds, TIMES)


def clock(seconds: float) -> str:
    """Such as 1:15 or 1:01:01: minutes and seconds, from an hour on hours too."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_left(seconds: float) -> str:
    """Such as 2 min 50 s or 1 h 02 min."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def energy(joules: float) -> str:
    """Such as 1.21 kWh: from J to GWh."""
    return _fitting(joules, ENERGIES)


def _fitting(amount: float, units: tuple[tuple[str, float, float], ...]) -> str:
    if not amount:
        return f"0 {next(name for name, size, _ in units if size == 1)}"
    name, size, _ = next(unit for unit in units if amount >= unit[2])
    decimals = min(2, max(0, 2 - math.floor(math.log10(amount / size))))
    return f"{amount / size:,.{decimals}f} {name}"
