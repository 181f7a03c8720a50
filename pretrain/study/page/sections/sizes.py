"""Differences to the baseline size by size, and how they change with it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.lines import Rule, Series, line_chart
from pretrain.study.page.layout import MINUS, NONE, small, written
from pretrain.study.page.sections.study import Figures, Head, Study, verdict


def sizes(study: Study) -> str:
    """A plot of differences by parameters where there are sizes, and a table of all of them."""
    columns = [
        f"{size.text('name')}<small>{size.text('model', 'parameters')} parameters, {size.text('budget', 'tokens')} "
        f"tokens; could have shown {size.text('smallest_difference', form='{:.4f}')}</small>"
        for size in study.sizes
    ]
    slope = "for each tenfold of the parameters<small>95%</small>"
    others = [head for head in study.heads if not head.is_baseline]
    table = layout.table(
        f"Differences to {study.baseline} by size",
        ("head", *columns, slope),
        [[layout.named(head.style, head.name), *_cells(study, head), _trend(head)] for head in others],
    )
    intro = layout.soft(
        f"Test bits/byte less {study.baseline}'s: the mean, its 95% interval over seeds and documents, the interval "
        "corrected for all heads of that size, and the corrected p. Settings were tuned at the first size alone and "
        "carried over. Could have shown: the smallest difference that is found with probability "
        f"{study.text('protocol', 'power')} at that size, in the median over heads."
    )
    return intro + (layout.grid([_plot(study)], "pair") if len(study.sizes) > 1 else "") + table


def _of(size: Figures, head: Head) -> Figures:
    """A head's difference at a size."""
    found: Mapping[str, Any] = next((one for one in size.at("heads") or [] if one.get("name") == head.name), {})
    return Figures(found.get("difference"))


def _cells(study: Study, head: Head) -> list[str]:
    cells = []
    for size in study.sizes:
        gap = _of(size, head)
        if gap.figure("mean") is None:
            cells.append(NONE)
            continue
        cells.append(gap.text("mean", form="{:+.4f}") + tag(study, gap) + small(gap.bounds("{:+.4f}")) + corrected(gap))
    return cells


def tag(study: Study, gap: Figures) -> str:
    """A word on a difference; none in a study that is not settled."""
    word = verdict(gap.tree) if study.settled else None
    kind = word if word in ("better", "worse") else ""
    return f' <span class="tag {kind}">{word}</span>' if word else ""


def corrected(gap: Figures) -> str:
    """The corrected interval and both p-values, beneath a difference."""
    bounds = gap.bounds("{:+.4f}", "corrected_")
    return small(f"corrected {bounds}" if bounds else "no interval") + small(
        f"p {gap.text('p', form='{:.2g}')}, corrected {gap.text('corrected_p', form='{:.2g}')}"
    )


def _trend(head: Head) -> str:
    trend = Figures(head.at("trend"))
    if trend.figure("mean") is None:
        return '<span class="soft wrap">needs three sizes</span>'
    return trend.text("mean", form="{:+.4f}") + small(trend.bounds("{:+.4f}")) + corrected(trend)


def _plot(study: Study) -> str:
    series = []
    for head in study.heads:
        points, band = [], []
        for size in study.sizes:
            gap, parameters = _of(size, head), size.figure("model", "parameters")
            mean, low, high = gap.figure("mean"), gap.figure("low"), gap.figure("high")
            if parameters is None or mean is None:
                continue
            points.append((parameters, mean))
            if low is not None and high is not None:
                band.append((parameters, low, high))
        series.append(Series(head.name, points, head.style, band=band, dots=points))
    svg = line_chart(
        f"Difference in test bits per byte to {study.baseline} against parameters, one line for each head",
        series,
        Axis("parameters", log=True),
        Axis("bits/byte", form=lambda value: written(value, "{:.3g}").replace("-", MINUS), told="{:+.4f}".format),
        size=(300, 240),
        rules=[Rule(0.0, study.baseline, left=True)],
    )
    title = f"Difference to {escape(study.baseline)} <small>below the line is better; band: 95% interval</small>"
    return layout.figure(svg, title, f"No head has a difference to {study.baseline}.")
