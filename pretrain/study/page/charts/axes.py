"""Plots as SVG text, for pages that need no library: lines, scatter, radar, intervals.

A plot is a string that goes into HTML as it is; every text in it was escaped here. Colours and dashes come from the
page's style sheet by a number (`style`; 0 is the baseline), and `data-k` carries the same number, by which a page may
hide a series. `data-tips` holds [x, y, text] in the units of the plot, for a script that shows them (layout.py).
Coordinates that are None or not finite are left out, as are those that a logarithmic axis cannot show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

STYLES = 9  # besides the baseline's; more series take the same again
FONT = 12  # in units of the plot
LINE = 13.0  # least distance of two lines of text
DIGIT = 6.6  # width of a figure
BOLD = 7.1  # mean width of a bold letter, in a wide font
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Pixel = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


# ---- numbers


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def short(value: float) -> str:
    """As on a tick: 1.5k, 20M, 0.003, 3e-5, 10⁻⁶."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    if size >= 1e-3 or not size:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    digits, power = mantissa.rstrip("0").rstrip("."), str(int(exponent))
    return "10" + power.translate(SUPERSCRIPTS) if digits == "1" else f"{digits}e{power}"


def precise(value: float) -> str:
    """As in a tip: four figures."""
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of 10 apart) within low..high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12 - math.floor(math.log10(step))) for place in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers for a logarithmic axis: powers of 10, or 1, 2, 5 times them where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in range(first, last + 1) for f in factors]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / (count + 1))]
    return found if len(found) > 1 else ticks(low, high, count)


# ---- axes


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False
    low: float | None = None  # None: from the data
    high: float | None = None
    form: Callable[[float], str] = short  # of ticks
    told: Callable[[float], str] = precise  # of tips
    ticks: bool = True

    def shows(self, value: float | None) -> bool:
        return known(value) and (not self.log or (value or 0) > 0)

    def scale(self, values: Iterable[float], start: float, stop: float) -> Scale:
        """Maps low..high to start..stop; what is not given comes from the values."""
        seen = [value for value in values if self.shows(value)]
        low = self.low if self.low is not None else min(seen, default=1.0)
        high = self.high if self.high is not None else max(seen, default=1.0)
        if not high > low:
            low, high = (low / 2, low * 2) if self.log else (low - (abs(low) or 1) / 10, low + (abs(low) or 1) / 10)
        return Scale(low, high, start, stop, self.log)


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        return (log_ticks if self.log else ticks)(self.low, self.high, count)


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
        return self.x(x), self.y(y)


def _frame(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, size: Pixel, right: float) -> Frame:
    """Leaves room for the ticks' texts on the left and `right` for labels on the right."""
    width, height = size
    top, bottom = 22.0, height - (36.0 if x.ticks else 22.0)
    down = y.scale(ys, bottom, top)
    texts = [y.form(tick) for tick in _down_ticks(down)] if y.ticks else []
    left = 10.0 + DIGIT * max(map(len, texts), default=0)
    return Frame(width, height, left, top, width - right, bottom, x.scale(xs, left + 2, width - right), down)


def _down_ticks(scale: Scale) -> list[float]:
    return scale.ticks(max(2, round(abs(scale.stop - scale.start) / 34)))


def _across_ticks(scale: Scale, form: Callable[[float], str]) -> list[float]:
    """As many as have room for their texts."""
    for count in (7, 6, 5, 4, 3, 2):
        found = scale.ticks(count)
        places = [(scale(tick), DIGIT * len(form(tick)) / 2 + 5) for tick in found]
        if all(a + half <= b - other for (a, half), (b, other) in pairwise(places)):
            return found
    return found[:: max(1, len(found) - 1)]


def _axes(frame: Frame, x: Axis, y: Axis) -> str:
    parts = []
    if y.ticks:
        for tick in _down_ticks(frame.y):
            at = frame.y(tick)
            parts.append(f'<path class="rule" d="M{frame.left:.1f} {at:.1f}H{frame.right:.1f}"/>')
            parts.append(_text(frame.left - 5, at + 4, y.form(tick), "tick", "end"))
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    if x.ticks:
        for tick in _across_ticks(frame.x, x.form):
            at, text = frame.x(tick), x.form(tick)
            half = DIGIT * (len(text) + text.count("%")) / 2
            parts.append(f'<path class="axis" d="M{at:.1f} {frame.bottom:.1f}v3.5"/>')
            parts.append(_text(min(at, frame.width - half), frame.bottom + 15, text, "tick", "middle"))
    parts.append(_text((frame.left + frame.right) / 2, frame.height - 6, x.label, "name", "middle"))
    parts.append(_text(2, 12, y.label, "name", "start"))
    return "".join(parts)


