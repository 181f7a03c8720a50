"""Points in a plane, some of them named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pretrain.study.page.charts.axes import Axis, Frame, Scale, axes, frame_of
from pretrain.study.page.charts.svg import Pixel, group, path, plot, words

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Point:
    """A place in units of the axes, and its texts."""

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
) -> str:
    """Points with texts in tips, beside up to `texts` of the heaviest where there is most room; '' without points.

    One unit is as long on both axes, as the distances of a projection need.
    """
    points = [point for point in points if x.shows(point.x) and y.shows(point.y)]
    if not points:
        return ""
    frame = _equal(frame_of([p.x for p in points], [p.y for p in points], x, y, size, 8), points)
    at = {point: frame.at(point.x, point.y) for point in points}
    heavy = sorted(points, key=lambda point: -point.weight)
    halves = (heavy[: len(heavy) // 2], heavy[len(heavy) // 2 :])
    body = [
        path(f"points {kind}", "".join(f"M{at[p][0]:.1f} {at[p][1]:.1f}h0" for p in half))
        for kind, half in zip(("heavy", "light"), halves, strict=True)
        if half
    ]
    taken: list[Box] = []
    named: set[Point] = set()
    spots = [spot for point in heavy[: 5 * texts] for spot in _spots(point, at[point], frame)]
    for spot in sorted(spots, key=lambda spot: sum(_overlap(spot.box, (*place, *place)) for place in at.values())):
        if len(taken) < texts and spot.point not in named and not any(_overlap(spot.box, other) for other in taken):
            taken.append(spot.box)
            named.add(spot.point)
            body.append(spot.drawn)
    tips = [(*at[point], point.tip or point.text) for point in points]
    return plot(size, label, axes(frame, x, y) + group(style, "".join(body), name, tips))


class _Spot(NamedTuple):
    """Where the text of a point could be."""

    box: Box
    drawn: str
    point: Point


def _spots(point: Point, at: Pixel, frame: Frame) -> list[_Spot]:
    """To the right and to the left of a point, where that is within the frame."""
    text = (point.label or point.text)[:12]
    width = 7.4 * len(text)
    spots = []
    for x, left, anchor in ((at[0] + 5, at[0] + 5, "start"), (at[0] - 5, at[0] - 5 - width, "end")):
        box = (left, at[1] - 6.0, left + width, at[1] + 6.0)
        if text and left > 2 and box[2] < frame.width:
            spots.append(_Spot(box, words(x, at[1] + 4, text, "label", anchor), point))
    return spots


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _equal(frame: Frame, points: Sequence[Point]) -> Frame:
    """The same frame with both scales linear, alike and centred on the points, with a margin."""
    across, down = frame.right - frame.left, frame.bottom - frame.top
    xs, ys = [point.x for point in points], [point.y for point in points]
    unit = (max((max(xs) - min(xs)) / across, (max(ys) - min(ys)) / down) or 1.0) * 1.08
    middle_x, middle_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    half_x, half_y = unit * across / 2, unit * down / 2
    return replace(
        frame,
        x=Scale(middle_x - half_x, middle_x + half_x, frame.left, frame.right),
        y=Scale(middle_y - half_y, middle_y + half_y, frame.bottom, frame.top),
    )
