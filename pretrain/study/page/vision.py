"""The page of a vision study: one HTML file from its results.json, without any request."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.bitmaps import bitmap
from pretrain.study.page.charts.intervals import Interval, intervals
from pretrain.study.page.charts.lines import Series, line_chart
from pretrain.study.page.charts.numbers import percent, short
from pretrain.study.page.layout import Section, plural, small, written
from pretrain.study.vision.cell import BINS
from pretrain.study.vision.results import verdict

ATTACKS = {"noise": "Gaussian noise", "fgsm": "fast gradient sign"}
GAP, SHOWN = 1, 720  # pixels between images, and the width of a row of them

Entry = Mapping[str, Any]


class Column(NamedTuple):
    """Of the table of a data set."""

    key: str
    heading: str
    form: str
    missing: str = "-"


COLUMNS = (
    Column("macro_f1", "F1<small>mean over classes</small>", "{:.3f}"),
    Column("loss", "loss<small>nats</small>", "{:.3f}"),
    Column("calibration_error", "calibration error", "{:.3f}"),
    Column("train_accuracy", "accuracy<small>training part</small>", "{:.1%}"),
    Column("prototypes_first_2", "prototypes: two components", "{:.0%}"),
    Column("prototypes_components_90", "PCA90", "{:.1f}"),
    Column("prototypes_effective_rank", "effective rank", "{:.1f}"),
    Column("features_first_2", "features: two components", "{:.0%}"),
    Column("features_components_90", "PCA90", "{:.1f}"),
    Column("features_effective_rank", "effective rank", "{:.1f}"),
    Column("seconds", "seconds", "{:.1f}"),
    Column("images_per_s", "images/s", "{:,.0f}"),
    Column("j_per_image", "J/image", "{:.2e}", "not measured"),
)


def page(results: Mapping[str, Any]) -> str:
    """The HTML of a study. `results`: as in its results.json."""
    study = _Study(results)
    sections = [
        Section("results", "Results", "What came out", _comparison(study)),
        *(Section(f"data-{place}", name, name, _data(study, name)) for place, name in enumerate(study.data)),
        Section("tuning", "Tuning", "What was tried", _tuning(study)),
        Section("methods", "Methods", "How it was done", _methods(study)),
    ]
    if results["pictures"]:
        sections.insert(-2, Section("weights", "Weights", "Prototypes as images", _pictures(study)))
    footer = f"{len(study.cells)} cells, each of them counted."
    return layout.document(study.title, _lede(study), _facts(study), sections, study.heads, footer)


class _Study:
    """The results, and what several sections ask of them. The baseline comes first and has style 0."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.config: Entry = results["config"]
        self.title, self.baseline = str(self.config["title"]), str(self.config["baseline"])
        self.heads = sorted(self.config["heads"], key=lambda head: head != self.baseline)
        self.data: Mapping[str, Entry] = results["data"]
        self.cells: Sequence[Entry] = results["cells"]
        self.summary, self.comparison, self.choices = (
            {(entry["data"], entry["network"], entry["head"]): entry for entry in results[name]}
            for name in ("summary", "comparison", "choices")
        )

    def networks(self, data: str) -> list[str]:
        """Those that train on a data set."""
        return list(dict.fromkeys(network for name, network, _ in self.summary if name == data))

    def rows(self, data: str | None = None) -> Iterable[tuple[str, str, str]]:
        """Data sets, networks and heads, in the order of tables."""
        names = self.data if data is None else [data]
        return ((name, network, head) for name in names for network in self.networks(name) for head in self.heads)

    def named(self, head: str, more: str) -> str:
        return layout.named(self.heads.index(head), head, escape(more))


# ---- opening


def _lede(study: _Study) -> str:
    return (
        f"{len(study.heads)} output heads on {plural(len(study.data), 'data set')} of images and signals: how often is "
        "each right on examples that nothing was chosen by, how sure is it, what do noise and an attack do to it, and "
        "how do its prototypes lie?"
    )


