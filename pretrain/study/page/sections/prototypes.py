"""How the prototypes lie: their variance, their projections and their lengths."""

from __future__ import annotations

from pretrain.analysis.scoring import UNIGRAM_TOKENS
from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.lines import Rule, Series, line_chart
from pretrain.study.page.charts.numbers import known, percent, short, whole
from pretrain.study.page.charts.points import Point, scatter
from pretrain.study.page.layout import written
from pretrain.study.page.sections.study import Figures, Head, Study

SHARE_90 = 0.9
MARKS = {"\n": "⏎", "\t": "⇥", " ": "␣", "▁": "␣", "\r": "␍"}  # of blanks in a token's text


def variances(study: Study) -> str:
    """A plot for each head: cumulative shares of the variance by number of components."""
    lines = [
        [(rank, share) for rank, share in enumerate(head.at("scree") or [], start=1) if known(share)]
        for head in study.heads
    ]
    most = max(map(len, lines), default=0)
    figures = []
    for head, line in zip(study.heads, lines, strict=True):
        svg = ""
        if line:
            first = [(rank, share) for rank, share in line if share >= SHARE_90][:1]
            svg = line_chart(
                f"{head.name}: cumulative share of the variance of the prototypes by number of components",
                [*study.beneath(head, lines[0]), Series(head.name, line, head.style, ringed=first)],
                Axis("components", log=True, low=1, high=most, told="{:.0f}".format),
                Axis("share of variance", low=0.0, high=1.0, form=percent, told=percent),
                size=(150, 140),
                direct=False,
                rules=[Rule(SHARE_90, "90%", left=True)],
            )
        needed = head.figure("pca90")
        figures.append(head.card(svg, f"PCA90 {needed:.4g}" if line and needed is not None else ""))
    return layout.soft(
        "Share of the variance of the prototypes that their first principal components hold together. "
        "A line that rises early lies in few directions. Ring: where 90% is reached in this run; grey: "
        f"{study.baseline}; PCA90 in the heading is the mean over seeds."
    ) + layout.grid(figures, "duo")


def shown(text: str) -> str:
    """A token's text with its blanks and control characters made visible."""
    return "".join(MARKS.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text) or "(empty)"


def projections(study: Study) -> str:
    """A plot for each head: frequent tokens on two principal components."""
    return layout.soft(
        "Prototypes of frequent tokens on the first two principal components of all prototypes, first "
        "seed; in brackets, the share of the variance along each axis: what is left out is the rest. Larger points: "
        "the more frequent half; some are named where there is room. Point at one, or tap, for its token (␣ blank, "
        f"⏎ new line), and how often it is among the first {short(UNIGRAM_TOKENS)} tokens of training. Directions, "
        "signs and units differ from head to head."
    ) + layout.grid((head.card(_projection(head)) for head in study.heads), "small")


def _projection(head: Head) -> str:
    points = []
    for x, y, text, count in head.at("projection", "points") or []:
        if known(x) and known(y):
            token = shown(str(text))
            tip = f"“{token}”\n{written(count)} times in training"
            points.append(Point(x, y, token, count or 0, tip, token.lstrip("␣")))
    first, second = [*(head.at("projection", "explained") or []), None, None][:2]
    shares = [percent(share) if known(share) else "share not known" for share in (first, second)]
    return scatter(
        f"{head.name}: {len(points)} prototypes on their first two principal components",
        points,
        Axis(f"component 1 ({shares[0]})", ticks=False),
        Axis(f"component 2 ({shares[1]})", ticks=False),
        name=head.name,
        style=head.style,
    )


def lengths(study: Study) -> str:
    """Two plots over training, of all heads: the median length, and the longest over it."""
    figures = []
    for key, name, title in (
        ("median", "median length", "Median length"),
        ("max/median", "longest / median", "Longest over median"),
    ):
        series = study.series(_by_step(head, key) for head in study.heads)
        values = [y for line in series for _, y in line.points if y is not None and y > 0]
        wide = bool(values) and max(values) > 12 * min(values)
        svg = line_chart(
            f"{title} of the prototypes against steps, one line for each head",
            series,
            Axis("steps", low=0.0, told=whole),
            Axis(name, log=wide),
            size=(300, 220),
        )
        scale = "logarithmic scale" if wide else "linear scale"
        figures.append(layout.figure(svg, f"{title} <small>{scale}</small>", "Not measured."))
    return layout.soft(
        "Euclidean lengths of the prototypes as trained, first seed. A ratio that keeps growing says "
        "that few tokens run away from the rest."
    ) + layout.grid(figures, "pair")


def _by_step(head: Head, key: str) -> list[tuple[float, float | None]]:
    return sorted((float(step), Figures(norms).figure(key)) for step, norms in (head.at("norms") or {}).items())
