"""Axes of plots: from values to places, and how they are drawn.

What is None or not finite is left out, as is what a logarithmic axis cannot show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pretrain.study.page.charts.numbers import known, log_ticks, precise, short, ticks
from pretrain.study.page.charts.svg import DIGIT, Pixel, path, words


@dataclass(frozen=True)
class Axis:
    """What an axis shows; `None` for a limit: from the data."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    form: Callable[[float], str] = short  # of ticks
    told: Callable[[float], str] = precise  # of tips
    ticks: bool = True

    def shows(self, value: float | None) -> bool:
        """Whether a value has a place on it."""
        return known(value) and (not self.log or (value or 0) > 0)

    def scale(self, values: Iterable[float], start: float, stop: float) -> Scale:
        """Maps low..high to start..stop; what is not given comes from the values."""
        visible = [value for value in values if self.shows(value)]
        low = self.low if self.low is not None else min(visible, default=1.0)
        high = self.high if self.high is not None else max(visible, default=1.0)
        if not high > low:
            low, high = (low / 2, low * 2) if self.log else (low - (abs(low) or 1) / 10, low + (abs(low) or 1) / 10)
        return Scale(low, high, start, stop, self.log)


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..stop, in units of the plot."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, beyond start and stop too; on a logarithmic scale values are above 0."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values within low..high, about `count` of them."""
        return (log_ticks if self.log else ticks)(self.low, self.high, count)

    def ticks_down(self) -> list[float]:
        """As many as an upright axis has room for."""
        return self.ticks(max(2, round(abs(self.stop - self.start) / 34)))

    def ticks_across(self, form: Callable[[float], str]) -> list[float]:
        """As many as a level axis has room for, with their texts."""
        for count in (7, 6, 5, 4, 3, 2):
            fewer = self.ticks(count)
            places = [(self(tick), DIGIT * len(form(tick)) / 2 + 5) for tick in fewer]
            if all(a + half <= b - other for (a, half), (b, other) in pairwise(places)):
                return fewer
        return fewer[:: max(1, len(fewer) - 1)]


@dataclass(frozen=True)
class Frame:
    """The place of the data within a plot of width x height, and its two scales."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float
    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> Pixel:
        """The place of values of both axes."""
        return self.x(x), self.y(y)

    def across(self, y: float) -> str:
        """Path data of a level line from edge to edge."""
        return f"M{self.left:.1f} {y:.1f}H{self.right:.1f}"


def frame_of(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, size: Pixel, right: float) -> Frame:
    """Leaves room for the ticks' texts on the left and `right` for labels on the right."""
    width, height = size
    top, bottom = 22.0, height - (36.0 if x.ticks else 22.0)
    down = y.scale(ys, bottom, top)
    texts = [y.form(tick) for tick in down.ticks_down()] if y.ticks else []
    left = 10.0 + DIGIT * max(map(len, texts), default=0)
    return Frame(width, height, left, top, width - right, bottom, x.scale(xs, left + 2, width - right), down)


def axes(frame: Frame, x: Axis, y: Axis) -> str:
    """The drawing of both axes."""
    parts = []
    for tick in frame.y.ticks_down() if y.ticks else ():
        at = frame.y(tick)
        parts.append(path("rule", frame.across(at)))
        parts.append(words(frame.left - 5, at + 4, y.form(tick), "tick", "end"))
    parts.append(path("axis", frame.across(frame.bottom)))
    for tick in frame.x.ticks_across(x.form) if x.ticks else ():
        at, text = frame.x(tick), x.form(tick)
        half = DIGIT * (len(text) + text.count("%")) / 2
        parts.append(path("axis", f"M{at:.1f} {frame.bottom:.1f}v3.5"))
        parts.append(words(min(at, frame.width - half), frame.bottom + 15, text, "tick", "middle"))
    parts.append(words((frame.left + frame.right) / 2, frame.height - 6, x.label, "name", "middle"))
    parts.append(words(2, 12, y.label, "name", "start"))
    return "".join(parts)
