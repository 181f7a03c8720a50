"""The page of an algorithmic study: one HTML file from its results.json, without any request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from pretrain.study.algorithmic_results import ENOUGH
from pretrain.study.page import layout
from pretrain.study.page.charts.axes import (
    Axis,
    Interval,
    Rule,
    Series,
    intervals,
    line_chart,
    percent,
)
from pretrain.study.page.layout import written
from pretrain.study.tasks import TASKS

SIZE = (300, 230)
NARROW = 190.0
ROOM = 1.6  # above the last epoch, for crosses
MEASURES = (  # at the largest share: of a cell, heading, of what, unit, form
    ("test_accuracy", "Accuracy", "test examples", "share of examples", percent),
    ("prototypes_explained", "Two components", "prototypes", "share of variance", percent),
    ("embedding_explained", "Two components", "embeddings", "share of variance", percent),
    ("prototypes_crystal", "Crystal", "prototypes", "score", "{:.2f}".format),
    ("embedding_crystal", "Crystal", "embeddings", "score", "{:.2f}".format),
)

Entry = Mapping[str, Any]


def page(results: Mapping[str, Any]) -> str:
    """The HTML of a study. `results`: as in its results.json."""
    study = _Study(results)
    places = {"results": "Results", **{task: study.name_of(task) for task in study.tasks}, "methods": "Methods"}
    parts = [
        _opening(study),
        layout.contents(places),
        _facts(study),
        layout.section("results", "What came out", _comparison(study) + _data_needed(study)),
        layout.toggles("Choose the heads that the plots show", study.heads),
        *(layout.section(task, study.name_of(task), _task(study, task)) for task in study.tasks),
        layout.section("methods", "How it was done", _methods(study)),
        f"<footer>{len(study.cells)} cells, each of them counted. This file needs no network.</footer>",
    ]
    return layout.document(study.title, "\n".join(parts), len(study.heads))


class _Study:
    """The results, and what several sections ask of them. The baseline comes first and has style 0."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.config: Entry = results["config"]
        self.title = str(self.config["title"])
        self.baseline = str(self.config["baseline"])
        self.heads = sorted(self.config["heads"], key=lambda head: head != self.baseline)
        self.tasks = [str(task) for task in self.config["tasks"]]
        self.networks = [str(network["kind"]) for network in self.config["networks"]]
        self.cells: Sequence[Entry] = results["cells"]
        self.summary = {(one["task"], one["network"], one["head"]): one for one in results["summary"]}
        self.comparison = {(one["network"], one["head"]): one for one in results["comparison"]}

    @staticmethod
    def name_of(task: str) -> str:
        return task.replace("_", " ").capitalize()

    def of(self, task: str, network: str, head: str, fraction: float) -> list[Entry]:
        """The cells, one for each seed."""
        wanted = task, network, head, fraction
        return [one for one in self.cells if (one["task"], one["network"], one["head"], one["fraction"]) == wanted]

    def named(self, head: str, more: str = "") -> str:
        return layout.named(self.heads.index(head), head, escape(more))

    def rows(self) -> Iterable[tuple[str, str]]:
        """Networks and heads, in the order of tables."""
        return ((network, head) for network in self.networks for head in self.heads)


# ---- opening and overview


def _opening(study: _Study) -> str:
    told = (
        f"{len(study.heads)} output heads on {len(study.tasks)} tasks whose answers have a known structure: from which "
        "share of all examples does a small network come to answer the rest, in how many epochs, and how do its "
        "prototypes lie then?"
    )
    return layout.opening(study.title, told)


def _facts(study: _Study) -> str:
    config = study.config
    seeds, choice = config["seeds"], config["choice"]
    tried = ", ".join(f"({one['lr']:g}, {one['weight_decay']:g})" for one in choice["candidates"])
    shapes = [", ".join(f"{key} {value}" for key, value in one.items()) for one in config["networks"]]
    chosen = f"on seeds {', '.join(map(str, choice['seeds']))}" if choice["seeds"] else "given"
    return layout.facts(
        [
            ("Cells", f"{len(study.cells):,}", "one task, network, head, share of the examples and seed each"),
            ("Seeds", str(len(seeds)), escape(", ".join(map(str, seeds)))),
            ("Width", written(config["dim"]), "of embeddings, features and prototypes"),
            ("Networks", str(len(shapes)), escape("; ".join(shapes).replace("kind ", ""))),
            ("Rate, weight decay", escape(tried), f"{chosen}, for each task, network and head"),
            ("Versions", f"torch {written(study.results['torch'])}", written(study.results["machine"])),
        ]
    )


