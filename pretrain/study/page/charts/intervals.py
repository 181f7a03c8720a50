"""Means with intervals, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.study.page.charts.axes import Axis, Frame, Scale, axes
from pretrain.study.page.charts.svg import BOLD, circle, group, path, plot, words

PITCH, TOP = 19.0, 6.0  # of the rows, in units of the plot


@dataclass(frozen=True)
class Interval:
    """A row: a mean, its bounds if it has both, and what it is the mean of."""

    name: str
    style: int
    mean: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()  # single values, beneath
    tip: str = ""


def intervals(label: str, rows: Sequence[Interval], x: Axis, *, at: float | None = None, width: float = 300) -> str:
    """Means with intervals, one row each; '' without rows. `at`: where a vertical line is drawn."""
    rows = [row for row in rows if x.shows(row.mean)]
    if not rows:
        return ""
    ends = [value for row in rows for value in (row.mean, row.low, row.high, *row.values, at) if value is not None]
    left = 12.0 + BOLD * max(len(row.name) for row in rows)
    bottom = TOP + PITCH * len(rows) + 4
    scale = x.scale(ends, left + 6, width - 10)
    frame = Frame(width, bottom + 38, left, TOP, width - 8, bottom, scale, Scale(0, 1, bottom, TOP))

    def upright(kind: str, value: float) -> str:
        return path(kind, f"M{scale(value):.1f} {TOP:.1f}V{bottom:.1f}")

    parts = [upright("rule", tick) for tick in scale.ticks_across(x.form)]
    parts.append(axes(frame, x, Axis("", ticks=False)))
    if at is not None:
        parts.append(upright("limit", at))
    for place, row in enumerate(rows):
        y = TOP + PITCH * (place + 0.5) + 2
        body = [words(left - 4, y, row.name, "direct", "end")]
        if row.low is not None and row.high is not None:
            body.append(path("whisker", f"M{scale(row.low):.1f} {y:.1f}H{scale(row.high):.1f}"))
        body += [circle("faint", (scale(value), y), 1.8) for value in row.values if x.shows(value)]
        body.append(circle("mean", (scale(row.mean), y), 2.7))
        parts.append(group(row.style, "".join(body), row.name, [(scale(row.mean), y, row.tip or x.told(row.mean))]))
    return plot((width, bottom + 38), label, "".join(parts))
