"""Held-out and training loss against tokens, time and energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.lines import Rule, Series, line_chart
from pretrain.study.page.charts.numbers import known, precise, whole
from pretrain.study.page.sections.study import Figures, Study

MOST_POINTS = 100  # of a training curve

Curve = Sequence[Mapping[str, Any]]


def losses(study: Study) -> str:
    """Six plots: both losses against tokens, seconds and joules, with the reason where one has no data."""
    against = (
        ("tokens", "tokens", whole),
        ("seconds of training", "time", precise),
        ("joules", "energy", precise),
    )
    kinds = (
        ("eval_curve", "bits_per_byte", "bits/byte", "Validation loss", study.val_unigram),
        ("train_curve", "loss", "nats/token", "Training loss", study.unigram_nats),
    )
    figures = []
    for curve, value, unit, title, unigram in kinds:
        curves = [[Figures(point) for point in thinned(head.at(curve) or [])] for head in study.heads]
        for axis, short_name, form in against:
            key = axis.split()[0]
            series = study.series(
                [(point.figure(key) or math.nan, point.figure(value)) for point in points] for points in curves
            )
            low, high = _window(series, unigram)
            svg = ""
            if low is not None:
                svg = line_chart(
                    f"{title} in {unit} against {axis}, one line for each head",
                    series,
                    Axis(axis, log=True, told=form),
                    Axis(unit, low=low, high=high, told="{:.4f}".format),
                    size=(300, 240),
                    rules=[Rule(unigram, "token frequencies")] if unigram is not None else [],
                )
            missing = study.no_energy if key == "joules" else f"No run recorded its {title.lower()} against {axis}."
            figures.append(layout.figure(svg, f"{title} against {short_name}", missing))
    steps = [len(head.at("train_curve") or []) for head in study.heads]
    stretch = math.ceil(max(steps, default=0) / MOST_POINTS)
    smooth = f" Each point of a training curve is the mean of {stretch} records or fewer." if stretch > 1 else ""
    return layout.soft(
        "The chosen setting, first fresh seed; validation is on the split that chose. The upper edge is near the loss "
        "of a model that only knows how frequent each token is; what lies above it, as early in training, is cut "
        f"off.{smooth} Tokens, seconds and joules are on logarithmic scales."
    ) + layout.grid(figures)


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most so many points: each the mean loss of a stretch of records, where the stretch ends."""
    if len(curve) <= most:
        return curve
    points = []
    for place in range(most):
        stretch = curve[place * len(curve) // most : (place + 1) * len(curve) // most]
        values = [loss for record in stretch if (loss := Figures(record).figure("loss")) is not None]
        points.append({**stretch[-1], "loss": fmean(values) if len(values) == len(stretch) else None})
    return points


def _window(series: Sequence[Series], unigram: float | None) -> tuple[float | None, float | None]:
    """Limits of an axis of losses: from the lowest to the highest end of a line, at least to the unigram model and at
    most 15% above it.
    """
    lines = [[y for x, y in line.points if y is not None and known(x)] for line in series]
    lines = [line for line in lines if line]
    if not lines:
        return None, None
    low, high = min(min(line) for line in lines), max(line[-1] for line in lines)
    high = max(max(line) for line in lines) if unigram is None else min(max(high, unigram), 1.15 * unigram)
    room = 0.06 * abs(high - low) or 0.1
    return low - room, max(high, low) + room
