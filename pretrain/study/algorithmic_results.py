"""What the cells of an algorithmic study came to: by share of examples, head by head, and against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

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
    "seconds",
)


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task, network and head, in the order of the cells: `data_needed`, the smallest fraction at
    which at least ENOUGH of the seeds generalised (None: at none), and the figures at each fraction.
    """
    groups: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = {}
    for cell in cells:
        key = tuple(cell[name] for name in ("task", "network", "head", "lr", "weight_decay", "epochs"))
        groups.setdefault(key, {}).setdefault(cell["fraction"], []).append(cell)
    found = []
    for (task, network, head, lr, weight_decay, epochs), by_fraction in groups.items():
        fractions = [
            {"fraction": fraction, "examples": runs[0]["examples"], **at_fraction(runs)}
            for fraction, runs in sorted(by_fraction.items())
        ]
        enough = [one for one in fractions if one["generalised"] >= ENOUGH * one["seeds"]]
        found.append(
            {
                "task": task,
                "network": network,
                "head": head,
                "lr": lr,
                "weight_decay": weight_decay,
                "epochs": epochs,
                "data_needed": enough[0]["fraction"] if enough else None,
                "examples_needed": enough[0]["examples"] if enough else None,
                "never": sum(one["never"] for one in fractions),
                "fractions": fractions,
            }
        )
    return found


def compare(cells: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One entry for each network and head: how many of its `cells` generalised, of those how many were `lost` again by
    the last epoch; and against the baseline, in how many tasks it needs `less_data` or `more_data`, how many pairs of
    cells with the same task, examples and seed have `only_it`, `only_baseline` or `both` generalise, and of the last
    the median ratio of epochs (`epochs_ratio`). The baseline has None there.
    """
    needed = {(one["network"], one["head"], one["task"]): one["data_needed"] or math.inf for one in summary}
    by_head: dict[tuple[str, str], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for cell in cells:
        place = cell["task"], cell["fraction"], cell["seed"]
        by_head.setdefault((cell["network"], cell["head"]), {})[place] = cell
    found = []
    for (network, head), mine in by_head.items():
        reached = {place: cell for place, cell in mine.items() if cell["epochs_to_generalise"] is not None}
        counted = {"cells": len(mine), "generalised": len(reached), "lost": len(reached) - kept(list(reached.values()))}
        against: dict[str, Any] = dict.fromkeys(
            ("less_data", "more_data", "only_it", "only_baseline", "both", "epochs_ratio")
        )
        if head != baseline:
            tasks = dict.fromkeys(task for task, *_ in mine)
            gaps = [needed[network, head, task] - needed[network, baseline, task] for task in tasks]
            base = {
                place: cell["epochs_to_generalise"]
                for place, cell in by_head[network, baseline].items()
                if cell["epochs_to_generalise"] is not None
            }
            ratios = [cell["epochs_to_generalise"] / base[place] for place, cell in reached.items() if place in base]
            against = {
                "less_data": sum(gap < 0 for gap in gaps),  # of two that are infinite it is not a number: neither
                "more_data": sum(gap > 0 for gap in gaps),
                "only_it": len(reached.keys() - base.keys()),
                "only_baseline": len(base.keys() - reached.keys()),
                "both": len(ratios),
                "epochs_ratio": statistics.median(ratios) if ratios else None,
            }
        found.append({"network": network, "head": head, **counted, **against})
    return found


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
    return statistics.median(math.inf if epoch is None else epoch for epoch in epochs)


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample deviation of the seeds that have a value; None without any, or without a second one."""
    there = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(there) if there else None,
        "deviation": statistics.stdev(there) if len(there) > 1 else None,
    }


def table(results: dict[str, Any]) -> Table:
    """A row for each task, network and head; all but the data needed and the cells that never generalised is at the
    largest fraction.
    """
    columns: dict[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
        "task": lambda one, at: one["task"],
        "network": lambda one, at: one["network"],
        "head": lambda one, at: one["head"],
        "rate, decay": lambda one, at: f"{one['lr']:g}, {one['weight_decay']:g}",
        "data needed": lambda one, at: _told(one["data_needed"], "{:.0%}", "more"),
        "never": lambda one, at: f"{one['never']} of {_total(one, 'seeds')}",
        "diverged": lambda one, at: str(_total(one, "diverged")),
        "of the examples": lambda one, at: f"{at['fraction']:.0%}",
        "epochs to 95%": lambda one, at: _told(at["median_epochs_to_generalise"], "{:.0f}", "never"),
        "test accuracy": lambda one, at: _mean(at["test_accuracy"], "{:.0%}"),
        "prototypes: 2 components": lambda one, at: _mean(at["prototypes_explained"], "{:.0%}"),
        "crystal": lambda one, at: _mean(at["prototypes_crystal"], "{:.2f}"),
        "embedding: 2 components": lambda one, at: _mean(at["embedding_explained"], "{:.0%}"),
    }
    told = Table(*columns, title="epochs as medians, all else as means over seeds")
    last = None
    for one in results["summary"]:
        if last not in (None, (one["task"], one["network"])):
            told.add_section()
        last = one["task"], one["network"]
        told.add_row(*(tell(one, one["fractions"][-1]) for tell in columns.values()))
    return told


def _total(one: dict[str, Any], name: str) -> int:
    return sum(each[name] for each in one["fractions"])


def _mean(spread: dict[str, float | None], form: str) -> str:
    if spread["deviation"] is None:
        return _told(spread["mean"], form, "-")
    return f"{_told(spread['mean'], form, '-')} ± {form.format(spread['deviation'])}"


def _told(value: float | None, form: str, missing: str) -> str:
    return missing if value is None else form.format(value)
