"""How settings were chosen: the search, what it took, where the choices lie, and how much of them was luck."""

from __future__ import annotations

from html import escape

from pretrain.study.page import layout
from pretrain.study.page.charts.numbers import short
from pretrain.study.page.layout import NONE, plural, small, written
from pretrain.study.page.sections.study import Figures, Head, Study


def protocol(study: Study) -> str:
    """The protocol in sentences, and two tables: the chosen settings, and what choosing took."""
    return layout.findings(_sentences(study)) + _edges(study) + _chosen(study) + _spent(study)


def _sentences(study: Study) -> list[str]:
    told = Figures(study.at("protocol"))
    rungs = zip(told.at("counts") or [], told.at("steps") or [], strict=False)
    ladder = ", then ".join(f"{plural(count, 'trial')} of {steps:,} steps" for count, steps in rungs)
    lines = [
        f"Every head had {told.text('trials')} trials at the size {told.text('tuned_at')}: {escape(ladder)}. The first "
        "is the head's own default; the others are the same points of the space for all heads (seed "
        f"{told.text('seed')}). The best by bits/byte of the validation split went on, and the best of the last rung "
        "was chosen, before any fresh seed was trained.",
        f"The chosen setting was trained anew with {plural(len(study.seeds), 'seed')} that had chosen nothing, at "
        f"{plural(len(study.sizes), 'size')}, and scored once on the test split.",
    ]
    if (least := told.figure("smallest_in_deviations")) is not None:
        lines.append(
            f"Said in advance: with {plural(len(study.seeds), 'seed')} and {told.text('comparisons')} comparisons, a "
            f"difference is found with probability {told.text('power')} if it is {least:.2f} standard deviations of "
            "paired differences between seeds, or more; documents add to that."
        )
    return [*lines, *map(escape, told.at("warnings") or [])]


def _edges(study: Study) -> str:
    entries = [Figures(edge) for edge in study.at("edges") or []]
    if not entries:
        return ""
    lines = [
        f"<strong>{edge.text('head')}</strong>: {edge.text('setting')} {edge.text('value', form='{:.4g}')} lies at the "
        f"{edge.text('end')} end of {edge.text('tried')}; try {edge.text('try')}" + _behind(edge)
        for edge in entries
    ]
    chance, opened = study.figure("protocol", "edges_by_chance"), sum(bool(edge.at("open")) for edge in entries)
    by_chance = f" Of values that make no difference, {chance:.1f} would lie there by chance." if chance else ""
    counts = (
        f"{opened} of them count{'s' * (opened == 1)}: the best trial inside is further behind than fresh seeds "
        "lie apart, so a better value may lie beyond, and no head is called the best."
        if opened
        else "No one of them counts: the best trial inside is no further behind than fresh seeds lie apart."
    )
    return layout.soft(
        f"{plural(len(entries), 'chosen value')} at an edge of what was tried. {counts}{by_chance}"
    ) + layout.findings(lines, "findings soft")


def _behind(edge: Figures) -> str:
    behind = edge.figure("behind")
    told = "" if behind is None else written(behind, "{:+.4f}")
    spread = written(edge.figure("spread"), "{:.4f}") if edge.figure("spread") is not None else "unknown"
    where = "the best trial inside, after the last rung that has one"
    return told and f" ({where}: {told} bits/byte; spread of fresh seeds {spread})"


def _chosen(study: Study) -> str:
    columns = ("head", *map(escape, study.space), "known recipe<small>chosen over known</small>")
    return layout.table("Chosen settings", columns, [_setting(study, head) for head in study.heads])


def _setting(study: Study, head: Head) -> list[str]:
    cells = []
    for name in study.space:
        edge = small('<span class="tag">edge</span>') if name in head.at_edge else ""
        own = small("range of its own") if name in (head.at("own_space") or {}) else ""
        cells.append(written(head.setting.get(name), "{:.4g}") + edge + own)
    known = head.at("known", "source")
    ratios = head.at("known", "ratios") or {}
    far = ", ".join(f"{escape(name)} {written(ratio, '{:.3g}×')}" for name, ratio in ratios.items())
    return [layout.named(head.style, head.name), *cells, escape(str(known)) + small(far) if known else NONE]


def _spent(study: Study) -> str:
    columns = (
        "head",
        "trials",
        "runs of trials<small>all rungs</small>",
        "diverged",
        "tokens of trials",
        "chosen trial<small>validation bits/byte</small>",
        "fresh seeds<small>mean</small>",
        "too good by<small>95% over seeds</small>",
    )
    rows = []
    for head in study.heads:
        spent, luck = Figures(head.at("spent")), Figures(head.at("winners_curse"))
        tokens = spent.figure("tokens")
        rows.append(
            [
                layout.named(head.style, head.name),
                *(spent.text(name) for name in ("trials", "runs", "diverged")),
                NONE if tokens is None else short(tokens),
                *(luck.text(name, form="{:.4f}") for name in ("trial", "fresh")),
                luck.text("mean", form="{:+.4f}") + small(luck.bounds("{:+.4f}")),
            ]
        )
    return layout.table("What choosing took, and how much of it was luck", columns, rows) + layout.soft(
        "A choice is the best of several noisy results, so its own result is too good on average (the winner's curse). "
        "The same setting with fresh seeds has no such luck.",
        "note-text",
    )
