"""The page of an algorithmic study: one HTML file from its results.json, without any request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from pretrain.study.algorithmic_results import ENOUGH
from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.intervals import Interval, intervals
from pretrain.study.page.charts.lines import Rule, Series, line_chart
from pretrain.study.page.charts.numbers import percent, whole
from pretrain.study.page.layout import Section, plural, small, written
from pretrain.study.tasks import TASKS

NARROW, WIDE = 190.0, 300.0
SHORT = 11  # letters of a head's name, which stands beside the plot
ROOM = 1.6  # above the last epoch, for crosses


class Measure(NamedTuple):
    """A figure of a cell at the largest share of the examples."""

    key: str
    heading: str
    of: str
    unit: str
    form: Callable[[float], str]


MEASURES = (
    Measure("test_accuracy", "Accuracy", "test examples", "share of examples", percent),
    Measure("prototypes_explained", "Two components", "prototypes", "share of variance", percent),
    Measure("embedding_explained", "Two components", "embeddings", "share of variance", percent),
    Measure("prototypes_crystal", "Crystal", "prototypes", "score", "{:.2f}".format),
    Measure("embedding_crystal", "Crystal", "embeddings", "score", "{:.2f}".format),
)
CELLS = {  # of the table, in its order
    "test_accuracy": "{:.0%}",
    "prototypes_explained": "{:.0%}",
    "prototypes_crystal": "{:.2f}",
    "embedding_explained": "{:.0%}",
    "embedding_crystal": "{:.2f}",
}

Entry = Mapping[str, Any]


def page(results: Mapping[str, Any]) -> str:
    """The HTML of a study. `results`: as in its results.json."""
    study = _Study(results)
    sections = [
        Section("results", "Results", "What came out", _comparison(study) + _data_needed(study)),
        *(Section(task, _name(task), _name(task), _task(study, task)) for task in study.tasks),
        *([Section("decay", "Weight decay", "Weight decay", _sweep(study))] if study.sweep else []),
        Section("methods", "Methods", "How it was done", _methods(study)),
    ]
    footer = f"{len(study.cells)} cells, each of them counted."
    return layout.document(study.title, _lede(study), _facts(study), sections, study.heads, footer)


class _Study:
    """The results, and what several sections ask of them. The baseline comes first and has style 0."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.config: Entry = results["config"]
        self.title = str(self.config["title"])
        self.baseline = str(self.config["baseline"])
        self.heads = sorted(self.config["heads"], key=lambda head: head != self.baseline)
        self.short = max(map(len, self.heads)) <= SHORT
        self.tasks = [str(task) for task in self.config["tasks"]]
        self.networks = [str(network["kind"]) for network in self.config["networks"]]
        self.cells: Sequence[Entry] = results["cells"]
        self.summary = {(entry["task"], entry["network"], entry["head"]): entry for entry in results["summary"]}
        self.sweep: Sequence[Entry] = results["sweep"]
        self.curves = {
            (entry["task"], entry["network"], entry["head"]): entry["curve"]
            for entry in results["curves"]
            if entry["fraction"] == self.config["tasks"][entry["task"]]["fractions"][-1]
        }
        self.comparison = {(entry["network"], entry["head"]): entry for entry in results["comparison"]}

    def of(self, task: str, network: str, head: str, fraction: float) -> list[Entry]:
        """The cells, one for each seed."""
        wanted = {"task": task, "network": network, "head": head, "fraction": fraction}
        return [cell for cell in self.cells if all(cell[key] == value for key, value in wanted.items())]

    def named(self, head: str, network: str) -> str:
        return layout.named(self.heads.index(head), head, escape(network))

    def rows(self) -> Iterable[tuple[str, str]]:
        """Networks and heads, in the order of tables."""
        return ((network, head) for network in self.networks for head in self.heads)


def _name(task: str) -> str:
    return task.replace("_", " ").capitalize()


# ---- opening and overview


def _lede(study: _Study) -> str:
    return (
        f"{len(study.heads)} output heads on {len(study.tasks)} tasks whose answers have a known structure: from which "
        "share of all examples does a small network come to answer the rest, in how many epochs, and how do its "
        "prototypes lie then?"
    )