def _facts(study: _Study) -> str:
    config, tuning = study.config, study.config["tuning"]
    sizes = "; ".join(
        f"{name}: {', '.join(f'{count:,} {part}' for part, count in found['sizes'].items())}, "
        f"{len(found['classes'])} classes, inputs {' x '.join(map(str, found['shape']))}"
        for name, found in study.data.items()
    )
    networks = "; ".join(
        f"{name}: {', '.join(f'{key} {value}' for key, value in one.items())}"
        for name, one in config["networks"].items()
    )
    spaces = "; ".join(
        f"{name} {', '.join(f'{value:g}' for value in tuning['space'][name])}" for name in tuning["space"]
    )
    return layout.facts(
        [
            ("Data", str(len(study.data)), escape(sizes)),
            ("Networks", str(len(config["networks"])), escape(networks)),
            ("Width", written(config["dim"]), "of features and prototypes; a linear network has its inputs' entries"),
            ("Trials", str(tuning["trials"]), escape(f"of each head on each data set and network, among {spaces}")),
            (
                "Seeds",
                str(len(config["seeds"])),
                escape(", ".join(map(str, config["seeds"])) + ", none of which chose"),
            ),
            ("Versions", f"torch {written(study.results['torch'])}", written(study.results["machine"])),
        ]
    )


# ---- results


def _comparison(study: _Study) -> str:
    base = escape(study.baseline)
    columns = (
        "head",
        "accuracy",
        f"less {base}'s<small>points, corrected interval</small>",
        "in accuracy",
        "could show<small>points</small>",
        f"loss less {base}'s<small>nats, corrected interval</small>",
        "in loss",
    )
    rows = []
    for key in study.rows():
        entry, against = study.summary[key], study.comparison.get(key)
        cells = [study.named(key[2], f"{key[0]}, {key[1]}"), _bounds(entry["accuracy"], "{:.1%}")]
        if against is None:
            cells += ["baseline" if key[2] == study.baseline else "-", *[""] * 4]
        else:
            accuracy, loss = against["accuracy"], against["loss"]
            could = accuracy and accuracy["could_show"]
            edges = [*study.choices[key]["edges"], *study.choices[*key[:2], study.baseline]["edges"]]
            cells += [
                *(_bounds(accuracy, "{:+.1f}", 100), _tag(verdict(accuracy, edges=edges))),
                written(None if could is None else 100 * could, "{:.1f}"),
                *(_bounds(loss, "{:+.3f}"), _tag(verdict(loss, smaller_is_better=True, edges=edges))),
            ]
        rows.append(cells)
    seeds, heads = len(study.config["seeds"]), len(study.heads)
    words = (
        f"Of the test part, {seeds} seeds of each head. Differences are those of cells with the same seed; that in "
        "accuracy counts chance in seeds and in test examples, that in loss in seeds. All differences in a measure are "
        f"corrected together (Holm): {len(study.comparison)} of them, {heads - 1} heads on each data set and network. "
        "Could show: the least true difference that this experiment finds in four of five cases. Not settled: there is "
        "a difference, but a setting of one of the two lies at an end of what was tried, so it may be the search's."
    )
    return layout.soft(words) + layout.table("Heads compared", columns, rows)


def _tag(text: str) -> str:
    kind = {"better": " better", "worse": " worse"}.get(text, "")
    return f'<span class="tag{kind}">{escape(text)}</span>' if text != "-" else text


def _bounds(entry: Entry | None, form: str, times: float = 1.0) -> str:
    if entry is None or entry["mean"] is None:
        return "-"
    mean, low, high = (None if entry[key] is None else times * entry[key] for key in ("mean", "low", "high"))
    return written(mean, form) + small("" if low is None else f"{written(low, form)} to {written(high, form)}")


# ---- a data set


