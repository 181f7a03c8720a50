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

NOT_DONE = "not done"


def lede(study: Study) -> str:
    """What was compared with what, in a sentence."""
    parameters, tokens = study.figure("model", "parameters"), study.figure("budget", "tokens")
    size = f" of {short(parameters)} parameters" if parameters is not None else ""
    length = f" for {short(tokens)} tokens" if tokens is not None else ""
    heads = plural(len(study.heads) - study.has_baseline, "output head")
    trials = study.figure("protocol", "trials")
    tuned = f" was tuned with {plural(int(trials), 'trial')} and" if trials is not None else ""
    return (
        f"{heads} compared with {study.baseline} on the same language model{size}, trained{length} on the same text in "
        f"the same order. Each, {study.baseline} too,{tuned} was then trained anew with "
        f"{plural(len(study.seeds), 'seed')} that had chosen nothing, and scored on text that choosing never saw."
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
            (
                "Tokens per run, shown size",
                study.text("budget", "tokens"),
                f"{study.text('budget', 'tokens_per_step')} per step",
            ),
            ("Steps per run, shown size", study.text("budget", "steps"), ""),
            ("Fresh seeds", str(len(study.seeds)), escape(", ".join(map(str, study.seeds)))),
            ("Trials of each head", study.text("protocol", "trials"), escape(", ".join(study.space))),
            (
                "Data",
                f"<code>{study.text('data', 'path')}</code>",
                f"fingerprint <code>{study.text('data', 'fingerprint')}</code>; {study.text('data', 'train_tokens')} "
                f"training tokens; chosen on {study.text('data', 'val_documents')} documents of "
                f"{study.text('data', 'val_bytes')} bytes; reported on {study.text('data', 'test_documents')} of "
                f"{study.text('data', 'test_bytes')}",
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
    if not study.at("chosen"):
        sentences.append("No setting was chosen yet: there is nothing to report.")
    sentences += _best(study) if study.settled else _unsettled(study)
    sentences += [escape(f"{head.name}: {head.no_result}.") for head in study.heads if not head.trained]
    least = study.figure("protocol", "smallest_in_deviations")
    shown = next((size for size in study.sizes if size.at("name") == study.at("shown")), None)
    if shown is not None and least is not None and (found := shown.figure("smallest_difference")) is not None:
        sentences.append(
            f"The smallest difference that this budget could have shown, with probability "
            f"{study.text('protocol', 'power')}, is {found:.4f} bits/byte in the median over heads: where none was "
            "shown, there may be one below that."
        )
    return layout.findings(sentences)


def _unsettled(study: Study) -> list[str]:
    if study.at("protocol", "trials") == 1:
        return ["<strong>No head is called best here</strong>: each had one trial, its default, so nothing was tuned."]
    edges = sorted({str(edge.get("head") or NONE) for edge in study.at("edges") or [] if edge.get("open")})
    if not edges:
        return []
    whose = "settings" if len(edges) > 1 else "a setting"
    return [
        "<strong>No head is called best, better or worse here</strong>: a chosen value lies at the edge of what was "
        f"tried, so that a better one may lie beyond, in {whose} of {_listed(edges)}. See Protocol."
    ]


def _best(study: Study) -> list[str]:
    """What is said of heads in a study whose choices all lie within what was tried."""
    sentences = []
    best = next((head for head in study.trained if head.name == study.at("best")), None)
    if best is not None:
        name, bits = escape(best.name), best.bits.text("mean", form="{:.4f}")
        sentences.append(f"Lowest mean of test bits/byte: <strong>{name}</strong>, {bits}.")
    baseline = escape(study.baseline)
    for word, sentence in (
        ("better", f"Better than {baseline}: the corrected interval is below 0, for"),
        ("no difference", f"No difference to {baseline} shown: the corrected interval includes 0, for"),
        ("worse", f"Worse than {baseline}: the corrected interval is above 0, for"),
        (None, f"Without an interval of the difference to {baseline}:"),
    ):
        others = [head for head in study.trained if not head.is_baseline]
        names = [head.name for head in others if verdict(head.difference.tree) == word]
        if names:
            sentences.append(f"{sentence} {_listed(names)}.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return escape(f"{', '.join(most)} and {last}" if most else last)


def differences(study: Study) -> str:
    """Test bits/byte of each head, and less the baseline's, at the size that is shown."""
    means, gaps = [], []
    for head in study.heads:
        bits, gap = head.bits, head.difference
        mean, apart = bits.figure("mean"), gap.figure("mean")
        if mean is not None:
            values = [value for value in bits.at("values") or [] if known(value)]
            tip = f"{mean:.4f} {bits.bounds('{:.4f}')}".strip()
            means.append(Interval(head.name, head.style, mean, bits.figure("low"), bits.figure("high"), values, tip))
        if apart is not None:
            low, high = gap.figure("corrected_low"), gap.figure("corrected_high")
            tip = f"{written(apart, '{:+.4f}')} {gap.bounds('{:+.4f}', 'corrected_') or 'no interval'}"
            values = [value for value in gap.at("values") or [] if known(value)]
            gaps.append(Interval(head.name, head.style, apart, low, high, values, tip))
    return layout.grid(
        [
            layout.figure(
                intervals("Test bits per byte by head, with 95% intervals", means, Axis("test bits/byte")),
                "Test bits/byte <small>lower is better; bar: 95% interval over seeds and documents, which are hard or "
                "easy for all heads alike; faint: single seeds</small>",
                "No head has a result.",
            ),
            layout.figure(
                intervals(
                    f"Difference in test bits per byte to {study.baseline}, with corrected intervals",
                    gaps,
                    Axis(f"bits/byte minus {study.baseline}'s", form=lambda value: short(value).replace("-", MINUS)),
                    at=0.0,
                ),
                f"Difference to {escape(study.baseline)} <small>left of the line is better; bar: interval over "
                "seeds and documents, corrected for all heads; faint: single seeds</small>",
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
