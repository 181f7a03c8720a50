"""Arithmetic on what a run measured: energy, emissions, cost, joules to a target, stability. Plain numbers: no torch.

Figures are None where nothing was measured. Definitions and limits: docs/energy.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import Any

from common.carbon_intensity import GRID_SOURCE, grid_intensity
from pretrain.records import PARTS, Counters, Eval, Phase, Record, Train, of_kind

SETTLING = 0.1  # of a run's steps after its warm-up, before its stability is judged
WINDOW = 21  # steps, odd: the one in the middle is compared with the median of all
ENOUGH = 20  # steps with a whole window, or there is no figure
SPIKE = 6.0  # robust standard deviations above the trend
LEAST_SPIKE = 0.1  # nats of a loss, or of ln(norm): runs without noise have no spikes of rounding
MAD_TO_SIGMA = 1.4826  # of a normal distribution
# What the median of WINDOW normal values takes of their variance v: a value less that median has the variance
# v + Var(median) - 2 v / WINDOW, as Cov(value, median) = Cov(mean, median) = Var(mean); Var(median) is near
# v pi / 2 / (WINDOW + pi / 2 - 1).
TREND_SHARE = 1 + math.pi / 2 / (WINDOW + math.pi / 2 - 1) - 2 / WINDOW

Records = Sequence[Record]


def kwh(energy_j: float) -> float:
    """Joules in kilowatt hours."""
    return energy_j / 3.6e6


def missing_parts(records: Records) -> dict[str, str]:
    """Part -> why it was not measured over the whole run, from the records that say so."""
    missing: dict[str, str] = {}
    for record in of_kind(records, Counters):
        missing = {**record.missing, **missing}
    return missing


def joules_of(records: Records, part: str, kind: str | None = None) -> float | None:
    """Joules of a part in the records of a kind (None: of every phase); None if the part was not measured throughout.

    Where a `counters` record says that the part is measured, a record without a figure was a window too short for its
    counter: its joules are in the next one.
    """
    spent = [phase.joules(part) for phase in of_kind(records, Phase) if kind in (None, phase.kind)]
    measured = [joules for joules in spent if joules is not None]
    declared = bool(records) and isinstance(records[0], Counters)
    throughout = declared and part not in missing_parts(records)
    return sum(measured) if measured and (throughout or len(measured) == len(spent)) else None


def measured_parts(records: Records) -> list[str]:
    """The parts of the machine that were measured over the whole run, in the order of PARTS."""
    return [part for part in PARTS if joules_of(records, part) is not None]


def measured_joules(records: Records, kind: str | None = None) -> float | None:
    """Joules of all parts that were measured throughout, in the records of a kind (None: of all); None if none was."""
    by_part = [joules_of(records, part, kind) for part in measured_parts(records)]
    known = [joules for joules in by_part if joules is not None]
    return sum(known) if known else None


def footprint(
    energy_j: float | None, pue: float, grid: float | str | None, price_per_kwh: float | None
) -> dict[str, Any]:
    """Energy at the machine's counters, at the site's meter (`pue` times as much), and its emissions and cost.

    `gco2e` counts the electricity of the run alone: what making and scrapping the hardware emits is left out.
    """
    site = None if energy_j is None else kwh(energy_j) * pue
    intensity = None if grid is None else grid_intensity(grid)
    return {
        "joules": energy_j,
        "kwh": None if energy_j is None else kwh(energy_j),
        "pue": pue,
        "site_kwh": site,
        "grid_g_per_kwh": intensity,
        "grid_source": None if grid is None else GRID_SOURCE if isinstance(grid, str) else "given",
        "gco2e": None if site is None or intensity is None else site * intensity,
        "embodied_gco2e": None,
        "price_per_kwh": price_per_kwh,
        "cost": None if site is None or price_per_kwh is None else site * price_per_kwh,
    }


def to_target(records: Records, target_nats: float) -> dict[str, Any] | None:
    """Step, tokens and joules of training up to the first evaluation whose held-out loss is at or below a target, in
    nats per token; None if there is none. Joules of evaluations and saves are not among them.
    """
    reached = (record for record in of_kind(records, Eval) if record.loss is not None and record.loss <= target_nats)
    first = min(reached, key=lambda record: record.step, default=None)
    if first is None:
        return None
    before = [record for record in records if record.step <= first.step]
    tokens = max((record.tokens for record in of_kind(before, Train)), default=0)
    return {"loss": first.loss, "step": first.step, "tokens": tokens, "joules": measured_joules(before, "train")}


def first_judged(steps: int, warmup_steps: int) -> int:
    """The updates before the first one whose stability is judged: the warm-up, and then SETTLING of the run's `steps`,
    in which norms and losses fall for reasons that have nothing to do with unrest.
    """
    return warmup_steps + math.ceil(SETTLING * steps)


def gradient_stability(norms: Sequence[float | None], first: int = 0, at: int = 0) -> dict[str, Any]:
    """The unrest of the global gradient norms before clipping, by step (None: not finite), as `_unrest` has it of their
    logarithms; a spike is a norm that is also e^LEAST_SPIKE times its trend or more.

    Args:
        first: the first update that is judged, of the whole run (`first_judged`).
        at: the update that norms[0] is of: records may begin late, after a resume from another run.
    """
    return _unrest([math.log(norm) if norm else None for norm in norms], first, at)


def learning_stability(
    losses: Sequence[float | None], held_out: Sequence[float | None], first: int = 0, at: int = 0
) -> dict[str, Any]:
    """The unrest of training losses by step, as `_unrest` has it, and rises of held-out losses by evaluation, all in
    nats per token (None: not finite). A spike is a loss that is also LEAST_SPIKE nats above its trend or more.

    Args:
        first, at: as of `gradient_stability`.
    Returns:
        of `_unrest`, and
        rises: finite evaluations with a loss above the least before them; None with fewer than two.
        largest_rise: the most by which one was above it, 0.0 if none was.
    """
    finite = [loss for loss in held_out if loss is not None]
    above = [loss - least for loss, least in zip(finite[1:], accumulate(finite, min), strict=False)]
    return {
        **_unrest(losses, first, at),
        "rises": sum(rise > 0 for rise in above) if above else None,
        "largest_rise": max(0.0, *above) if above else None,
    }


def _unrest(values: Sequence[float | None], first: int, at: int) -> dict[str, Any]:
    """How values scatter about their trend, the median of the WINDOW steps around each.

    That median is the value itself wherever values only fall, or only rise, within the window: a power law, an
    exponential decay, a warm-up or a lasting step leave nothing. Independent noise of the variance v gives v.

    Returns:
        residual_variance: mean square of the values less their trend, over TREND_SHARE; None with fewer than ENOUGH.
        spikes: values above their trend by more than SPIKE robust standard deviations (MAD_TO_SIGMA times the median
            size of a residual), and by LEAST_SPIKE or more; None with fewer than ENOUGH.
        judged: how many values have a trend: those from `first` on with WINDOW // 2 such values on both sides.
        first: the first update that is judged or stands in a window.
        window: WINDOW.
    """
    known = [value for value in values[max(0, first - at) :] if value is not None]
    residuals = [known[k + WINDOW // 2] - median(known[k : k + WINDOW]) for k in range(len(known) - WINDOW + 1)]
    about = {"judged": len(residuals), "first": max(first, at), "window": WINDOW}
    if len(residuals) < ENOUGH:
        return {"residual_variance": None, "spikes": None, **about}
    limit = max(LEAST_SPIKE, SPIKE * MAD_TO_SIGMA * median(map(abs, residuals)))
    variance = fmean(residual * residual for residual in residuals) / TREND_SHARE
    return {"residual_variance": variance, "spikes": sum(residual > limit for residual in residuals), **about}