def _data(study: _Study, data: str) -> str:
    networks = study.networks(data)
    kinds = [kind for kind in ATTACKS if study.config[kind]]
    charts = [_robust(study, data, network, kind) for network in networks for kind in kinds]
    return (
        layout.grid((_accuracy(study, data, network) for network in networks), "pair")
        + (layout.grid(charts, "pair") if charts else "")
        + _table(study, data)
    )


def _accuracy(study: _Study, data: str, network: str) -> str:
    rows = []
    for style, head in enumerate(study.heads):
        found = study.summary[data, network, head]["accuracy"]
        if found["mean"] is not None:
            tip = f"{percent(found['mean'])}, seeds {', '.join(map(percent, found['values']))}"
            rows.append(Interval(head, style, found["mean"], found["low"], found["high"], found["values"], tip))
    svg = intervals(f"{data}, {network}: accuracy by head", rows, Axis("accuracy, test part", form=percent))
    return layout.figure(svg, f"{escape(network)}: accuracy {small('95% interval over seeds')}", "Every cell diverged.")


def _robust(study: _Study, data: str, network: str, kind: str) -> str:
    sizes = study.config[kind]
    keys = ["accuracy", *(f"accuracy_{kind}_{size:g}" for size in sizes)]
    places = [0.0, *sizes]
    series = [
        Series(
            head,
            [(at, study.summary[data, network, head][key]["mean"]) for at, key in zip(places, keys, strict=True)],
            style,
            dots=[
                (at, value)
                for at, key in zip(places, keys, strict=True)
                for value in study.summary[data, network, head][key]["values"]
            ],
        )
        for style, head in enumerate(study.heads)
    ]
    svg = line_chart(
        f"{data}, {network}: accuracy under {ATTACKS[kind]}, by its size",
        series,
        Axis("deviations of the inputs", low=0.0, form=short),
        Axis("accuracy", low=0.0, high=1.0, form=percent, told=percent),
    )
    return layout.figure(svg, f"{escape(network)}: {ATTACKS[kind]} {small('dots: seeds')}", "Every cell diverged.")


def _table(study: _Study, data: str) -> str:
    moved = [Column("fgsm_unmoved", "not moved<small>by the attack</small>", "{:.1%}")] if study.config["fgsm"] else []
    robust = [
        Column(f"accuracy_{kind}_{size:g}", f"{ATTACKS[kind]} {size:g}", "{:.1%}")
        for kind in ATTACKS
        for size in study.config[kind]
    ]
    columns = [*COLUMNS[:4], *robust, *moved, *COLUMNS[4:]]
    rows = []
    for key in study.rows(data):
        entry = study.summary[key]
        lost = f"{entry['diverged']} of {entry['seeds']} diverged" if entry["diverged"] else ""
        accuracy = _bounds(entry["accuracy"], "{:.1%}") + small(lost)
        cells = [written(entry[one.key]["mean"], one.form, one.missing) for one in columns]
        rows.append([study.named(key[2], key[1]), accuracy, *cells])
    return layout.table(f"{data}: figures", ("head", "accuracy", *(one.heading for one in columns)), rows)


# ---- prototypes as images, and tuning


def _pictures(study: _Study) -> str:
    figures = []
    for one in study.results["pictures"]:
        style = study.heads.index(one["head"])
        label = f"{one['data']}, {one['head']}: prototypes of {one['network']}, one beside the other"
        caption = f"{escape(one['head'])} {small(escape(one['data']))}"
        image = bitmap(label, strip(one), SHOWN)
        note = small(f"black and white: {written(-one['largest'], '{:.3g}')} and {written(one['largest'], '{:.3g}')}")
        figures.append(layout.figure(image, caption, "", style, note))
    words = (
        "Of a network without layers, whose features are the inputs: each class's prototype in the inputs' own shape, "
        f"of seed {study.config['seeds'][0]}. Grey is 0, the mean of the training inputs."
    )
    return layout.soft(words) + layout.grid(figures, "pair")


