"""What the cells of an algorithmic study came to: by share of examples, head by head, and against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pretrain.study.statistics import Estimate, corrected, interval, over_seeds

GOAL = 0.95  # accuracy that counts as generalised (test examples) or memorised (training examples)
ENOUGH = 0.8  # share of seeds that must generalise for a fraction to be enough
MEASURES = (  # of a cell that are averaged over seeds
    "train_accuracy",
    "test_accuracy",
    "train_loss",
    "test_loss",
    "prototypes_explained",
    "prototypes_crystal",
    "embedding_explained",
    "embedding_crystal",
    "prototype_growth",
    "seconds",
    "gflops",
)
CURVE_POINTS = 25  # of a curve, at most
ENDS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "lr": lambda one: one["lr"],
    "weight_decay": lambda one: one["weight_decay"],
    "product": lambda one: one["lr"] * one["weight_decay"],
}


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task, network and head, in the order of the cells: `data_needed`, the smallest fraction at
    which at least ENOUGH of the seeds generalised (None: at none), and the figures at each fraction.
    """
    names = ("task", "network", "head", "lr", "weight_decay", "epochs")
    groups: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = {}
    for cell in cells:
        key = tuple(cell[name] for name in names)
        groups.setdefault(key, {}).setdefault(cell["fraction"], []).append(cell)
    summary = []
    for key, by_fraction in groups.items():
        fractions = [
            {"fraction": fraction, "examples": runs[0]["examples"], **at_fraction(runs)}
            for fraction, runs in sorted(by_fraction.items())
        ]
        enough = [entry for entry in fractions if entry["generalised"] >= ENOUGH * entry["seeds"]]
        summary.append(
            {
                **dict(zip(names, key, strict=True)),
                "data_needed": enough[0]["fraction"] if enough else None,
                "examples_needed": enough[0]["examples"] if enough else None,
                "never": sum(entry["never"] for entry in fractions),
                "fractions": fractions,
            }
        )
    return summary


def edges(chosen: Mapping[str, float], tried: Sequence[Mapping[str, float]]) -> list[str]:
    """Which of rate, weight decay and their product, by which AdamW decays, lies at an end of what was tried: a better
    one may lie beyond. No weight decay is no end.
    """
    found = []
    for name, of in ENDS.items():
        values = sorted({of(one) for one in tried})
        if len(values) > 1 and of(chosen) in (values[0], values[-1]) and of(chosen) > 0:
            found.append(name)
    return found


