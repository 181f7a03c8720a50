"""The SVG text that plots are made of; a plot is a string that goes into HTML as it is, every text in it escaped here.

Colours and dashes come from the page's style sheet by a number (`style`; 0 is the baseline), and `data-k` carries the
same number, by which a page may hide a series. `data-tips` holds [x, y, text] in the units of the plot, for the page's
script to show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

STYLES = 9  # besides the baseline's; more series take the same again
LINE = 13.0  # least distance of two lines of text, in units of the plot
DIGIT = 6.6  # width of a figure
BOLD = 7.1  # mean width of a bold letter, in a wide font

Pixel = tuple[float, float]
Tip = tuple[float, float, str]  # where, and the text


def plot(size: Pixel, label: str, body: str) -> str:
    """The whole; `label` is what a reader who does not see it is told."""
    width, height = size
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" style="--w:{width:g}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def words(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    """A text with its `anchor` (start, middle or end) at x and its baseline at y."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def path(kind: str, course: str) -> str:
    """A line or an area by its path data."""
    return f'<path class="{kind}" d="{course}"/>'


def circle(kind: str, at: Pixel, radius: float) -> str:
    """A disc or a ring, by the sheet's class `kind`."""
    return f'<circle class="{kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}"/>'


def through(points: Sequence[Pixel]) -> str:
    """Path data of straight lines from point to point."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def style_class(style: int) -> str:
    """The style sheet's class of a number."""
    return f"k{0 if style == 0 else (style - 1) % STYLES + 1}"


def group(style: int, body: str, name: str = "", tips: Iterable[Tip] = (), muted: bool = False) -> str:
    """What is drawn of one series, and its tips; what is muted has none."""
    kind = style_class(style) + (" muted" if muted else "")
    data = "" if muted else f' data-name="{escape(name)}" {_tips(tips)}'
    return f'<g class="{kind}" data-k="{style}"{data}>{body}</g>'


def _tips(tips: Iterable[Tip]) -> str:
    """An attribute; in single quotes, since JSON has many double ones."""
    points = [[round(x, 1), round(y, 1), text] for x, y, text in tips]
    value = json.dumps(points, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return "data-tips='" + value.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;") + "'"
