"""How a study chose, as its results tell it: what was said in advance, where the choices lie, what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

from pretrain.study.comparisons import Ran
from pretrain.study.language_config import FEW_SEEDS, Cell, LanguageConfig
from pretrain.study.records import bits
from pretrain.study.search import Choice
from pretrain.study.statistics import LEVEL, POWER, in_deviations, over_seeds
from pretrain.study.tuning import TUNABLE, Entry, Range, edges, ratios

FEW_DOCUMENTS = 100  # fewer say little of a text


def told(study: LanguageConfig, data: Mapping[str, Any], choice: Choice | None) -> dict[str, Any]:
    """What was said before anything was trained, and what is wrong with it."""
    tuning, compared = study.tuning, len(study.heads) - 1
    whole = study.config(study.trial(study.baseline, 0, len(tuning.rungs) - 1, study.settings(study.baseline)[0]))
    warnings = []
    if len(study.seeds) < FEW_SEEDS:
        warnings.append(f"{len(study.seeds)} seeds: with fewer than {FEW_SEEDS} an interval means little.")
    if (documents := data.get("test_documents") or 0) < FEW_DOCUMENTS:
        warnings.append(f"{documents} documents in the test split: fewer than {FEW_DOCUMENTS} say little of a text.")
    if known := (choice or {}).get("fresh_runs"):
        warnings.append(
            f"{known} runs with fresh seeds were there when the settings were chosen: they may have been seen."
        )
    return {
        "trials": tuning.trials,
        "counts": tuning.counts(),
        "rungs": list(tuning.rungs),
        "steps": [max(1, round(whole.train.steps * share)) for share in tuning.rungs],
        "keep": tuning.keep,
        "seed": tuning.seed,
        "tuned_at": study.tuned_at,
        "space": {name: _entry(name, entry) for name, entry in tuning.space.entries().items()},
        "lr_floor": study.lr_floor,
        "comparisons": compared,
        "level": LEVEL,
        "power": POWER,
        "smallest_in_deviations": in_deviations(len(study.seeds), compared) if compared else None,
        "edges_by_chance": sum(entry.edges_by_chance() for head in study.heads for entry in study.space(head).values()),
        "warnings": warnings,
    }


def in_advance(study: LanguageConfig) -> str:
    """In words, how large a difference must be to be found."""
    compared = len(study.heads) - 1
    least = in_deviations(len(study.seeds), compared) if compared else None
    if least is None:
        return "one head: there is nothing to compare"
    return (
        f"with {len(study.seeds)} seeds and {compared} comparison{'s' * (compared != 1)}, a difference is found with "
        f"probability {POWER:g} if it is {least:.2f} standard deviations of the paired differences between seeds, or "
        "more"
    )


def _entry(name: str, entry: Any) -> dict[str, Any]:
    given = {"low": entry.low, "high": entry.high} if isinstance(entry, Range) else {"values": list(entry.root)}
    return {"about": TUNABLE[name], **given}


def edges_of(
    study: LanguageConfig, choice: Choice | None, trials: Sequence[Ran], val: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """The chosen settings that lie at an edge of what was tried. `behind`: by how many bits/byte the best trial inside
    is worse than the chosen one after the last rung that has one; the chosen one is in all. `spread`: the deviation
    between the head's fresh seeds. `open` unless the first is known to be within the second, as it is where a setting
    makes no difference: with an open edge nothing may be called the best.

    Args:
        val: bits/byte of the `val` split of each head's fresh runs, at the size where it was tuned.
    """
    found = []
    for head, chosen in (choice["heads"] if choice else {}).items():
        space, setting = study.space(head), chosen["setting"]
        spread = stdev(val[head]) if len(val[head]) > 1 else None
        for name, end in (edges(space, setting) if setting else {}).items():
            entry = space[name]
            own = [run for run in trials if run.cell.head == head]
            behind = _behind(own, name, entry, chosen["trial"])
            where = {
                **{"tried": entry.told(), "try": entry.beyond(end), "behind": behind, "spread": spread},
                "open": behind is None or spread is None or behind > spread,
            }
            found.append({"head": head, "setting": name, "value": setting[name], "end": end, **where})
    return found


def _behind(trials: Sequence[Ran], name: str, entry: Entry, chosen: int) -> float | None:
    """None without a trial inside."""
    for rung in sorted({run.cell.rung for run in trials}, reverse=True):
        ends = {run.cell.trial: (run, bits(run.record)) for run in trials if run.cell.rung == rung}
        inside = [end for run, end in ends.values() if end is not None and entry.edge(run.cell.setting[name]) is None]
        own = ends[chosen][1] if chosen in ends else None
        if inside and own is not None:
            return min(inside) - own
    return None


def searched(
    study: LanguageConfig, head: str, spent: Mapping[str, Any], trials: Sequence[Ran], choice: Choice | None
) -> dict[str, Any]:
    """How a head's setting was found: its own space, its trials, what they took, the choice, its known recipe."""
    setting = spent["setting"] if choice else None
    own = study.heads[head].space.entries()
    known = study.known.get(head)
    return {
        "own_space": {name: _entry(name, entry) for name, entry in own.items()},
        "trials": [
            {
                **{"trial": run.cell.trial, "rung": run.cell.rung, "setting": dict(run.cell.setting)},
                **{"outcome": run.outcome, "bits_per_byte": run.summary.get("bits_per_byte")},
            }
            for run in trials
        ],
        "spent": {name: spent[name] for name in ("trials", "runs", "diverged", "tokens")},
        "chosen": {"trial": spent["trial"], "setting": setting, "run": _as_run(study, head, setting)}
        if setting is not None
        else None,
        "at_edge": sorted(edges(study.space(head), setting)) if setting is not None else [],
        "known": {
            "source": known.source,
            "settings": dict(known.settings),
            "ratios": ratios(setting, dict(known.settings)) if setting is not None else None,
        }
        if known
        else None,
    }


def _as_run(study: LanguageConfig, head: str, setting: Mapping[str, float]) -> dict[str, Any]:
    """A setting as a run has it at the size where heads are tuned."""
    cfg = study.config(Cell(head, study.tuned_at, study.seeds[0], setting))
    optim = {"lr", "min_lr", "warmup_steps", "head_lr_scale", "prototype_decay"}
    given = cfg.optim.model_dump(mode="json", include=optim)
    return {**given, **cfg.head.model_dump(mode="json", include={"init_std", "feature_length", "exponent"})}


def curse(spent: Mapping[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """By how much the chosen trial's bits/byte of the `val` split were too good to be true: the mean of fresh seeds'
    with the same setting and size, less the trial's, with Student's interval over these seeds.
    """
    trial = spent["bits_per_byte"]
    if trial is None or not values:
        return {"winners_curse": None}
    found = over_seeds([value - trial for value in values])
    low, high = found.interval() or (None, None)
    return {
        "winners_curse": {"trial": trial, "fresh": trial + found.mean, "mean": found.mean, "low": low, "high": high}
    }