def _comparison(study: _Study) -> str:
    base = escape(study.baseline)
    columns = (
        "head",
        "cells that generalise",
        "of them lost again<small>by the last epoch</small>",
        f"needs less data<small>than {base}, tasks</small>",
        f"more data<small>than {base}, tasks</small>",
        f"generalises where<small>{base} does not</small>",
        f"only {base}<small>generalises</small>",
        f"both: epochs<small>median ratio to {base}'s</small>",
    )
    rows = []
    for network, head in study.rows():
        one = study.comparison[network, head]
        ratio = written(one["epochs_ratio"], "{:.2f}") + (f"<small>of {one['both']}</small>" if one["both"] else "")
        rows.append(
            [
                study.named(head, network),
                f"{one['generalised']}<small>of {one['cells']}</small>",
                written(one["lost"]),
                *(written(one[key]) for key in ("less_data", "more_data", "only_it", "only_baseline")),
                ratio,
            ]
        )
    words = (
        f"A cell generalises if {percent(study.results['goal'])} of the test examples are right at some epoch. Pairs "
        "are of the same task, network, share and seed. Cells of one seed are no independent trials: its smaller "
        "shares lie within its larger ones."
    )
    return f'<p class="soft">{escape(words)}</p>' + layout.table("Heads compared", columns, rows)


def _data_needed(study: _Study) -> str:
    columns = ("head", *(escape(study.name_of(task)) for task in study.tasks))
    rows = []
    for network, head in study.rows():
        cells = []
        for task in study.tasks:
            one = study.summary[task, network, head]
            examples = f"<small>{one['examples_needed']:,} examples</small>" if one["examples_needed"] else ""
            cells.append(written(one["data_needed"], "{:.0%}", "more") + examples)
        rows.append([study.named(head, network), *cells])
    words = (
        f"The least share of the examples at which at least {percent(ENOUGH)} of the seeds generalise, among those "
        "tried; more: none of them is enough."
    )
    return f'<h3>Data needed</h3><p class="soft">{escape(words)}</p>' + layout.table("Data needed", columns, rows)


# ---- a task


def _task(study: _Study, task: str) -> str:
    whole = TASKS[task]()
    about = (TASKS[task].__doc__ or "").strip()
    epochs = study.config["tasks"][task]["epochs"]
    told = f"{about} {len(whole.answers):,} examples, {whole.classes} classes, {epochs:,} epochs."
    cells = [cell for cell in study.cells if cell["task"] == task]
    measures = [one for one in MEASURES if any(cell[one[0]] is not None for cell in cells)]
    return (
        f'<p class="soft">{escape(told)}</p>'
        + layout.grid((_epochs(study, task, network) for network in study.networks), "pair")
        + layout.grid((_measure(study, task, network, *one) for network in study.networks for one in measures), "small")
        + _table(study, task)
    )


def _epochs(study: _Study, task: str, network: str) -> str:
    settings = study.config["tasks"][task]
    fractions, epochs = settings["fractions"], settings["epochs"]
    room = min((b - a for a, b in pairwise(fractions)), default=fractions[0])
    reached = [cell["epochs_to_generalise"] or epochs for cell in study.cells if cell["task"] == task]
    series = []
    for style, head in enumerate(study.heads):
        aside = 0.07 * room * (style - (len(study.heads) - 1) / 2)  # heads would hide one another
        medians, seeds, never = [], [], []
        for one in study.summary[task, network, head]["fractions"]:
            at = one["fraction"] + aside
            medians.append((at, one["median_epochs_to_generalise"]))
            cells = study.of(task, network, head, one["fraction"])
            seeds += [(at, cell["epochs_to_generalise"]) for cell in cells]
            if one["never"]:
                never.append((at, f"{one['never']} of {one['seeds']} seeds never generalise"))
        series.append(Series(head, medians, style, dots=seeds, crosses=never))

    def share(place: float) -> str:
        return percent(min(fractions, key=lambda fraction: abs(fraction - place)))

    svg = line_chart(
        f"{study.name_of(task)}, {network}: epochs to generalise by share of the examples",
        series,
        Axis(
            "of the examples",
            low=fractions[0] - room / 4,
            high=fractions[-1] + room / 4,
            form=percent,
            told=share,
        ),
        Axis(
            "epochs",
            log=True,
            low=0.8 * min(reached),  # the same for all networks
            high=ROOM * epochs,
            told=lambda epoch: f"{epoch:,.0f}",
        ),
        size=SIZE,
        direct=False,
        rules=[Rule(epochs, "last epoch", left=True)],
    )
    small = "dots: seeds; line: their median; cross: seeds that never do"
    caption = f"{escape(network)}: epochs to generalise <small>{small}</small>"
    return layout.figure(svg, caption, "No seed of any head generalises.")


