"""What was compared, and what came out in sentences and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from pretrain.study.page import layout
from pretrain.study.page.charts.axes import Axis
from pretrain.study.page.charts.intervals import Interval, intervals
from pretrain.study.page.charts.numbers import known, short
from pretrain.study.page.layout import MINUS, NONE, plural, written
from pretrain.study.page.sections.study import Study, verdict
from pretrain.study.page.sections.sweeps import rate_text

NOT_DONE = "not done"


def lede(study: Study) -> str:
    """What was compared with what, in a sentence."""
    parameters, tokens = study.figure("model", "parameters"), study.figure("budget", "tokens")
    size = f" of {short(parameters)} parameters" if parameters is not None else ""
    length = f" for {short(tokens)} tokens" if tokens is not None else ""
    heads = plural(len(study.heads) - study.has_baseline, "distance-based output head")
    return (
        f"{heads} compared with {study.baseline} on the same language model{size}, trained{length} on the same text in "
        f"the same order: with one seed at {plural(len(study.rates), 'learning rate')}, and at the best of them with "
        f"{plural(len(study.seeds), 'seed')} in all."
    )


def budget(study: Study) -> str:
    """Sizes, data, machine and versions."""
    versions = study.at("versions") or {}
    return layout.facts(
        [
            (
                "Parameters",
                study.text("model", "parameters"),
                f"{study.text('model', 'layers')} layers, width {study.text('model', 'dim')}, "
                f"{study.text('model', 'heads')} attention heads, "
                f"{study.text('model', 'vocab_size')} tokens in the vocabulary, sequences of "
                f"{study.text('model', 'seq_len')}",
            ),
            ("Tokens per run", study.text("budget", "tokens"), f"{study.text('budget', 'tokens_per_step')} per step"),
            ("Steps per run", study.text("budget", "steps"), ""),
            ("Seeds", str(len(study.seeds)), escape(", ".join(map(str, study.seeds)))),
            ("Learning rates tried", str(len(study.rates)), ", ".join(map(rate_text, study.rates))),
            (
                "Data",
                f"<code>{study.text('data', 'path')}</code>",
                f"fingerprint <code>{study.text('data', 'fingerprint')}</code>; {study.text('data', 'train_tokens')} "
                f"training tokens; held out {study.text('data', 'val_tokens')} tokens, "
                f"{study.text('data', 'val_documents')} documents, {study.text('data', 'val_bytes')} bytes",
            ),
            ("Machine", study.text("machine"), ""),
            (
                "Versions",
                f"revision <code>{study.text('revision')}</code>",
                escape(", ".join(f"{name} {version or NONE}" for name, version in versions.items())),
            ),
        ]
    )


def findings(study: Study) -> str:
    """The table in sentences, which the figures write."""
    sentences = []
    waiting = sum(run.get("outcome") is None for run in study.runs)
    if waiting:
        sentences.append(f"{waiting} of {len(study.runs)} runs are {NOT_DONE}: all of this may change.")
    if study.trained:
        best = min(study.trained, key=lambda head: head.at("bits_per_byte", "mean"))
        name, bits = escape(best.name), best.bits.text("mean", form="{:.4f}")
        sentences.append(f"Lowest mean of held-out bits/byte: <strong>{name}</strong>, {bits}.")
    baseline = escape(study.baseline)
    for word, sentence in (
        ("better", f"Better than {baseline}: the interval is below 0, for"),
        ("no difference", f"No difference to {baseline} shown: the interval includes 0, for"),
        ("worse", f"Worse than {baseline}: the interval is above 0, for"),
        (None, f"Without an interval of the difference to {baseline}:"),
    ):
        others = [head for head in study.trained if not head.is_baseline]
        names = [head.name for head in others if verdict(head.difference.tree) == word]
        if names:
            sentences.append(f"{sentence} {_listed(names)}.")
    sentences += [escape(f"{head.name}: {head.no_result}.") for head in study.heads if not head.trained]
    edge = [head.name for head in study.heads if head.at_edge]
    if edge:
        whose = "their" if len(edge) > 1 else "its"
        sentences.append(f"At the edge of the learning rates tried, so perhaps not at {whose} best: {_listed(edge)}.")
    return layout.findings(sentences)


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return escape(f"{', '.join(most)} and {last}" if most else last)


def differences(study: Study) -> str:
    """Held-out bits/byte of each head, and less the baseline's."""
    means, gaps = [], []
    for head in study.heads:
        bits, gap = head.bits, head.difference
        mean, apart = bits.figure("mean"), gap.figure("mean")
        if mean is not None:
            values = [value for value in bits.at("values") or [] if known(value)]
            tip = f"{mean:.4f} {bits.bounds('{:.4f}')}".strip()
            means.append(Interval(head.name, head.style, mean, bits.figure("low"), bits.figure("high"), values, tip))
        if apart is not None:
            tip = f"{written(apart, '{:+.4f}')} {gap.bounds('{:+.4f}')}\n{verdict(gap.tree) or 'no interval'}"
            gaps.append(Interval(head.name, head.style, apart, gap.figure("low"), gap.figure("high"), tip=tip))
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
                    gaps,
                    Axis(f"bits/byte minus {study.baseline}'s", form=lambda value: short(value).replace("-", MINUS)),
                    at=0.0,
                ),
                f"Difference to {escape(study.baseline)} <small>left of the line is better; bar: 95% interval over "
                "seeds</small>",
                f"No head has a difference to {study.baseline}.",
            ),
        ],
        "pair",
    )


def footer(study: Study) -> str:
    """How many runs came to which end."""
    outcomes = Counter(str(run.get("outcome") or NOT_DONE) for run in study.runs)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    runs = f"{len(study.runs)} runs ({counts}). " if study.runs else ""
    return f"{runs}{len(study.heads)} heads."
