"""The page of a study: one HTML file from its results.json, without any request.

What is None or missing is shown as "-" or with the reason; it is never left out, and never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from pretrain.analysis.scoring import UNIGRAM_TOKENS
from pretrain.energy.sustainability import LOSS_SPIKE, NORM_SPIKE, WINDOW
from pretrain.study.page import layout
from pretrain.study.page.charts.axes import (
    Axis,
    Interval,
    Outline,
    Point,
    Rule,
    Series,
    intervals,
    known,
    line_chart,
    percent,
    precise,
    radar,
    scatter,
    short,
)
from pretrain.study.page.layout import MINUS, NONE, written

# Absolute scales of the radar: worth at the centre, worth at the rim.
J_PER_TOKEN = (1.0, 1e-6)  # logarithmic
SECONDS_PER_TOKEN = (1e-1, 1e-6)  # logarithmic
MOST_POINTS = 100  # of a training curve
SHARE_90 = 0.9
NOT_DONE = "not done"
CONTENTS = {
    "results": "Results",
    "loss": "Loss",
    "radar": "Radar",
    "variance": "Variance",
    "projection": "Projections",
    "norms": "Lengths",
    "sweep": "Learning rates",
    "methods": "Methods and limits",
}

Head = Mapping[str, Any]


def page(results: Mapping[str, Any]) -> str:
    """The HTML of a study. `results`: as in its results.json, of which any figure may be None."""
    study = _Study(results)
    parts = [
        _opening(study),
        layout.contents(CONTENTS),
        _budget(study),
        layout.section("results", "What came out", _findings(study) + _differences(study) + _table(study)),
        layout.toggles("Choose the heads that the plots show", study.names),
        layout.section("loss", "Loss", _losses(study)),
        layout.section("radar", "Quality, interpretability, sustainability", _radars(study)),
        layout.section("variance", "Where the variance of the prototypes lies", _scree(study)),
        layout.section("projection", "The prototypes in a plane", _projections(study)),
        layout.section("norms", "Lengths of the prototypes over training", _norms(study)),
        layout.section("sweep", "Learning rates", _sweeps(study)),
        layout.section("methods", "How it was done", _methods(study)),
        _footer(study),
    ]
    return layout.document(study.title, "\n".join(parts), len(study.heads))


class _Study:
    """The results, and what several sections ask of them. The baseline comes first and has style 0."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.baseline = results.get("baseline") or "softmax"
        heads = results.get("heads") or []
        self.heads: list[Head] = sorted(heads, key=lambda head: head["name"] != self.baseline)
        self.names = [str(head["name"]) for head in self.heads]
        self.title = str(results.get("title") or results.get("name") or "A study of output heads")
        self.has_baseline = bool(self.heads) and self.heads[0]["name"] == self.baseline
        self.unigram: float | None = self.figure("data", "unigram_bits_per_byte")

    def at(self, *keys: str) -> Any:
        return _at(self.results, *keys)

    def figure(self, *keys: str) -> float | None:
        return _figure(self.results, *keys)

    @property
    def styled(self) -> list[tuple[int, Head]]:
        return [(place, head) for place, head in enumerate(self.heads)]

    @property
    def trained(self) -> list[Head]:
        return [head for head in self.heads if _figure(head, "bits_per_byte", "mean") is not None]

    @property
    def has_energy(self) -> bool:
        """Of every head that has a result: else heads could not be compared."""
        return bool(self.trained) and all(_figure(head, "j_per_token") is not None for head in self.trained)

    @property
    def no_energy(self) -> str:
        """Why energy was not measured, as a sentence."""
        told = self.unmeasured or "No reason was recorded"
        some = any(_figure(head, "j_per_token") is not None for head in self.heads)
        return f"Energy was not measured{' for every head' if some else ''}. {told.rstrip('.')}."

    @property
    def unmeasured(self) -> str:
        """Parts whose energy is not told, and why."""
        reasons = self.at("not_measured") or {}
        return "; ".join(f"{part.upper()}: {why}" for part, why in reasons.items() if why)

    @property
    def counted(self) -> str:
        """What joules are of, as a sentence."""
        told = f"Joules are those of {', '.join(map(str.upper, self.at('measured') or ())) or 'parts not recorded'}."
        return f"{told} Not measured in every run: {self.unmeasured.rstrip('.')}." if self.unmeasured else told

    @property
    def unigram_nats(self) -> float | None:
        """Per token of the held-out text."""
        size, tokens = self.figure("data", "val_bytes"), self.figure("data", "val_tokens")
        if self.unigram is None or not size or not tokens:
            return None
        return self.unigram * math.log(2) * size / tokens