def _measure(
    study: _Study, task: str, network: str, key: str, heading: str, of: str, unit: str, form: Callable[[float], str]
) -> str:
    largest = study.config["tasks"][task]["fractions"][-1]
    rows = []
    for style, head in enumerate(study.heads):
        mean = study.summary[task, network, head]["fractions"][-1][key]["mean"]
        values = [one[key] for one in study.of(task, network, head, largest) if one[key] is not None]
        if mean is not None:
            told = f"{form(mean)}, seeds {', '.join(map(form, values))}"
            rows.append(Interval(head, style, mean, None, None, values, told))
    svg = intervals(
        f"{study.name_of(task)}, {network}: {heading.lower()} of {of} by head at {percent(largest)} of the examples",
        rows,
        Axis(unit, low=0.0, high=1.0, form=form),
        width=NARROW,
    )
    return layout.figure(
        svg,
        f"{heading} <small>{escape(network)}, {of}</small>",
        "It says nothing about this task.",
    )


def _table(study: _Study, task: str) -> str:
    fractions = study.config["tasks"][task]["fractions"]
    columns = (
        "head",
        "rate, decay",
        *(f"epochs<small>{percent(fraction)} of the examples</small>" for fraction in fractions),
        f"test accuracy<small>at {percent(fractions[-1])}, as all that follows</small>",
        "prototypes: two components",
        "crystal",
        "embeddings: two components",
        "crystal",
    )
    rows = []
    for network, head in study.rows():
        one = study.summary[task, network, head]
        at = one["fractions"][-1]
        rows.append(
            [
                study.named(head, network),
                f"{one['lr']:g}, {one['weight_decay']:g}",
                *map(_reached, one["fractions"]),
                _spread(at["test_accuracy"], "{:.0%}"),
                *(
                    _spread(at[f"{what}_{key}"], form)
                    for what in ("prototypes", "embedding")
                    for key, form in (("explained", "{:.0%}"), ("crystal", "{:.2f}"))
                ),
            ]
        )
    return layout.table(f"{study.name_of(task)}: figures", columns, rows)


def _reached(one: Entry) -> str:
    """Median epochs, and what they do not tell: seeds that never got there, that lost it again, that diverged."""
    notes = [f"{one['generalised']} of {one['seeds']} seeds"]
    if one["kept"] != one["generalised"]:
        notes.append(f"{one['kept']} at the end")
    if one["diverged"]:
        notes.append(f"{one['diverged']} diverged")
    return written(one["median_epochs_to_generalise"], "{:,.0f}", "never") + f"<small>{', '.join(notes)}</small>"


def _spread(found: Entry, form: str) -> str:
    off = written(found["deviation"], form, "")
    return written(found["mean"], form) + (f"<small>± {off}</small>" if off else "")


# ---- methods


def _methods(study: _Study) -> str:
    goal, seeds = percent(study.results["goal"]), len(study.config["seeds"])
    definitions = {
        "Same for all heads": "The examples of a seed, its initial trunk, its draw of prototypes (in each head's own "
        "scale), full batches (one an epoch), epochs and schedule. Rate and weight decay are chosen for each task, "
        "network and head among the same candidates, at the largest share, on seeds that are not reported.",
        "Epochs to generalise": f"The first epoch at which {goal} of the test examples are right; the median over "
        "seeds, of which one that never gets there counts as infinity. A median that is infinite is told as never.",
        "At the end": f"Seeds that end with {goal} of the test examples right: some lose it again.",
        "Two components": "Share of the variance of the prototypes, as the head's distance sees them, or of the "
        "elements' embeddings, in their first two principal components, after the last epoch.",
        "Crystal": "For tasks on a circle how near the points are to a circle in cyclic order, for those on a lattice "
        "how near to a lattice: 1 is one (docs/interpretability.md). Empty for tasks of neither kind.",
        "After ±": "The sample deviation over seeds; it is no interval of the mean.",
    }
    limits = [
        f"{seeds} seed{'s' * (seeds != 1)}: a seed more or less is no difference.",
        "Never means not within these epochs. Longer training, other candidates, widths and exponents may turn any of "
        "this around.",
        "Few directions are no proof of having learnt, and a crystal is a crystal of these tasks alone.",
        "Networks of this size on a few hundred examples say nothing of language.",
    ]
    return layout.methods(definitions, limits)
