"""Quality, interpretability and sustainability of each head, on absolute scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from pretrain.study.page import layout
from pretrain.study.page.charts.numbers import precise, short
from pretrain.study.page.charts.radar import Outline, radar
from pretrain.study.page.layout import NONE
from pretrain.study.page.sections.study import Head, Study

# Worth at the centre, worth at the rim; logarithmic.
J_PER_TOKEN = (1.0, 1e-6)
SECONDS_PER_TOKEN = (1e-1, 1e-6)


class Corner(NamedTuple):
    """One axis of a head's radar."""

    axis: str
    share: float | None  # 0 at the centre, 1 at the rim, not clipped; None: not known
    source: str  # the figure it comes from, in words

    @property
    def clipped(self) -> float | None:
        """The share as it is drawn, within 0..1."""
        return None if self.share is None else min(max(self.share, 0.0), 1.0)

    @property
    def is_off(self) -> bool:
        """Whether the scale is too short for it; the page then names it."""
        return self.share != self.clipped

    def __str__(self) -> str:
        return f"{self.axis} {_rounded(self.share)}"

    def tip(self) -> str:
        """What pointing at it tells."""
        return f"{self.axis} {_rounded(self.clipped)} ({self.source})"

    def row(self) -> str:
        """Of the table beneath the radar."""
        share = _rounded(self.clipped) + (" (clipped)" if self.is_off else "")
        return f'<tr title="{escape(self.source)}"><th scope="row">{self.axis}</th><td>{share}</td></tr>'


def _rounded(share: float | None) -> str:
    return NONE if share is None else f"{share:.2f}"


def _corners(study: Study, head: Head) -> list[Corner]:
    bits, pca90, width = head.bits.figure("mean"), head.figure("pca90"), study.figure("model", "dim")
    third, key, scale, unit = ("sustainability", "j_per_token", J_PER_TOKEN, "J/token")
    if not study.has_energy:
        third, key, scale, unit = ("time", "seconds_per_token", SECONDS_PER_TOKEN, "s/token")
    spent = head.figure(key)
    of_width = f" of {width:g}" if width else ""
    quality = None if bits is None or not study.unigram else 1 - bits / study.unigram
    interpretability = None if pca90 is None or not width else 1 - pca90 / width
    return [
        Corner(third, _log_share(spent, scale) if spent else None, f"{precise(spent)} {unit}" if spent else NONE),
        Corner("quality", quality, NONE if bits is None else f"{bits:.4f} bits/byte"),
        Corner("interpretability", interpretability, NONE if pca90 is None else f"PCA90 {pca90:.4g}{of_width}"),
    ]


def _log_share(value: float, scale: tuple[float, float]) -> float:
    centre, rim = scale
    return math.log(value / centre) / math.log(rim / centre)


def radars(study: Study) -> str:
    """A radar and its table for each head, and what was clipped."""
    corners = {head.style: _corners(study, head) for head in study.heads}

    def outline(head: Head, muted: bool = False) -> Outline:
        tips = [corner.tip() for corner in corners[head.style]]
        return Outline(head.name, [corner.clipped for corner in corners[head.style]], head.style, tips, muted)

    figures = []
    for head in study.heads:
        own, svg = corners[head.style], ""
        if any(corner.share is not None for corner in own):
            beneath = [outline(study.heads[0], muted=True)] if study.has_baseline and head.style else []
            label = f"{head.name}: {', '.join(map(str, own))}"
            svg = radar(label, [corner.axis for corner in own], [*beneath, outline(head)])
        below = f'<table class="values"><tbody>{"".join(corner.row() for corner in own)}</tbody></table>'
        figures.append(head.card(svg, missing=f"{head.no_result.capitalize()}.", below=below))
    clipped = [f"{head.name}, {corner.axis}" for head in study.heads for corner in corners[head.style] if corner.is_off]
    return _explanation(study, clipped) + layout.grid(figures, "duo")


def _explanation(study: Study, clipped: Sequence[str]) -> str:
    centre, rim = (short(value) for value in (J_PER_TOKEN if study.has_energy else SECONDS_PER_TOKEN))
    if study.has_energy:
        third = (
            f"Sustainability is the energy per token of training, logarithmic: {centre} J at the centre, {rim} J at "
            "the rim."
        )
    else:
        third = (
            "Energy was not measured for every head, so the third axis is time, which is no measure of energy: seconds "
            f"of training per token, logarithmic, {centre} s at the centre, {rim} s at the rim."
        )
    width = study.figure("model", "dim")
    lines = [
        "Each axis is absolute: it does not depend on the heads that are compared. Outward is better. The dashed "
        f"outline is {study.baseline}.",
        "Quality is 1 less bits/byte over the bits/byte of token frequencies"
        + (f" ({study.unigram:.4f})" if study.unigram is not None else " (not known)")
        + ": 0, the centre, is no better than token frequencies; 1, the rim, predicts every byte.",
        "Interpretability is 1 less PCA90 over the width"
        + (f" ({width:g})" if width is not None else "")
        + ": 0, the centre, needs all directions. It is one narrow sense of the word.",
        third,
        f"Clipped to the scale: {'; '.join(clipped)}." if clipped else "No value had to be clipped to these scales.",
    ]
    return layout.findings(map(escape, lines), "findings soft")