def strip(one: Entry) -> np.ndarray:
    """The prototypes side by side, (H, ...) grey or (H, ..., 3) coloured; of signals, one below the other."""
    shape = one["shape"]
    rows = np.frombuffer(base64.b64decode(one["pixels"]), np.uint8).reshape(-1, *shape)
    if len(shape) == 2:
        return rows.reshape(-1, shape[-1])
    grey = rows[:, 0] if shape[0] == 1 else rows.transpose(0, 2, 3, 1)
    edges = [(0, 0), (0, 0), (0, GAP), *[(0, 0)] * (grey.ndim - 3)]
    return np.concatenate(list(np.pad(grey, edges, constant_values=255)), axis=1)


def _tuning(study: _Study) -> str:
    columns = (
        "head",
        *("rate", "weight decay", "start<small>times the head's own</small>"),
        "accuracy<small>tuning part, when chosen</small>",
        "accuracy<small>tuning part, fresh seeds</small>",
        "trials",
    )
    rows = []
    for key in study.rows():
        chosen = study.choices[key]
        best = max((trial["accuracy"] for trial in chosen["trials"] if trial["accuracy"] is not None), default=None)
        settings = [
            f"{chosen[name]:g}" + small("edge" if name in chosen["edges"] else "")
            for name in ("lr", "weight_decay", "init")
        ]
        lost = sum(trial["accuracy"] is None for trial in chosen["trials"])
        rows.append(
            [
                study.named(key[2], f"{key[0]}, {key[1]}"),
                *settings,
                written(best, "{:.1%}"),
                _bounds(study.summary[key]["tuning_accuracy"], "{:.1%}"),
                str(len(chosen["trials"])) + small(f"{lost} diverged" if lost else ""),
            ]
        )
    words = (
        "The setting with the best accuracy on the tuning part, of the same trials for every head. Edge: the value is "
        "the least or the greatest that was tried, so that one beyond it may be better and this is not called the "
        "best. What the choice owes to luck shows in the fresh seeds."
    )
    return layout.soft(words) + layout.table("Tuning", columns, rows)


def _methods(study: _Study) -> str:
    missing = "; ".join(f"{part}: {why}" for part, why in study.results["not_measured"].items()) or "nothing"
    definitions = {
        "Same for all heads": "Of a seed the initial network, the draw of prototypes (in each head's own scale) and "
        "the batches; epochs, schedule and trials. Examples are in the training, tuning or test part by a hash, or the "
        "source has a test part of its own. Settings are chosen on the tuning part, figures are of the test part.",
        "Inputs": "Shifted and scaled by channel to mean 0 and variance 1 over the training part; no augmentation.",
        "Loss": "Mean negative log-likelihood in nats, of the head's own probabilities.",
        "Calibration error": f"Over {BINS} bins of confidence: the mean gap between confidence and accuracy.",
        "Noise": "Gaussian, of the stated deviation, added to inputs of variance 1; one draw for each seed.",
        "Fast gradient sign": "Every entry of an input moves by the stated size to where the loss grows, in the same "
        "unit, not kept within the range of pixels. Not moved: inputs on which the gradient is 0 in float32, which "
        "make a network look safer than it is. It is the weakest of attacks.",
        "Two components, PCA90, effective rank": "Of the prototypes, or the test part's features, as the head's "
        "distance sees them, less their mean: share of variance in the first two principal components, components that "
        "hold 90% of it, exp of the entropy of singular values.",
        "J/image": f"Joules of training over images trained on. Not measured: {missing}.",
    }
    limits = [
        f"{plural(len(study.config['seeds']), 'seed')} and small networks: a difference that is not shown may exist.",
        "Epochs, width, exponent and temperature are as set, not tuned.",
        "Seconds depend on the machine, on what else it did, and on how far each head's code was tuned for it.",
        "Robustness against one attack says nothing of others.",
    ]
    return layout.methods(definitions, limits)