# ---- parts


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(size: Pixel, label: str, body: str) -> str:
    width, height = size
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" style="--w:{width:g}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def _tips(tips: Iterable[tuple[float, float, str]]) -> str:
    """An attribute; in single quotes, since JSON has many double ones."""
    points = [[round(x, 1), round(y, 1), text] for x, y, text in tips]
    found = json.dumps(points, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return "data-tips='" + found.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;") + "'"


def style_class(style: int) -> str:
    return f"k{0 if style == 0 else (style - 1) % STYLES + 1}"


def _group(
    style: int, body: str, name: str = "", tips: Iterable[tuple[float, float, str]] = (), muted: bool = False
) -> str:
    kind = style_class(style) + (" muted" if muted else "")
    told = "" if muted else f' data-name="{escape(name)}" {_tips(tips)}'
    return f'<g class="{kind}" data-k="{style}"{told}>{body}</g>'


def _path(points: Sequence[Pixel]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


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


# ---- lines


@dataclass(frozen=True, eq=False)
class Series:
    name: str
    points: Sequence[tuple[float, float | None]]
    style: int = 0
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    dots: Sequence[tuple[float, float | None]] = ()  # values beside the line
    ringed: Sequence[tuple[float, float | None]] = ()
    crosses: Sequence[tuple[float, str]] = ()  # x without a value, and why: at the upper edge
    muted: bool = False  # for comparison, beneath the others: no tips, no label


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
    shown = [
        (one, [(a, b) for a, b in (*one.points, *one.dots, *one.ringed) if b is not None and x.shows(a) and y.shows(b)])
        for one in series
    ]
    xs = [a for one, points in shown for a in [p[0] for p in points] + [c[0] for c in one.crosses] if x.shows(a)]
    ys = [b for _, points in shown for _, b in points] + [v for one in series for band in one.band for v in band[1:]]
    if not ys and not xs:
        return ""
    named = [one for one, points in shown if direct and points and not one.muted]
    right = 14.0 + max((len(one.name) for one in named), default=-1) * BOLD + (8 if named else 0)
    frame = _frame(xs, ys, x, y, size, right)
    parts = [_axes(frame, x, y)]
    for rule in rules:
        if frame.y.low <= rule.value <= frame.y.high:
            at = frame.y(rule.value)
            parts.append(f'<path class="limit" d="M{frame.left:.1f} {at:.1f}H{frame.right:.1f}"/>')
            edge, anchor = (frame.left + 2, "start") if rule.left else (frame.right - 2, "end")
            parts.append(_text(edge, at - 4 if at > frame.top else at + 13, rule.name, "note", anchor))
    ends = []
    for one, _ in sorted(shown, key=lambda pair: (not pair[0].muted, pair[0].style == 0)):
        drawn, last = _series(one, frame, x, y)
        parts.append(drawn)
        if last is not None and one in named:
            ends.append((last, one))
    ends.sort(key=lambda end: end[0][1])
    places = spread([at[1] for at, _ in ends], LINE, frame.top, frame.bottom)
    for (end, one), place in zip(ends, places, strict=True):
        lead = f'<path class="lead" d="M{end[0] + 2:.1f} {end[1]:.1f}L{frame.right + 4:.1f} {place:.1f}h5"/>'
        parts.append(_group(one.style, lead + _text(frame.right + 11, place, one.name, "direct")))
    return _svg(size, label, "".join(parts))


def _series(one: Series, frame: Frame, x: Axis, y: Axis) -> tuple[str, Pixel | None]:
    """The drawing and its last point, on the edge if that is above it."""

    def place(a: float, b: float | None) -> Pixel | None:
        return frame.at(a, b) if b is not None and x.shows(a) and y.shows(b) else None

    body, tips = [], []
    band = [(a, low, high) for a, low, high in one.band if x.shows(a) and y.shows(low) and y.shows(high)]
    if band:
        upper = [(frame.x(a), max(frame.y(high), frame.top)) for a, _, high in band]
        lower = [(frame.x(a), max(frame.y(low), frame.top)) for a, low, _ in band]
        body.append(f'<path class="band" d="{_path(upper + lower[::-1])}Z"/>')
    line = [place(a, b) for a, b in one.points]
    for piece in _below(line, frame.top):
        body.append(f'<path class="line" d="{_path(piece)}"/>')
    for a, b in (*one.points, *one.dots):
        at = place(a, b)
        if at is not None and b is not None and at[1] >= frame.top - 0.1:
            tips.append((*at, f"{y.told(b)} {y.label}, {x.told(a)} {x.label}"))
    for kind, values, radius in (("dot", one.dots, 2.2), ("ring", one.ringed, 5.0)):
        for a, b in values:
            at = place(a, b)
            if at is not None and at[1] >= frame.top - 0.1:
                body.append(f'<circle class="{kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}"/>')
    for a, why in one.crosses:
        if x.shows(a):
            across, down = frame.x(a), frame.top + 5
            body.append(f'<path class="cross" d="M{across - 3.5:.1f} {down - 3.5:.1f}l7 7m0 -7l-7 7"/>')
            tips.append((across, down, f"{why}, {x.told(a)} {x.label}"))
    last = next((at for at in reversed(line) if at is not None), None)
    return (
        _group(one.style, "".join(body), one.name, tips, one.muted),
        None if last is None else (last[0], max(last[1], frame.top)),
    )


# ---- points


@dataclass(frozen=True, eq=False)
class Point:
    x: float
    y: float
    text: str
    weight: float = 0.0  # the heavier half is drawn larger
    tip: str = ""  # '': the text
    label: str = ""  # '': the text


def scatter(
    label: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    name: str = "",
    style: int = 1,
    size: Pixel = (190, 190),
    texts: int = 8,
    equal: bool = True,
) -> str:
    """Points with texts in tips, beside up to `texts` of the heaviest where there is most room; '' without points.

    Args:
        equal: one unit is as long on both axes, as the distances of a projection need.
    """
    points = [point for point in points if x.shows(point.x) and y.shows(point.y)]
    if not points:
        return ""
    frame = _frame([p.x for p in points], [p.y for p in points], x, y, size, 8)
    if equal:
        frame = _equal(frame, points)
    at = {id(point): frame.at(point.x, point.y) for point in points}
    heavy = sorted(points, key=lambda point: -point.weight)
    halves = (heavy[: len(heavy) // 2], heavy[len(heavy) // 2 :])
    body = [
        f'<path class="points {kind}" d="{"".join(f"M{at[id(p)][0]:.1f} {at[id(p)][1]:.1f}h0" for p in half)}"/>'
        for kind, half in zip(("heavy", "light"), halves, strict=True)
        if half
    ]
    taken: list[Box] = []
    named: set[int] = set()
    spots = [spot for point in heavy[: 5 * texts] for spot in _spots(point, at[id(point)], frame)]
    for spot in sorted(spots, key=lambda spot: sum(_overlap(spot.box, (*place, *place)) for place in at.values())):
        if len(taken) < texts and spot.whose not in named and not any(_overlap(spot.box, other) for other in taken):
            taken.append(spot.box)
            named.add(spot.whose)
            body.append(spot.drawn)
    tips = [(*at[id(point)], point.tip or point.text) for point in points]
    return _svg(size, label, _axes(frame, x, y) + _group(style, "".join(body), name, tips))


class _Spot(NamedTuple):
    """Where the text of a point could be."""

    box: Box
    drawn: str
    whose: int


def _spots(point: Point, at: Pixel, frame: Frame) -> list[_Spot]:
    """To the right and to the left of a point, where that is within the frame."""
    text = (point.label or point.text)[:12]
    width = 7.4 * len(text)
    found = []
    for x, left, anchor in ((at[0] + 5, at[0] + 5, "start"), (at[0] - 5, at[0] - 5 - width, "end")):
        box = (left, at[1] - 6.0, left + width, at[1] + 6.0)
        if text and left > 2 and box[2] < frame.width:
            found.append(_Spot(box, _text(x, at[1] + 4, text, "label", anchor), id(point)))
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _equal(frame: Frame, points: Sequence[Point]) -> Frame:
    """The same frame with both scales linear, alike and centred on the points, with a margin."""
    middles, spans = [], []
    for values, pixels in (
        ([p.x for p in points], frame.right - frame.left),
        ([p.y for p in points], frame.bottom - frame.top),
    ):
        middles.append((min(values) + max(values)) / 2)
        spans.append((max(values) - min(values)) / pixels)
    unit = (max(spans) or 1.0) * 1.08
    half_x, half_y = unit * (frame.right - frame.left) / 2, unit * (frame.bottom - frame.top) / 2
    across = Scale(middles[0] - half_x, middles[0] + half_x, frame.left, frame.right, False)
    down = Scale(middles[1] - half_y, middles[1] + half_y, frame.bottom, frame.top, False)
    return Frame(frame.width, frame.height, frame.left, frame.top, frame.right, frame.bottom, across, down)


# ---- radar


@dataclass(frozen=True)
class Outline:
    name: str
    values: Sequence[float | None]  # 0 at the centre, 1 at the rim; None: not known
    style: int
    tips: Sequence[str] = ()  # one for each value
    muted: bool = False


def radar(label: str, axes: Sequence[str], outlines: Sequence[Outline], *, size: Pixel = (150, 142)) -> str:
    """Outlines over three or more axes, the first one up; a corner that is not known is left out."""
    width, height = size
    turns = [-math.pi / 2 + 2 * math.pi * place / len(axes) for place in range(len(axes))]
    tall, wide = (max(f(t) for t in turns) - min(f(t) for t in turns) for f in (math.sin, math.cos))
    reach = min((height - 38) / tall, (width - 12) / wide)
    centre = (width / 2, 19 + reach)

    def at(place: int, share: float) -> Pixel:
        return centre[0] + reach * share * math.cos(turns[place]), centre[1] + reach * share * math.sin(turns[place])

    parts = []
    for ring in (0.25, 0.5, 0.75, 1.0):
        corners = [at(place, ring) for place in range(len(axes))]
        parts.append(f'<path class="{"axis" if ring == 1 else "rule"}" d="{_path(corners)}Z"/>')
    for place, name in enumerate(axes):
        x, y = at(place, 1.0)
        parts.append(f'<path class="rule" d="{_path([centre, (x, y)])}"/>')
        side = math.cos(turns[place])
        if abs(side) < 0.1:
            parts.append(_text(x, y - 5 if y < centre[1] else y + 14, name, "tick", "middle"))
        else:
            parts.append(
                _text(
                    width if side > 0 else 0,
                    y + (15 if y > centre[1] else -6),
                    name,
                    "tick",
                    "end" if side > 0 else "start",
                )
            )
    for one in outlines:
        corners, tips = [], []
        for place, value in enumerate(one.values):
            if value is not None:
                corners.append(at(place, value))
                tips.append((*corners[-1], one.tips[place] if one.tips else f"{axes[place]} {value:.2f}"))
        dots = (
            "" if one.muted else "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in corners)
        )
        drawn = f'<path class="outline" d="{_path(corners)}Z"/>{dots}' if corners else ""
        parts.append(_group(one.style, drawn, one.name, tips, one.muted))
    return _svg(size, label, "".join(parts))


# ---- intervals


@dataclass(frozen=True)
class Interval:
    name: str
    style: int
    mean: float
    low: float | None
    high: float | None
    values: Sequence[float] = ()  # single values, beneath
    tip: str = ""


def intervals(label: str, rows: Sequence[Interval], x: Axis, *, at: float | None = None, width: float = 300) -> str:
    """Means with intervals, one row each; '' without rows. `at`: where a vertical line is drawn."""
    rows = [row for row in rows if x.shows(row.mean)]
    if not rows:
        return ""
    ends = [value for row in rows for value in (row.mean, row.low, row.high, *row.values) if value is not None]
    pitch, top = 19.0, 6.0
    left = 12.0 + BOLD * max(len(row.name) for row in rows)
    bottom = top + pitch * len(rows) + 4
    scale = x.scale([*ends, *([] if at is None else [at])], left + 6, width - 10)
    frame = Frame(width, bottom + 38, left, top, width - 8, bottom, scale, Scale(0, 1, bottom, top, False))
    parts = []
    for tick in _across_ticks(scale, x.form):
        parts.append(f'<path class="rule" d="M{scale(tick):.1f} {top}V{bottom:.1f}"/>')
    parts.append(_axes(frame, x, Axis("", ticks=False)))
    if at is not None:
        parts.append(f'<path class="limit" d="M{scale(at):.1f} {top}V{bottom:.1f}"/>')
    for place, row in enumerate(rows):
        y = top + pitch * (place + 0.5) + 2
        body = [_text(left - 4, y, row.name, "direct", "end")]
        if row.low is not None and row.high is not None:
            body.append(f'<path class="whisker" d="M{scale(row.low):.1f} {y:.1f}H{scale(row.high):.1f}"/>')
        body += [f'<circle class="faint" cx="{scale(v):.1f}" cy="{y:.1f}" r="1.8"/>' for v in row.values if x.shows(v)]
        body.append(f'<circle class="mean" cx="{scale(row.mean):.1f}" cy="{y:.1f}" r="2.7"/>')
        parts.append(_group(row.style, "".join(body), row.name, [(scale(row.mean), y, row.tip or x.told(row.mean))]))
    return _svg((width, bottom + 38), label, "".join(parts))
