"""Outlines over three or more axes that start from one centre."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.study.page.charts.svg import Pixel, circle, group, path, plot, through, words


@dataclass(frozen=True)
class Outline:
    """What is drawn of one head."""

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
        rim = through([at(place, ring) for place in range(len(axes))])
        parts.append(path("axis" if ring == 1 else "rule", f"{rim}Z"))
    for place, name in enumerate(axes):
        x, y = at(place, 1.0)
        parts.append(path("rule", through([centre, (x, y)])))
        side = math.cos(turns[place])
        if abs(side) < 0.1:
            parts.append(words(x, y - 5 if y < centre[1] else y + 14, name, "tick", "middle"))
        else:
            edge, anchor = (width, "end") if side > 0 else (0, "start")
            parts.append(words(edge, y + (15 if y > centre[1] else -6), name, "tick", anchor))
    for outline in outlines:
        known = {place: value for place, value in enumerate(outline.values) if value is not None}
        corners = {place: at(place, value) for place, value in known.items()}
        tips = [
            (*corners[place], outline.tips[place] if outline.tips else f"{axes[place]} {value:.2f}")
            for place, value in known.items()
        ]
        dots = "" if outline.muted else "".join(circle("dot", corner, 2.4) for corner in corners.values())
        drawn = path("outline", f"{through(list(corners.values()))}Z") + dots if corners else ""
        parts.append(group(outline.style, drawn, outline.name, tips, outline.muted))
    return plot(size, label, "".join(parts))
