"""What was tried: bits/byte of the trials by each setting that was tuned, with the chosen ones."""

from __future__ import annotations

from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.lines import Series, line_chart
from pretrain.study.page.charts.numbers import percent, short
from pretrain.study.page.sections.study import Figures, Head, Study


def trials(study: Study) -> str:
    """A plot for each setting: every trial of every head after the first rung, on one scale."""
    values = [value for head in study.heads for trial in _first(head) if (value := _bits(trial)) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if study.val_unigram is not None and high > study.val_unigram > low:
        high = study.val_unigram
    room = 0.08 * (high - low) or 0.1
    figures = []
    for name, entry in ((name, Figures(one)) for name, one in study.space.items()):
        about = str(entry.at("about") or name)
        log = all(entry.figure(end) is not None for end in ("low", "high"))
        form = percent if name == "warmup" else short
        svg = line_chart(
            f"validation bits per byte of the trials by {about}",
            [_series(head, name) for head in study.heads],
            Axis(about.partition(",")[0], log=log, form=form, told=form),
            Axis("bits/byte", low=low - room, high=high + room, told="{:.4f}".format),
            size=(300, 220),
            direct=False,
        )
        figures.append(layout.figure(svg, f"{name} <small>{about}</small>", "No trial has ended."))
    steps = next(iter(study.at("protocol", "steps") or []), None)
    length = f" of {steps:,} steps" if isinstance(steps, int) else ""
    return layout.soft(
        f"Bits/byte of the validation split after the first rung{length}, of every trial. The settings of a trial are "
        "those of the same trial of all other heads. Ring: the chosen trial, which later rungs decided on; cross: "
        "diverged. All settings differ at once between trials, so a plot shows one of many differences. What lies "
        "above the upper edge, which is at most the loss of token frequencies, is cut off."
    ) + layout.grid(figures, "pair")


def _first(head: Head) -> list[Figures]:
    """The trials of the first rung."""
    return [Figures(trial) for trial in head.trials if not trial.get("rung")]


def _bits(trial: Figures) -> float | None:
    return trial.figure("bits_per_byte") if trial.at("outcome") == "done" else None


def _series(head: Head, name: str) -> Series:
    chosen = head.at("chosen", "trial")
    at = [(place, trial) for trial in _first(head) if (place := trial.figure("setting", name)) is not None]
    return Series(
        head.name,
        [],
        head.style,
        dots=[(place, _bits(trial)) for place, trial in at],
        ringed=[(place, _bits(trial)) for place, trial in at if chosen is not None and trial.at("trial") == chosen],
        crosses=[(place, "diverged") for place, trial in at if trial.at("outcome") == "diverged"],
    )
