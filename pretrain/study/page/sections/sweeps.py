"""Held-out loss by learning rate, head by head."""

from __future__ import annotations

from collections import Counter, defaultdict
from statistics import fmean

from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.lines import Series, line_chart
from pretrain.study.page.charts.numbers import known
from pretrain.study.page.layout import NONE
from pretrain.study.page.sections.study import Figures, Head, Study


def rate_text(value: float | None) -> str:
    """A learning rate: 3e-4."""
    return NONE if value is None else f"{value:.4g}".replace("e-0", "e-")


def sweeps(study: Study) -> str:
    """A plot for each head: held-out loss by rate, all on one scale."""
    rates = [rate for rate in study.rates if known(rate)]
    lines = [_by_rate(head) for head in study.heads]
    values = [value for line in lines for _, value in line]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if study.unigram is not None and high > study.unigram > low:
        high = study.unigram
    room = 0.08 * (high - low) or 0.1
    figures = []
    for head, line in zip(study.heads, lines, strict=True):
        rate = head.figure("lr")
        ringed = [point for point in line if point[0] == head.at("lr")]
        own = Series(head.name, line, head.style, dots=_runs(head), ringed=ringed, crosses=_lost(head))
        svg = line_chart(
            f"{head.name}: held-out bits per byte by learning rate",
            [*study.beneath(head, lines[0]), own] if head.sweep else [],
            Axis("learning rate", True, min(rates, default=None), max(rates, default=None), rate_text, rate_text),
            Axis("bits/byte", low=low - room, high=high + room, told="{:.4f}".format),
            size=(150, 140),
            direct=False,
        )
        chosen = f"chosen {rate_text(rate)}" + (", at the edge" if head.at_edge else "")
        figures.append(head.card(svg, "none chosen" if rate is None else chosen, "No run was started."))
    return layout.soft(
        "Held-out bits/byte by learning rate, all on the same scale. Dots: runs; line: mean over the "
        "seeds that finished; ring: chosen; cross: runs that diverged or failed there; grey: "
        f"{study.baseline}. What lies above the upper edge, which is at most the loss of token "
        "frequencies, is cut off."
    ) + layout.grid(figures, "duo")


def _runs(head: Head) -> list[tuple[float, float | None]]:
    """Rates and losses of the runs that are done."""
    done = [entry for entry in head.sweep if entry.get("outcome") == "done"]
    return [(entry["lr"], Figures(entry).figure("bits_per_byte")) for entry in done]


def _by_rate(head: Head) -> list[tuple[float, float]]:
    """Their means."""
    losses = defaultdict(list)
    for rate, loss in _runs(head):
        if loss is not None:
            losses[rate].append(loss)
    return [(rate, fmean(values)) for rate, values in sorted(losses.items())]


def _lost(head: Head) -> list[tuple[float, str]]:
    """Rates of the runs that are not done, and what became of them."""
    outcomes: dict[float, Counter[str]] = defaultdict(Counter)
    for entry in head.sweep:
        if entry.get("outcome") != "done":
            outcomes[entry["lr"]][str(entry.get("outcome"))] += 1
    return [
        (rate, ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
        for rate, counts in outcomes.items()
    ]