def curves(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task, network, head and fraction the `curve` of its seeds."""
    names = ("task", "network", "head", "fraction")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in names), []).append(cell)
    return [{**dict(zip(names, key, strict=True)), "curve": curve(runs)} for key, runs in groups.items()]


def curve(runs: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Epochs, up to CURVE_POINTS of them and the last, with the mean, least and largest test accuracy over the seeds; a
    seed that has diverged counts as 0.
    """
    accuracies: dict[int, list[float]] = {}
    for run in runs:
        for epoch, accuracy in run["test_curve"]:
            accuracies.setdefault(epoch, []).append(accuracy)
    epochs = sorted(accuracies)
    every = math.ceil(len(epochs) / CURVE_POINTS)
    taken = epochs[::-1][::every][::-1] if epochs else []
    found = []
    for epoch in taken:
        values = accuracies[epoch] + [0.0] * (len(runs) - len(accuracies[epoch]))
        found.append([epoch, *(round(one, 4) for one in (statistics.mean(values), min(values), max(values)))])
    return found


def compare(cells: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One entry for each network and head: how many of its `cells` generalised, of those how many were `lost` again by
    the last epoch; and against the baseline, in how many tasks it needs `less_data` or `more_data`, how many pairs of
    cells with the same task, examples and seed have `only_it`, `only_baseline` or `both` generalise, and of the last
    the median ratio of epochs (`epochs_ratio`). `accuracy`: how many more of the test examples it has right after the
    last epoch, as a share, mean over tasks and fractions: paired by seed, over seeds, corrected for all heads and
    networks (`statistics.corrected`); what diverged has none right. The baseline has None there.
    """
    needed = {(entry["network"], entry["head"], entry["task"]): entry["data_needed"] or math.inf for entry in summary}
    by_head: dict[tuple[str, str], list[dict[str, Any]]] = {}
    reached: dict[tuple[str, str], dict[tuple[Any, ...], int]] = {}  # epochs by place
    for cell in cells:
        key = cell["network"], cell["head"]
        by_head.setdefault(key, []).append(cell)
        own = reached.setdefault(key, {})
        if cell["epochs_to_generalise"] is not None:
            own[cell["task"], cell["fraction"], cell["seed"]] = cell["epochs_to_generalise"]
    comparison = []
    for (network, head), mine in by_head.items():
        own, base = reached[network, head], reached[network, baseline]
        lost = len(own) - kept([cell for cell in mine if cell["epochs_to_generalise"] is not None])
        tasks = dict.fromkeys(cell["task"] for cell in mine)
        gaps = [needed[network, head, task] - needed[network, baseline, task] for task in tasks]
        ratios = [epochs / base[place] for place, epochs in own.items() if place in base]
        against: dict[str, Any] = {
            "less_data": sum(gap < 0 for gap in gaps),  # of two that are infinite it is not a number: neither
            "more_data": sum(gap > 0 for gap in gaps),
            "only_it": len(own.keys() - base.keys()),
            "only_baseline": len(base.keys() - own.keys()),
            "both": len(ratios),
            "epochs_ratio": statistics.median(ratios) if ratios else None,
        }
        counted = {"cells": len(mine), "generalised": len(own), "lost": lost}
        against["accuracy"] = None if head == baseline else _difference(mine, by_head[network, baseline])
        if head == baseline:
            against = dict.fromkeys(against)
        comparison.append({"network": network, "head": head, **counted, **against})
    judged = [entry for entry in comparison if entry["head"] != baseline]
    for entry, told in zip(judged, corrected([entry["accuracy"] for entry in judged]), strict=True):
        entry["accuracy"] = told
    return comparison


def _difference(cells: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> Estimate:
    """Of test accuracy after the last epoch, over seeds."""
    by_seed: dict[int, list[float]] = {}
    for cell, other in zip(cells, base, strict=True):
        assert all(cell[name] == other[name] for name in ("task", "fraction", "seed"))
        by_seed.setdefault(cell["seed"], []).append((cell["test_accuracy"] or 0.0) - (other["test_accuracy"] or 0.0))
    return over_seeds([statistics.mean(values) for values in by_seed.values()])


def at_fraction(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians take a goal that was never reached as infinity, and are None where they are that."""
    generalise, memorise = ([run[f"epochs_to_{goal}"] for run in runs] for goal in ("generalise", "memorise"))
    return {
        "seeds": len(runs),
        "generalised": len(runs) - generalise.count(None),
        "never": generalise.count(None),
        "kept": kept(runs),
        "never_memorised": memorise.count(None),
        "diverged": sum(run["diverged"] is not None for run in runs),
        "median_epochs_to_generalise": finite(median(generalise)),
        "median_epochs_to_memorise": finite(median(memorise)),
        **{name: _spread([run[name] for run in runs]) for name in MEASURES},
    }


def kept(runs: Sequence[dict[str, Any]]) -> int:
    """How many of them end with GOAL of the test examples right."""
    return sum((run["test_accuracy"] or 0.0) >= GOAL for run in runs)


def median(epochs: Iterable[int | None]) -> float:
    """Of epochs to a goal; infinite if half of the runs or more never reached it."""
    return statistics.median(math.inf if epoch is None else epoch for epoch in epochs)


def finite(value: float | None) -> float | None:
    """The value; None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, Student's interval and sample deviation of the seeds that have a value; None without any, or without a
    second one.
    """
    found = interval(values)
    there = found.pop("values")
    return {**found, "deviation": statistics.stdev(there) if len(there) > 1 else None}