def _facts(study: _Study) -> str:
    seeds, choice = study.config["seeds"], study.config["choice"]
    tried = ", ".join(f"({candidate['lr']:g}, {candidate['weight_decay']:g})" for candidate in choice["candidates"])
    shapes = [", ".join(f"{key} {value}" for key, value in network.items()) for network in study.config["networks"]]
    chosen = f"on seeds {', '.join(map(str, choice['seeds']))}" if choice["seeds"] else "given"
    return layout.facts(
        [
            ("Cells", f"{len(study.cells):,}", "one task, network, head, share of the examples and seed each"),
            ("Seeds", str(len(seeds)), escape(", ".join(map(str, seeds)))),
            ("Width", written(study.config["dim"]), "of embeddings, features and prototypes"),
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
        f"test accuracy less {base}'s<small>corrected, of all heads and networks</small>",
    )
    rows = []
    for network, head in study.rows():
        entry = study.comparison[network, head]
        rows.append(
            [
                study.named(head, network),
                written(entry["generalised"], "{}") + small(f"of {entry['cells']}"),
                *(written(entry[key]) for key in ("lost", "less_data", "more_data", "only_it", "only_baseline")),
                written(entry["epochs_ratio"], "{:.2f}") + small(f"of {entry['both']}" if entry["both"] else ""),
                _difference(entry["accuracy"]),
            ]
        )
    words = (
        f"A cell generalises if {percent(study.results['goal'])} of the test examples are right at some epoch. Pairs "
        "are of the same task, network, share and seed. Cells of one seed are no independent trials: its smaller "
        "shares lie within its larger ones. The last column is a mean over tasks and shares, after the last epoch, "
        "paired by seed: its interval is over seeds."
    )
    return layout.soft(words) + _edges(study) + layout.table("Heads compared", columns, rows)


def _edges(study: _Study) -> str:
    """How many choices lie at an end of what was tried, head by head."""
    every = study.results["choices"]
    at = {head: [one for one in every if one["head"] == head] for head in study.heads}
    told = ", ".join(
        f"{escape(head)} {sum(bool(one['edges']) for one in choices)} of {len(choices)}" for head, choices in at.items()
    )
    if not any(one["edges"] for one in every):
        return ""
    words = (
        "Choices of rate and weight decay that lie at an end of what was tried, by either of them or by their product, "
        f"so that better ones may lie beyond and no head is called better: {told}."
    )
    return layout.soft(words)


def _difference(entry: Entry | None) -> str:
    if entry is None:
        return written(None)
    low, mean, high = (written(entry[name], "{:+.1%}", "") for name in ("low", "mean", "high"))
    return mean + small(f"{low} to {high}" if low else "")


def _data_needed(study: _Study) -> str:
    columns = ("head", *(escape(_name(task)) for task in study.tasks))
    rows = []
    for network, head in study.rows():
        entries = [study.summary[task, network, head] for task in study.tasks]
        cells = [
            written(entry["data_needed"], "{:.0%}", "more")
            + small(f"{entry['examples_needed']:,} examples" if entry["examples_needed"] else "")
            for entry in entries
        ]
        rows.append([study.named(head, network), *cells])
    words = (
        f"The least share of the examples at which at least {percent(ENOUGH)} of the seeds generalise, among those "
        "tried; more: none of them is enough."
    )
    return "<h3>Data needed</h3>" + layout.soft(words) + layout.table("Data needed", columns, rows)


# ---- a task


def _task(study: _Study, task: str) -> str:
    examples = TASKS[task]()
    about = (TASKS[task].__doc__ or "").strip()
    epochs = study.config["tasks"][task]["epochs"]
    cells = [cell for cell in study.cells if cell["task"] == task]
    measures = [measure for measure in MEASURES if any(cell[measure.key] is not None for cell in cells)]
    return (
        layout.soft(f"{about} {len(examples.answers):,} examples, {examples.classes} classes, {epochs:,} epochs.")
        + layout.grid((_epochs(study, task, network) for network in study.networks), "pair")
        + layout.grid((_shares(study, task, network) for network in study.networks), "pair")
        + layout.grid((_curves(study, task, network) for network in study.networks), "pair")
        + layout.grid(
            (_measured(study, task, network, measure) for network in study.networks for measure in measures),
            "small" if study.short else "",
        )
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
        for entry in study.summary[task, network, head]["fractions"]:
            at = entry["fraction"] + aside
            medians.append((at, entry["median_epochs_to_generalise"]))
            cells = study.of(task, network, head, entry["fraction"])
            seeds += [(at, cell["epochs_to_generalise"]) for cell in cells]
            if entry["never"]:
                never.append((at, f"{entry['never']} of {entry['seeds']} seeds never generalise"))
        series.append(Series(head, medians, style, dots=seeds, crosses=never))

    def share(place: float) -> str:
        return percent(min(fractions, key=lambda fraction: abs(fraction - place)))

    lowest, highest = 0.8 * min(reached), ROOM * epochs  # the same for all networks
    svg = line_chart(
        f"{_name(task)}, {network}: epochs to generalise by share of the examples",
        series,
        Axis("of the examples", False, fractions[0] - room / 4, fractions[-1] + room / 4, form=percent, told=share),
        Axis("epochs", log=True, low=lowest, high=highest, told=whole),
        direct=False,
        rules=[Rule(epochs, "last epoch", left=True)],
    )
    legend = small("dots: seeds; line: their median; cross: seeds that never do")
    caption = f"{escape(network)}: epochs to generalise {legend}"
    return layout.figure(svg, caption, "No seed of any head generalises.")


def _shares(study: _Study, task: str, network: str) -> str:
    """Test accuracy by share of the examples, with intervals."""
    series = []
    for style, head in enumerate(study.heads):
        at = [(entry["fraction"], entry["test_accuracy"]) for entry in study.summary[task, network, head]["fractions"]]
        band = [
            (fraction, max(0.0, spread["low"]), min(1.0, spread["high"]))
            for fraction, spread in at
            if spread["low"] is not None
        ]
        series.append(Series(head, [(fraction, spread["mean"]) for fraction, spread in at], style, band=band))
    svg = line_chart(
        f"{_name(task)}, {network}: test accuracy by share of the examples",
        series,
        Axis("of the examples", form=percent, told=percent),
        Axis("test accuracy", low=0.0, high=1.0, form=percent, told=percent),
        direct=False,
    )
    legend = small("after the last epoch; mean over seeds and 95% of it")
    return layout.figure(svg, f"{escape(network)}: accuracy by share {legend}", "All cells diverged.")


def _curves(study: _Study, task: str, network: str) -> str:
    series = [
        _curve(head, style, study.curves[task, network, head]) for style, head in enumerate(study.heads)
    ]  # fmt: skip
    largest = percent(study.config["tasks"][task]["fractions"][-1])
    svg = _accuracies(f"{_name(task)}, {network}: test accuracy by epochs at {largest} of the examples", series)
    legend = small(f"{largest} of the examples; mean of all seeds, from the least to the largest")
    return layout.figure(svg, f"{escape(network)}: accuracy by epochs {legend}", "All cells diverged.")


def _curve(head: str, style: int, curve: Sequence[Sequence[float]]) -> Series:
    band = [(epoch, low, high) for epoch, _, low, high in curve]
    return Series(head, [(epoch, mean) for epoch, mean, _, _ in curve], style, band=band)


def _accuracies(label: str, series: Sequence[Series]) -> str:
    y = Axis("test accuracy", low=0.0, high=1.0, form=percent, told=percent)
    return line_chart(label, series, Axis("epochs", low=0.0, told=whole), y, direct=False)


def _measured(study: _Study, task: str, network: str, measure: Measure) -> str:
    largest = study.config["tasks"][task]["fractions"][-1]
    rows = []
    for style, head in enumerate(study.heads):
        mean = study.summary[task, network, head]["fractions"][-1][measure.key]["mean"]
        cells = study.of(task, network, head, largest)
        values = [cell[measure.key] for cell in cells if cell[measure.key] is not None]
        if mean is not None:
            tip = f"{measure.form(mean)}, seeds {', '.join(map(measure.form, values))}"
            rows.append(Interval(head, style, mean, values=values, tip=tip))
    label = f"{measure.heading.lower()} of {measure.of} by head at {percent(largest)} of the examples"
    axis = Axis(measure.unit, low=0.0, high=1.0, form=measure.form)
    return layout.figure(
        intervals(f"{_name(task)}, {network}: {label}", rows, axis, width=NARROW if study.short else WIDE),
        f"{measure.heading} {small(f'{escape(network)}, {measure.of}')}",
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
        "GFLOPs<small>of matrix products, in training</small>",
    )
    rows = []
    for network, head in study.rows():
        entry = study.summary[task, network, head]
        at_largest = entry["fractions"][-1]
        rows.append(
            [
                study.named(head, network),
                f"{entry['lr']:g}, {entry['weight_decay']:g}",
                *map(_reached, entry["fractions"]),
                *(_spread(at_largest[key], form) for key, form in CELLS.items()),
                written(at_largest["gflops"]["mean"], "{:.1f}"),
            ]
        )
    return layout.table(f"{_name(task)}: figures", columns, rows)


def _reached(entry: Entry) -> str:
    """Median epochs, and what they do not tell: seeds that never got there, that lost it again, that diverged."""
    notes = [f"{entry['generalised']} of {entry['seeds']} seeds"]
    if entry["kept"] != entry["generalised"]:
        notes.append(f"{entry['kept']} at the end")
    if entry["diverged"]:
        notes.append(f"{entry['diverged']} diverged")
    return written(entry["median_epochs_to_generalise"], "{:,.0f}", "never") + small(", ".join(notes))


def _spread(entry: Entry, form: str) -> str:
    deviation = written(entry["deviation"], form, "")
    return written(entry["mean"], form) + small(f"± {deviation}" if deviation else "")


# ---- weight decay

RULES = {
    "all": "all weights",
    "no_prototypes": "all but prototypes",
    "no_last_layer": "neither prototypes nor the layer of the features",
    "rate_by_norm": "all; rates of prototypes and features fall with their norms",
}


def _sweep(study: _Study) -> str:
    asked: Entry = study.config["sweep"]
    rows = []
    for entry in study.sweep:
        decay = entry["weight_decay"]
        rows.append(
            [
                layout.named(study.heads.index(entry["head"]), entry["head"], f"decay {decay:g}"),
                escape(RULES[entry["decay_rule"]]) if decay else "none",
                f"{entry['lr']:g}",
                _reached(entry),
                _spread(entry["test_accuracy"], "{:.0%}"),
            ]
        )
    words = (
        f"{_name(asked['task'])}, {asked['network']}, {percent(asked['fraction'])} of the examples. Each head has each "
        "weight decay, and each choice of what decays; the rate is chosen for each of these alike, on seeds that are "
        "not reported. Every seed is counted."
    )
    columns = ("head, decay", "what decays", "rate", "epochs to generalise", "test accuracy<small>at the end</small>")
    return (
        layout.soft(words)
        + layout.grid((_swept(study, decay) for decay in asked["weight_decays"]), "pair")
        + layout.table("Weight decay", columns, rows)
    )


def _swept(study: _Study, decay: float) -> str:
    first = study.config["sweep"]["decay_rules"][0]
    series = [
        _curve(entry["head"], study.heads.index(entry["head"]), entry["curve"])
        for entry in study.sweep
        if entry["weight_decay"] == decay and entry["decay_rule"] == first
    ]
    caption = f"decay {decay:g} {small('mean of all seeds, from the least to the largest')}"
    return layout.figure(
        _accuracies(f"test accuracy by epochs at weight decay {decay:g}", series), caption, "All cells diverged."
    )


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
        "how near to a lattice: 1 is one. For equivalence and permutations the share of the variance that lies between "
        "residues, and between the cosets of Klein's four-group (docs/interpretability.md).",
        "After ±": "The sample deviation over seeds; it is no interval of the mean.",
    }
    limits = [
        f"{plural(seeds, 'seed')}: a seed more or less is no difference.",
        "Never means not within these epochs. Longer training, other candidates, widths and exponents may turn any of "
        "this around.",
        "Few directions are no proof of having learnt, and a crystal is a crystal of these tasks alone.",
        "Networks of this size on a few hundred examples say nothing of language.",
    ]
    return layout.methods(definitions, limits)