# ---- figures


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _figure(tree: Any, *keys: str) -> float | None:
    """A number; None if it is missing or not finite."""
    found = _at(tree, *keys)
    return found if isinstance(found, int | float) and known(found) else None


def _rate(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}".replace("e-0", "e-")


def _range(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"[{written(low, form)}, {written(high, form)}]"


def _named(study: _Study, place: int, more: str = "") -> str:
    return layout.named(place, study.names[place], more)


def _list(names: Sequence[str]) -> str:
    *most, last = names
    return escape(f"{', '.join(most)} and {last}" if most else last)


def verdict(difference: Mapping[str, Any] | None) -> str | None:
    """Of a difference in bits/byte: better or worse if its interval over seeds excludes 0; None without an interval."""
    low, high = _figure(difference, "low"), _figure(difference, "high")
    if low is None or high is None:
        return None
    return "better" if high < 0 else "worse" if low > 0 else "no difference"


def _all_diverged(head: Head) -> bool:
    return bool(head.get("started")) and head.get("diverged") == head.get("started")


def _no_result(head: Head) -> str:
    """Why a head has no result, in words."""
    started, failed = head.get("started"), _failed(head)
    if _all_diverged(head):
        return f"all {started} runs diverged" if started != 1 else "its only run diverged"
    if not started:
        return "no run was started"
    parts = [f"{written(head.get('diverged'))} of {started} runs diverged", f"{failed} failed" if failed else ""]
    return "no result: " + ", ".join(part for part in parts if part)


def _failed(head: Head) -> int:
    """Entries of its sweep that stopped for a reason other than divergence."""
    return sum(entry.get("outcome") == "failed" for entry in head.get("sweep") or [])


# ---- (1) opening


def _opening(study: _Study) -> str:
    others = len(study.heads) - study.has_baseline
    seeds, rates = study.at("seeds") or [], study.at("lrs") or []
    parameters, tokens = study.figure("model", "parameters"), study.figure("budget", "tokens")
    size = f" of {short(parameters)} parameters" if parameters is not None else ""
    length = f" for {short(tokens)} tokens" if tokens is not None else ""
    told = (
        f"{others} distance-based output head{'s' * (others != 1)} compared with {study.baseline} on the same language "
        f"model{size}, trained{length} on the same text in the same order: with one seed at {len(rates)} "
        f"learning rate{'s' * (len(rates) != 1)}, and at the best of them with {len(seeds)} "
        f"seed{'s' * (len(seeds) != 1)} in all."
    )
    return layout.opening(study.title, told, study.at("notice"))


def _budget(study: _Study) -> str:
    model, data, budget = (study.at(part) or {} for part in ("model", "data", "budget"))
    seeds, rates = study.at("seeds") or [], study.at("lrs") or []
    versions = study.at("versions") or {}
    held_out = (
        f"{written(data.get('train_tokens'))} training tokens; held out {written(data.get('val_tokens'))} tokens, "
        f"{written(data.get('val_documents'))} documents, {written(data.get('val_bytes'))} bytes"
    )
    return layout.facts(
        [
            (
                "Parameters",
                written(model.get("parameters")),
                f"{written(model.get('layers'))} layers, width {written(model.get('dim'))}, "
                f"{written(model.get('heads'))} attention heads, "
                f"{written(model.get('vocab_size'))} tokens in the vocabulary, sequences of "
                f"{written(model.get('seq_len'))}",
            ),
            ("Tokens per run", written(budget.get("tokens")), f"{written(budget.get('tokens_per_step'))} per step"),
            ("Steps per run", written(budget.get("steps")), ""),
            ("Seeds", str(len(seeds)), escape(", ".join(map(str, seeds)))),
            (
                "Learning rates tried",
                str(len(rates)),
                ", ".join(_rate(rate) for rate in rates),
            ),
            (
                "Data",
                f"<code>{written(data.get('path'))}</code>",
                f"fingerprint <code>{written(data.get('fingerprint'))}</code>; {held_out}",
            ),
            ("Machine", written(study.at("machine")), ""),
            (
                "Versions",
                f"revision <code>{written(study.at('revision'))}</code>",
                escape(", ".join(f"{name} {version or NONE}" for name, version in versions.items())),
            ),
        ]
    )


# ---- (2) results


def _findings(study: _Study) -> str:
    """The table in sentences, which the figures write."""
    told = []
    waiting = sum(run.get("outcome") is None for run in study.at("runs") or [])
    if waiting:
        told.append(f"{waiting} of {len(study.at('runs'))} runs are {NOT_DONE}: all of this may change.")
    if study.trained:
        best = min(study.trained, key=lambda head: head["bits_per_byte"]["mean"])
        told.append(
            f"Lowest mean of held-out bits/byte: <strong>{escape(str(best['name']))}</strong>, "
            f"{best['bits_per_byte']['mean']:.4f}."
        )
    verdicts = {
        str(head["name"]): verdict(head.get("difference")) for head in study.trained if head["name"] != study.baseline
    }
    for word, sentence in (
        ("better", f"Better than {study.baseline}: the interval is below 0"),
        ("no difference", f"No difference to {study.baseline} shown: the interval includes 0"),
        ("worse", f"Worse than {study.baseline}: the interval is above 0"),
        (None, f"Without an interval of the difference to {study.baseline}"),
    ):
        names = [name for name, found in verdicts.items() if found == word]
        if names:
            told.append(f"{escape(sentence)}, for {_list(names)}." if word else f"{escape(sentence)}: {_list(names)}.")
    lost = [head for head in study.heads if head not in study.trained]
    told += [f"{escape(str(head['name']))}: {escape(_no_result(head))}." for head in lost]
    edge = [str(head["name"]) for head in study.heads if head.get("lr_at_edge")]
    if edge:
        told.append(
            f"At the edge of the learning rates tried, so perhaps not at {'their' if len(edge) > 1 else 'its'} best: "
            f"{_list(edge)}."
        )
    return f'<ul class="findings">{"".join(f"<li>{line}</li>" for line in told)}</ul>'


def _differences(study: _Study) -> str:
    means, differences = [], []
    for place, head in study.styled:
        found, gap = head.get("bits_per_byte"), head.get("difference")
        mean, off = _figure(found, "mean"), _figure(gap, "mean")
        if mean is not None:
            means.append(
                Interval(
                    study.names[place],
                    place,
                    mean,
                    _figure(found, "low"),
                    _figure(found, "high"),
                    [value for value in _at(found, "values") or [] if known(value)],
                    f"{mean:.4f} {_range(_figure(found, 'low'), _figure(found, 'high'), '{:.4f}')}".strip(),
                )
            )
        if off is not None:
            low, high = _figure(gap, "low"), _figure(gap, "high")
            differences.append(
                Interval(
                    study.names[place],
                    place,
                    off,
                    low,
                    high,
                    tip=f"{written(off, '{:+.4f}')} {_range(low, high, '{:+.4f}')}\n{verdict(gap) or 'no interval'}",
                )
            )
    baseline = escape(study.baseline)
    return layout.grid(
        [
            layout.figure(
                intervals("Held-out bits per byte by head, with 95% intervals", means, Axis("held-out bits/byte")),
                "Held-out bits/byte <small>lower is better; bar: 95% interval over seeds; faint: single seeds</small>",
                "No head has a result.",
            ),
            layout.figure(
                intervals(
                    f"Difference in held-out bits per byte to {study.baseline}, with 95% intervals",
                    differences,
                    Axis(f"bits/byte minus {study.baseline}'s", form=lambda v: short(v).replace("-", MINUS)),
                    at=0.0,
                ),
                f"Difference to {baseline} <small>left of the line is better; bar: 95% interval over seeds</small>",
                f"No head has a difference to {study.baseline}.",
            ),
        ],
        "pair",
    )


def _table(study: _Study) -> str:
    baseline = next((_figure(head, "tokens_per_s") for head in study.heads if head["name"] == study.baseline), None)
    columns = (
        "head",
        "learning rate",
        "held-out bits/byte<small>mean, 95% interval</small>",
        f"difference to {escape(study.baseline)}<small>95% over seeds, then over documents</small>",
        f"tokens/s<small>to {escape(study.baseline)}</small>",
        "J/token",
        "PCA90",
        "effective rank",
        "variance of ln gradient norm",
        "gradient spikes<small>of steps, mean over seeds</small>",
        "loss spikes<small>of steps, mean over seeds</small>",
        "diverged of runs started",
    )
    rows = [_row(study, place, head, baseline) for place, head in study.styled]
    notes = [study.counted if study.has_energy else study.no_energy]
    if any(head.get("lr_at_edge") for head in study.heads):
        notes.append("edge: the chosen learning rate is the smallest or the largest of those tried.")
    told = "".join(f'<p class="note-text">{escape(note)}</p>' for note in notes)
    return layout.table("Results by head", columns, rows) + told


def _row(study: _Study, place: int, head: Head, baseline_speed: float | None) -> list[str]:
    rate = _rate(_figure(head, "lr")) + (
        '<small><span class="tag">edge</span></small>' if head.get("lr_at_edge") else ""
    )
    speed, joules = _figure(head, "tokens_per_s"), _figure(head, "j_per_token")
    ratio = f"<small>{speed / baseline_speed:.2f}×</small>" if speed is not None and baseline_speed else ""
    gradient, learning = head.get("gradient_stability"), head.get("learning_stability")
    exponent = head.get("exponent")
    return [
        _named(study, place, f"exponent {written(exponent)}" if exponent is not None else ""),
        rate,
        _mean(head) if head in study.trained else f'<span class="tag">{escape(_no_result(head))}</span>',
        _difference(study, head),
        written(speed, "{:,.0f}") + ratio,
        written(joules, "{:.3g}", '<span class="soft wrap">not measured</span>' if head in study.trained else NONE),
        written(_figure(head, "pca90"), "{:,.4g}"),
        written(_figure(head, "effective_rank"), "{:,.1f}"),
        written(_figure(gradient, "log_norm_variance"), "{:.3g}"),
        _spikes(gradient),
        _spikes(learning),
        f"{written(head.get('diverged'))} of {written(head.get('started'))}"
        + (f"<small>{_failed(head)} failed</small>" if _failed(head) else ""),
    ]


def _mean(head: Head) -> str:
    found = head["bits_per_byte"]
    interval = _range(_figure(found, "low"), _figure(found, "high"), "{:.4f}") or "no interval"
    return f"{written(_figure(found, 'mean'), '{:.4f}')}<small>{interval}</small>"


def _difference(study: _Study, head: Head) -> str:
    if head["name"] == study.baseline:
        return '<span class="soft">baseline</span>'
    gap = head.get("difference")
    if _figure(gap, "mean") is None:
        return NONE
    word = verdict(gap)
    kind = word if word in ("better", "worse") else ""
    over = _range(_figure(gap, "low"), _figure(gap, "high"), "{:+.4f}") or "no interval over seeds"
    documents = _range(_figure(gap, "documents_low"), _figure(gap, "documents_high"), "{:+.4f}")
    told = f"{written(_figure(gap, 'mean'), '{:+.4f}')}"
    if word:
        told += f' <span class="tag {kind}">{word}</span>'
    return f"{told}<small>{over}</small>" + (f"<small>{documents}</small>" if documents else "")


def _spikes(stability: Mapping[str, Any] | None) -> str:
    spikes, judged = _figure(stability, "spikes"), _figure(stability, "judged")
    if spikes is None:
        return NONE
    return precise(spikes) + (f"<small>of {precise(judged)}</small>" if judged is not None else "")


# ---- (3) loss


Curve = Sequence[Mapping[str, Any]]


def _thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most so many points: each the mean loss of a stretch of records, where the stretch ends."""
    if len(curve) <= most:
        return curve
    found = []
    for place in range(most):
        stretch = curve[place * len(curve) // most : (place + 1) * len(curve) // most]
        losses = [one["loss"] for one in stretch if _figure(one, "loss") is not None]
        found.append({**stretch[-1], "loss": fmean(losses) if len(losses) == len(stretch) else None})
    return found


def _losses(study: _Study) -> str:
    against: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("tokens", "tokens", "tokens", lambda v: f"{v:,.0f}"),
        ("seconds", "seconds of training", "time", precise),
        ("joules", "joules", "energy", precise),
    )
    kinds = (
        ("eval_curve", "bits_per_byte", "bits/byte", "Held-out loss", study.unigram),
        ("train_curve", "loss", "nats/token", "Training loss", study.unigram_nats),
    )
    figures = []
    for curve, value, unit, title, unigram in kinds:
        for key, name, title_of, told in against:
            series = [
                Series(
                    study.names[place],
                    [(_figure(p, key) or math.nan, _figure(p, value)) for p in _thinned(head.get(curve) or [])],
                    place,
                )
                for place, head in study.styled
            ]
            low, high = _window(series, unigram)
            svg = ""
            if low is not None:
                svg = line_chart(
                    f"{title} in {unit} against {name}, one line for each head",
                    series,
                    Axis(name, log=True, told=told),
                    Axis(unit, low=low, high=high, told=lambda v: f"{v:.4f}"),
                    size=(300, 240),
                    rules=[Rule(unigram, "token frequencies")] if unigram is not None else [],
                )
            missing = study.no_energy if key == "joules" else f"No run recorded its {title.lower()} against {name}."
            figures.append(layout.figure(svg, f"{title} against {title_of}", missing))
    steps = [len(head.get("train_curve") or []) for head in study.heads]
    stretch = math.ceil(max(steps, default=0) / MOST_POINTS)
    smooth = f" Each point of a training curve is the mean of {stretch} records or fewer." if stretch > 1 else ""
    return (
        '<p class="soft">The chosen learning rate, first seed. The upper edge is near the loss of a model that only '
        f"knows how frequent each token is; what lies above it, as early in training, is cut off.{smooth} "
        "Tokens, seconds and joules are on logarithmic scales.</p>" + layout.grid(figures)
    )


def _window(series: Sequence[Series], unigram: float | None) -> tuple[float | None, float | None]:
    """Limits of an axis of losses: from the lowest to the highest end of a line, at least to the unigram model and at
    most 15% above it.
    """
    lines = [[y for x, y in one.points if y is not None and known(x)] for one in series]
    lines = [line for line in lines if line]
    if not lines:
        return None, None
    low, high = min(min(line) for line in lines), max(line[-1] for line in lines)
    high = max(max(line) for line in lines) if unigram is None else min(max(high, unigram), 1.15 * unigram)
    room = 0.06 * abs(high - low) or 0.1
    return low - room, max(high, low) + room


# ---- (4) radar


def _log_share(value: float, scale: tuple[float, float]) -> float:
    centre, rim = scale
    return math.log(value / centre) / math.log(rim / centre)


def _corners(study: _Study, head: Head) -> list[tuple[float | None, str]]:
    """Sustainability, quality and interpretability: not clipped, and the figure each comes from in words."""
    bits, pca90 = _figure(head, "bits_per_byte", "mean"), _figure(head, "pca90")
    width = study.figure("model", "dim")
    spent = _figure(head, "j_per_token" if study.has_energy else "seconds_per_token")
    scale, unit = (J_PER_TOKEN, "J/token") if study.has_energy else (SECONDS_PER_TOKEN, "s/token")
    quality = None if bits is None or not study.unigram else 1 - bits / study.unigram
    interpretability = None if pca90 is None or not width else 1 - pca90 / width
    return [
        (_log_share(spent, scale) if spent else None, f"{precise(spent)} {unit}" if spent else NONE),
        (quality, NONE if bits is None else f"{bits:.4f} bits/byte"),
        (interpretability, NONE if pca90 is None else f"PCA90 {pca90:.4g}" + (f" of {width:g}" if width else "")),
    ]


def _radars(study: _Study) -> str:
    first = "sustainability" if study.has_energy else "time"
    axes = (first, "quality", "interpretability")
    corners = [_corners(study, head) for head in study.heads]
    clipped, figures = [], []

    def outline(place: int, muted: bool = False) -> Outline:
        shares = [None if share is None else min(max(share, 0.0), 1.0) for share, _ in corners[place]]
        tips = [
            f"{axis} {NONE if share is None else f'{share:.2f}'} ({told})"
            for axis, share, (_, told) in zip(axes, shares, corners[place], strict=True)
        ]
        return Outline(study.names[place], shares, place, tips, muted)

    for place in range(len(study.heads)):
        rows = []
        for axis, (share, told) in zip(axes, corners[place], strict=True):
            off = share is not None and not 0 <= share <= 1
            if off:
                clipped.append(f"{study.names[place]}, {axis}")
            shown = NONE if share is None else f"{min(max(share, 0.0), 1.0):.2f}" + (" (clipped)" if off else "")
            rows.append(f'<tr title="{escape(told)}"><th scope="row">{axis}</th><td>{shown}</td></tr>')
        svg = ""
        if any(share is not None for share, _ in corners[place]):
            beneath = [outline(0, muted=True)] if study.has_baseline and place else []
            told = ", ".join(
                f"{axis} {NONE if share is None else f'{share:.2f}'}"
                for axis, (share, _) in zip(axes, corners[place], strict=True)
            )
            svg = radar(f"{study.names[place]}: {told}", axes, [*beneath, outline(place)])
        below = f'<table class="values"><tbody>{"".join(rows)}</tbody></table>'
        missing = _no_result(study.heads[place]).capitalize() + "."
        figures.append(layout.figure(svg, _named(study, place), missing, place, below))
    return _radar_words(study, clipped) + layout.grid(figures, "duo")


def _radar_words(study: _Study, clipped: Sequence[str]) -> str:
    if study.has_energy:
        centre, rim = (short(value) for value in J_PER_TOKEN)
        third = (
            f"Sustainability is the energy per token of training, logarithmic: {centre} J at the centre, {rim} J at "
            "the rim."
        )
    else:
        centre, rim = (short(value) for value in SECONDS_PER_TOKEN)
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
    return f'<ul class="findings soft">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


# ---- (5) to (8)


def _scree(study: _Study) -> str:
    lines = {
        place: [(rank, share) for rank, share in enumerate(head.get("scree") or [], start=1) if known(share)]
        for place, head in study.styled
    }
    most = max((len(line) for line in lines.values()), default=0)
    figures = []
    for place, head in study.styled:
        svg, needed, small = "", _figure(head, "pca90"), ""
        if lines[place]:
            beneath = [Series(study.baseline, lines[0], 0, muted=True)] if study.has_baseline and place else []
            first = next(((rank, share) for rank, share in lines[place] if share >= SHARE_90), None)
            svg = line_chart(
                f"{study.names[place]}: cumulative share of the variance of the prototypes by number of components",
                [*beneath, Series(study.names[place], lines[place], place, ringed=[first] if first else [])],
                Axis("components", log=True, low=1, high=most, told=lambda v: f"{v:.0f}"),
                Axis("share of variance", low=0.0, high=1.0, form=percent, told=percent),
                size=(150, 140),
                direct=False,
                rules=[Rule(SHARE_90, "90%", left=True)],
            )
            small = "" if needed is None else f"PCA90 {needed:.4g}"
        missing = "Not measured." if head in study.trained else _no_result(head).capitalize() + "."
        figures.append(layout.figure(svg, _named(study, place, small), missing, place))
    return (
        '<p class="soft">Share of the variance of the prototypes that their first principal components hold together. '
        f"A line that rises early lies in few directions. Ring: where 90% is reached in this run; grey: "
        f"{escape(study.baseline)}; PCA90 in the heading is the mean over seeds.</p>" + layout.grid(figures, "duo")
    )


def shown(text: str) -> str:
    """A token's text with its blanks and control characters made visible."""
    marks = {"\n": "⏎", "\t": "⇥", " ": "␣", "▁": "␣", "\r": "␍"}
    return "".join(marks.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text) or "(empty)"


def _projections(study: _Study) -> str:
    figures = []
    for place, head in study.styled:
        found = head.get("projection") or {}
        points = [
            Point(
                x,
                y,
                shown(str(text)),
                count or 0,
                f"“{shown(str(text))}”\n{written(count)} times in training",
                shown(str(text)).lstrip("␣"),
            )
            for x, y, text, count in found.get("points") or []
            if known(x) and known(y)
        ]
        first, second = [*(found.get("explained") or []), None, None][:2]
        shares = [percent(share) if known(share) else "share not known" for share in (first, second)]
        svg = scatter(
            f"{study.names[place]}: {len(points)} prototypes on their first two principal components",
            points,
            Axis(f"component 1 ({shares[0]})", ticks=False),
            Axis(f"component 2 ({shares[1]})", ticks=False),
            name=study.names[place],
            style=place,
            size=(190, 190),
        )
        missing = "Not measured." if head in study.trained else _no_result(head).capitalize() + "."
        figures.append(layout.figure(svg, _named(study, place), missing, place))
    return (
        '<p class="soft">Prototypes of frequent tokens on the first two principal components of all prototypes, first '
        "seed; in brackets, the share of the variance along each axis: what is left out is the rest. Larger points: "
        "the more frequent half; some are named where there is room. Point at one, or tap, for its token (␣ blank, "
        f"⏎ new line), and how often it is among the first {short(UNIGRAM_TOKENS)} tokens of training. Directions, "
        "signs and units differ from head to head.</p>" + layout.grid(figures, "small")
    )


def _norms(study: _Study) -> str:
    figures = []
    for key, name, title in (
        ("median", "median length", "Median length"),
        ("max/median", "longest / median", "Longest over median"),
    ):
        series = [
            Series(
                study.names[place],
                sorted((float(step), _figure(norms, key)) for step, norms in (head.get("norms") or {}).items()),
                place,
            )
            for place, head in study.styled
        ]
        values = [y for one in series for _, y in one.points if y is not None and y > 0]
        wide = bool(values) and max(values) > 12 * min(values)
        svg = line_chart(
            f"{title} of the prototypes against steps, one line for each head",
            series,
            Axis("steps", low=0.0, told=lambda v: f"{v:,.0f}"),
            Axis(name, log=wide),
            size=(300, 220),
        )
        scale = "logarithmic scale" if wide else "linear scale"
        figures.append(layout.figure(svg, f"{title} <small>{scale}</small>", "Not measured."))
    return (
        '<p class="soft">Euclidean lengths of the prototypes as trained, first seed. A ratio that keeps growing says '
        "that few tokens run away from the rest.</p>" + layout.grid(figures, "pair")
    )


def _sweeps(study: _Study) -> str:
    rates = [rate for rate in study.at("lrs") or [] if known(rate)]
    lines = {place: _by_rate(head) for place, head in study.styled}
    values = [value for line in lines.values() for _, value in line if value is not None]
    figures = []
    low, high = min(values, default=0.0), max(values, default=1.0)
    if study.unigram is not None and high > study.unigram > low:
        high = study.unigram
    room = 0.08 * (high - low) or 0.1
    for place, head in study.styled:
        sweep = head.get("sweep") or []
        done = [(e["lr"], _figure(e, "bits_per_byte")) for e in sweep if e.get("outcome") == "done"]
        lost: dict[float, list[str]] = {}
        for entry in sweep:
            if entry.get("outcome") != "done":
                lost.setdefault(entry["lr"], []).append(str(entry.get("outcome")))
        crosses = [
            (rate, ", ".join(f"{found.count(word)} {word}" for word in sorted(set(found))))
            for rate, found in lost.items()
        ]
        chosen = [(rate, value) for rate, value in lines[place] if rate == head.get("lr")]
        beneath = [Series(study.baseline, lines[0], 0, muted=True)] if study.has_baseline and place else []
        mine = Series(study.names[place], lines[place], place, dots=done, ringed=chosen, crosses=crosses)
        svg = line_chart(
            f"{study.names[place]}: held-out bits per byte by learning rate",
            [*beneath, mine] if sweep else [],
            Axis("learning rate", True, min(rates, default=None), max(rates, default=None), form=_rate, told=_rate),
            Axis("bits/byte", low=low - room, high=high + room, told=lambda v: f"{v:.4f}"),
            size=(150, 140),
            direct=False,
        )
        rate = _figure(head, "lr")
        small = (
            "none chosen"
            if rate is None
            else f"chosen {_rate(rate)}" + (", at the edge" if head.get("lr_at_edge") else "")
        )
        figures.append(layout.figure(svg, _named(study, place, small), "No run was started.", place))
    return (
        '<p class="soft">Held-out bits/byte by learning rate, all on the same scale. Dots: runs; line: mean over the '
        f"seeds that finished; ring: chosen; cross: runs that diverged or failed there; grey: "
        f"{escape(study.baseline)}. What lies above the upper edge, which is at most the loss of token "
        "frequencies, is cut off.</p>" + layout.grid(figures, "duo")
    )


def _by_rate(head: Head) -> list[tuple[float, float | None]]:
    found: dict[float, list[float]] = {}
    for entry in head.get("sweep") or []:
        value = _figure(entry, "bits_per_byte")
        if entry.get("outcome") == "done" and value is not None:
            found.setdefault(entry["lr"], []).append(value)
    return [(rate, fmean(values)) for rate, values in sorted(found.items())]


# ---- (9) methods


def _methods(study: _Study) -> str:
    definitions = {
        "Matched budget": "Every run has the same decoder, the same data in the same order for a seed, the same number "
        "of tokens and steps; only the output head, the learning rate and the seed differ.",
        "Learning rate": "Every head is trained at every rate with the first seed. The rate with the lowest mean of "
        "held-out bits/byte over its seeds so far gets the next one, until the best has them all; a rate with a run "
        "that diverged comes after those without. The seeds that chose are those that are reported. The edge mark says "
        "that a smaller or larger rate might have been better still.",
        "Exponent": "n of the probabilities d^-n / sum of d^-n; sqrt_dim: the square root of the width.",
        "Bits/byte": "Negative log likelihood of the held-out text in bits, over its bytes; it does not depend on the "
        "tokenizer. Lower is better.",
        "95% interval": "Of the mean, over seeds; the second interval of a difference is over held-out documents and "
        "says nothing about seeds.",
        "Better, worse, no difference": "The interval over seeds of the difference in bits/byte lies below 0, above 0, "
        "or includes 0; the last does not show that two heads are equal. No correction for comparing several heads.",
        "Tokens/s": "Median over a run's records but the first, and over seeds; beneath it, as a multiple of the "
        "baseline's.",
        "J/token": "Joules of training over its tokens, of the parts of the machine that every run measured.",
        "Prototypes": "They are taken as the head's distance sees them (of length 1 for cosine, for one), less their "
        "mean.",
        "PCA90": "The fewest principal components of the prototypes that hold 90% of their variance, mean over seeds; "
        "at most the width.",
        "Effective rank": "exp of the entropy of the singular values of the prototypes, taken as shares of their sum "
        "(Roy and Vetterli, 2007), mean over seeds.",
        "Variance of ln gradient norm": "Over steps after the warm-up, of the global gradient norm before clipping.",
        "Gradient spikes": f"Steps with a norm above {NORM_SPIKE:g} times the median of the {WINDOW} steps before.",
        "Loss spikes": f"Steps with a training loss more than {LOSS_SPIKE:g} robust standard deviations above the "
        f"median of the {WINDOW} steps before.",
        "Diverged": "Runs whose outcome was divergence, of all runs that were started for that head.",
        "Token frequencies": "The unigram model: every token with its share of the training tokens, whatever came "
        "before it.",
    }
    limits = [
        "One model size, one data set and one machine: nothing here says how heads compare at other sizes.",
        "Curves, projections and lengths are of the first seed alone.",
        "Time depends on the machine and on how far each head's code was tuned for it.",
        "PCA90 and effective rank describe how prototypes lie, not whether a person understands them.",
        "A learning rate chosen on the held-out text that is also reported favours every head a little.",
    ]
    if not study.has_energy:
        limits.append(study.no_energy)
    return layout.methods(definitions, limits)


def _footer(study: _Study) -> str:
    runs = study.at("runs") or []
    outcomes: dict[str, int] = {}
    for run in runs:
        outcome = str(run.get("outcome") or NOT_DONE)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    counted = f"{len(runs)} runs ({told}). " if runs else ""
    return f"<footer>{escape(counted)}{len(study.heads)} heads. This file needs no network.</footer>"
