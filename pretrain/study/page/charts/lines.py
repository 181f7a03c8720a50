"""Lines against two axes, with dots, rings, crosses and bands, and names at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.study.page.charts.axes import Axis, Frame, axes, frame_of
from pretrain.study.page.charts.svg import BOLD, LINE, Pixel, circle, group, path, plot, through, words


@dataclass(frozen=True, eq=False)
class Series:
    """A line and what is drawn with it, in the units of the axes."""

    name: str
    points: Sequence[tuple[float, float | None]]
    style: int = 0
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    dots: Sequence[tuple[float, float | None]] = ()  # values beside the line
    ringed: Sequence[tuple[float, float | None]] = ()
    crosses: Sequence[tuple[float, str]] = ()  # x without a value, and why: at the upper edge
    muted: bool = False  # for comparison, beneath the others: no tips, no label

    def visible(self, x: Axis, y: Axis) -> list[tuple[float, float]]:
        """Its points that the axes can show."""
        everything = (*self.points, *self.dots, *self.ringed)
        return [(a, b) for a, b in everything if b is not None and x.shows(a) and y.shows(b)]


class Rule(NamedTuple):
    """A horizontal line at a value of the y axis, and its name at the right end or the left."""

    value: float
    name: str
    left: bool = False


def line_chart(
    label: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    size: Pixel = (300, 230),
    direct: bool = True,
    rules: Sequence[Rule] = (),
) -> str:
    """Lines against two axes; '' if no point can be shown.

    Args:
        label: what a reader who does not see it is told.
        direct: names at the right, level with the ends of the lines.
        rules: horizontal lines, where they are within the axis.
    """
    points = [point for line in series for point in line.visible(x, y)]
    xs = [a for a, _ in points] + [a for line in series for a, _ in line.crosses if x.shows(a)]
    ys = [b for _, b in points] + [edge for line in series for _, *edges in line.band for edge in edges]
    if not ys and not xs:
        return ""
    named = [line for line in series if direct and not line.muted and line.visible(x, y)]
    right = 14.0 + max((len(line.name) for line in named), default=-1) * BOLD + (8 if named else 0)
    frame = frame_of(xs, ys, x, y, size, right)
    parts = [axes(frame, x, y), *(_rule(rule, frame) for rule in rules if frame.y.low <= rule.value <= frame.y.high)]
    ends = []
    for line in sorted(series, key=lambda line: (not line.muted, line.style == 0)):
        drawn, end = _drawn(line, frame, x, y)
        parts.append(drawn)
        if end is not None and line in named:
            ends.append((end, line))
    ends.sort(key=lambda pair: pair[0][1])
    places = spread([end[1] for end, _ in ends], LINE, frame.top, frame.bottom)
    for (end, line), place in zip(ends, places, strict=True):
        lead = path("lead", f"M{end[0] + 2:.1f} {end[1]:.1f}L{frame.right + 4:.1f} {place:.1f}h5")
        parts.append(group(line.style, lead + words(frame.right + 11, place, line.name, "direct")))
    return plot(size, label, "".join(parts))


def _rule(rule: Rule, frame: Frame) -> str:
    at = frame.y(rule.value)
    edge, anchor = (frame.left + 2, "start") if rule.left else (frame.right - 2, "end")
    name = words(edge, at - 4 if at > frame.top else at + 13, rule.name, "note", anchor)
    return path("limit", frame.across(at)) + name


def _drawn(series: Series, frame: Frame, x: Axis, y: Axis) -> tuple[str, Pixel | None]:
    """The drawing and its last point, on the edge if that is above it."""

    def place(a: float, b: float | None) -> Pixel | None:
        return frame.at(a, b) if b is not None and x.shows(a) and y.shows(b) else None

    body, tips = [], []
    band = [(a, low, high) for a, low, high in series.band if x.shows(a) and y.shows(low) and y.shows(high)]
    if band:
        upper = [(frame.x(a), max(frame.y(high), frame.top)) for a, _, high in band]
        lower = [(frame.x(a), max(frame.y(low), frame.top)) for a, low, _ in band]
        body.append(path("band", f"{through(upper + lower[::-1])}Z"))
    line = [place(a, b) for a, b in series.points]
    body += [path("line", through(piece)) for piece in _below(line, frame.top)]
    for a, b in (*series.points, *series.dots):
        at = place(a, b)
        if at is not None and b is not None and at[1] >= frame.top - 0.1:
            tips.append((*at, f"{y.told(b)} {y.label}, {x.told(a)} {x.label}"))
    for kind, values, radius in (("dot", series.dots, 2.2), ("ring", series.ringed, 5.0)):
        places = [at for a, b in values if (at := place(a, b)) is not None]
        body += [circle(kind, at, radius) for at in places if at[1] >= frame.top - 0.1]
    for a, why in series.crosses:
        if x.shows(a):
            across, down = frame.x(a), frame.top + 5
            body.append(path("cross", f"M{across - 3.5:.1f} {down - 3.5:.1f}l7 7m0 -7l-7 7"))
            tips.append((across, down, f"{why}, {x.told(a)} {x.label}"))
    drawing = group(series.style, "".join(body), series.name, tips, series.muted)
    end = next((at for at in reversed(line) if at is not None), None)
    return drawing, None if end is None else (end[0], max(end[1], frame.top))


def _below(points: Sequence[Pixel | None], edge: float) -> list[list[Pixel]]:
    """The pieces of a line that are not above an edge, cut where they cross it. None is a gap."""
    pieces: list[list[Pixel]] = [[]]
    before: Pixel | None = None
    for point in points:
        if point is None:
            pieces.append([])
        else:
            if before is not None and (before[1] < edge) != (point[1] < edge):
                share = (edge - before[1]) / (point[1] - before[1])
                pieces[-1].append((before[0] + share * (point[0] - before[0]), edge))
            if point[1] >= edge:
                pieces[-1].append(point)
            elif before is not None:
                pieces.append([])
        before = point
    return [piece for piece in pieces if piece]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to the ascending given ones that are `gap` apart and, if they fit, within low..high.

    Isotonic regression (pooling of adjacent violators) of the places less their share of gaps.
    """
    pools: list[tuple[float, int]] = []
    for rank, place in enumerate(places):
        pools.append((place - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    flat = [value for value, count in pools for _ in range(count)]
    most = max(low, high - (len(places) - 1) * gap)
    return [min(max(value, low), most) + rank * gap for rank, value in enumerate(flat)]
