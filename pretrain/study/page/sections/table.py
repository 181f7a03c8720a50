"""All figures of all heads, a row each."""

from __future__ import annotations

from html import escape

from pretrain.study.page import layout
from pretrain.study.page.charts.numbers import precise
from pretrain.study.page.layout import NONE, small
from pretrain.study.page.sections.study import Figures, Head, Study, verdict
from pretrain.study.page.sections.sweeps import rate_text


def table(study: Study) -> str:
    """All figures, a row for each head, with notes beneath on energy and edges."""
    columns = (
        "head",
        "learning rate",
        "held-out bits/byte<small>mean, 95% interval</small>",
        f"difference to {escape(study.baseline)}<small>95% over seeds, then over documents</small>",
        f"tokens/s<small>to {escape(study.baseline)}</small>",
        "J/token",
        "PCA90",
        "PCA90 of what was learnt<small>start's share of the variance</small>",
        "PCA90 of final states",
        "effective rank",
        "gradient unrest<small>variance of ln norm about its running median</small>",
        "gradient spikes<small>of steps, mean over seeds</small>",
        "loss spikes<small>of steps, mean over seeds</small>",
        "diverged of runs started",
    )
    baseline_speed = study.heads[0].figure("tokens_per_s") if study.has_baseline else None
    rows = [_row(head, baseline_speed) for head in study.heads]
    notes = [study.counted if study.has_energy else study.no_energy]
    if any(head.at_edge for head in study.heads):
        notes.append("edge: the chosen learning rate is the smallest or the largest of those tried.")
    return layout.table("Results by head", columns, rows) + "".join(layout.soft(note, "note-text") for note in notes)


def _row(head: Head, baseline_speed: float | None) -> list[str]:
    edge = small('<span class="tag">edge</span>' if head.at_edge else "")
    speed = head.figure("tokens_per_s")
    ratio = small(f"{speed / baseline_speed:.2f}×" if speed is not None and baseline_speed else "")
    exponent = f"exponent {head.text('exponent')}" if head.at("exponent") is not None else ""
    no_joules = '<span class="soft wrap">not measured</span>' if head.trained else NONE
    return [
        layout.named(head.style, head.name, exponent),
        rate_text(head.figure("lr")) + edge,
        _mean(head) if head.trained else f'<span class="tag">{escape(head.no_result)}</span>',
        _difference(head),
        head.text("tokens_per_s", form="{:,.0f}") + ratio,
        head.text("j_per_token", form="{:.3g}", missing=no_joules),
        head.text("pca90", form="{:,.4g}"),
        head.text("displacement_pca90", form="{:,.4g}") + _start(head),
        head.text("hidden_pca90", form="{:,.4g}"),
        head.text("effective_rank", form="{:,.1f}"),
        head.text("gradient_stability", "residual_variance", form="{:.3g}"),
        _spikes(Figures(head.at("gradient_stability"))),
        _spikes(Figures(head.at("learning_stability"))),
        f"{head.text('diverged')} of {head.text('started')}" + small(f"{head.failed} failed" if head.failed else ""),
    ]


def _mean(head: Head) -> str:
    return head.bits.text("mean", form="{:.4f}") + small(head.bits.bounds("{:.4f}") or "no interval")


def _difference(head: Head) -> str:
    gap = head.difference
    if head.is_baseline:
        return '<span class="soft">baseline</span>'
    if gap.figure("mean") is None:
        return NONE
    word = verdict(gap.tree)
    kind = word if word in ("better", "worse") else ""
    tag = f' <span class="tag {kind}">{word}</span>' if word else ""
    seeds = gap.bounds("{:+.4f}") or "no interval over seeds"
    return gap.text("mean", form="{:+.4f}") + tag + small(seeds) + small(gap.bounds("{:+.4f}", "documents_"))


def _start(head: Head) -> str:
    return small(head.text("start_share", form="{:.0%}")) if head.figure("start_share") is not None else ""


def _spikes(stability: Figures) -> str:
    spikes, judged = stability.figure("spikes"), stability.figure("judged")
    if spikes is None:
        return NONE
    return precise(spikes) + small(f"of {precise(judged)}" if judged is not None else "")
