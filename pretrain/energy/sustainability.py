"""Arithmetic on what a run measured: energy, emissions, cost, joules to a target, stability. Plain numbers: no torch.

Figures are None where nothing was measured. Definitions and limits: docs/energy.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from statistics import median, pvariance
from typing import Any

from common.carbon_intensity import GRID_SOURCE, grid_intensity
from pretrain.records import PARTS, Counters, Eval, Phase, Record, Train, of_kind

WINDOW = 100  # steps before a step that it is compared with
ENOUGH = 20  # of them, or it is not judged
NORM_SPIKE = 3.0  # times the median norm of the window
LOSS_SPIKE = 6.0  # robust standard deviations above the median loss of the window
MAD_TO_SIGMA = 1.4826  # of a normal distribution

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


def gradient_stability(norms: Sequence[float | None], warmup_steps: int = 0) -> dict[str, Any]:
    """Of the global gradient norms before clipping, by step (None: not finite).

    Returns:
        log_norm_variance: variance of ln(norm) over the steps after the warm-up; None with fewer than two.
        spikes: steps with a norm above NORM_SPIKE times the median of the WINDOW steps before; None if none is judged.
        judged: steps that had ENOUGH steps before them to be judged.
    """
    settled = [math.log(norm) for norm in norms[warmup_steps:] if norm]
    variance = pvariance(settled) if len(settled) > 1 else None
    return {"log_norm_variance": variance, **_spikes(norms, lambda window: NORM_SPIKE * median(window))}


def learning_stability(losses: Sequence[float | None], held_out: Sequence[float | None]) -> dict[str, Any]:
    """Of training losses by step and held-out losses by evaluation, in nats per token (None: not finite).

    Returns:
        spikes: steps with a loss more than LOSS_SPIKE robust standard deviations (1.4826 times the median absolute
            deviation) above the median of the WINDOW steps before; None if none is judged.
        judged: steps that had ENOUGH steps before them to be judged.
        rises: finite evaluations with a loss above the least before them; None with fewer than two.
        largest_rise: the most by which one was above it, 0.0 if none was.
    """
    finite = [loss for loss in held_out if loss is not None]
    above = [loss - least for loss, least in zip(finite[1:], accumulate(finite, min), strict=False)]
    return {
        **_spikes(losses, _loss_limit),
        "rises": sum(rise > 0 for rise in above) if above else None,
        "largest_rise": max(0.0, *above) if above else None,
    }


def _loss_limit(window: Sequence[float]) -> float:
    middle = median(window)
    return middle + LOSS_SPIKE * MAD_TO_SIGMA * median(abs(loss - middle) for loss in window)


def _spikes(values: Sequence[float | None], limit: Callable[[Sequence[float]], float]) -> dict[str, int | None]:
    judged = [value > limit(window) for value, window in _with_window(values)]
    return {"spikes": sum(judged) if judged else None, "judged": len(judged)}


def _with_window(values: Sequence[float | None]) -> Iterator[tuple[float, Sequence[float]]]:
    """Each finite value with the finite ones of the WINDOW steps before it, where these are ENOUGH."""
    window: deque[float | None] = deque(maxlen=WINDOW)
    for value in values:
        known = [one for one in window if one is not None]
        if value is not None and len(known) >= ENOUGH:
            yield value, known
        window.append(value)
