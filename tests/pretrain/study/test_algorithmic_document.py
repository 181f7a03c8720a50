"""docs/study-algorithmic.md: every figure in it is that of the published results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.study.algorithmic_results import compare, summarise
from pretrain.study.page.algorithmic import RULES, page

PUBLISHED = Path("benchmarks/results/study-algorithmic.json")
DOCUMENT = Path("docs/study-algorithmic.md")
Row = list[str]


def findings(results: dict[str, Any]) -> list[Row]:
    """The table of comparisons, its heading first."""
    base, tasks = results["config"]["baseline"], len(results["config"]["tasks"])
    rows = [
        [
            *("network", "head", "cells that generalise", "of them lost again by the end"),
            *(f"needs less data than {base}", "more", f"generalises where {base} does not"),
            *(f"where only {base} does", "both: epochs, median ratio", f"test accuracy less {base}'s, points"),
        ]
    ]
    for one in results["comparison"]:
        counted = [one["network"], one["head"], f"{one['generalised']} of {one['cells']}", str(one["lost"])]
        if one["head"] == base:
            rows.append(counted + [""] * 6)
            continue
        apart = one["accuracy"]
        rows.append(
            [
                *(*counted, f"{one['less_data']} of {tasks} tasks", f"{one['more_data']} of {tasks}"),
                *(str(one["only_it"]), str(one["only_baseline"]), f"{one['epochs_ratio']:.2f} ({one['both']})"),
                f"{100 * apart['mean']:+.1f} [{100 * apart['low']:+.1f}, {100 * apart['high']:+.1f}]",
            ]
        )
    return rows


def of_task(results: dict[str, Any], task: str) -> tuple[list[Row], list[Row]]:
    """A task's tables: epochs by share, and figures after the last epoch at the largest share."""
    entries = [one for one in results["summary"] if one["task"] == task]
    shares = [f"{at['fraction']:.0%} ({at['examples']:,})" for at in entries[0]["fractions"]]
    epochs = [["network", "head", "rate, decay", "data needed", *shares]]
    figures = [
        [
            *("network", "head", "test, %", "prototypes: 2 components, %", "crystal", "embedding: 2 components, %"),
            *("crystal", "GFLOPs"),
        ]
    ]
    for one in entries:
        needed = f"{one['data_needed']:.0%}" if one["data_needed"] else "more"
        setting = f"{one['lr']:g}, {one['weight_decay']:g}"
        epochs.append([one["network"], one["head"], setting, needed, *map(reached, one["fractions"])])
        last = one["fractions"][-1]
        names = ("test_accuracy", "prototypes_explained", "prototypes_crystal", "embedding_explained")
        told = [spread(last[name], percent=not name.endswith("crystal")) for name in (*names, "embedding_crystal")]
        figures.append([one["network"], one["head"], *told, f"{last['gflops']['mean']:.1f}"])
    return epochs, figures


def reached(at: dict[str, Any]) -> str:
    """Median epochs, with how many seeds got there and how many of them stayed, where not none or all."""
    median, notes = at["median_epochs_to_generalise"], []
    if at["generalised"] and (median is None or at["generalised"] < at["seeds"]):
        notes.append(str(at["generalised"]))
    if at["kept"] != at["generalised"]:
        notes.append(f"kept {at['kept']}")
    return ("never" if median is None else f"{median:,.0f}") + (f" ({', '.join(notes)})" if notes else "")


def spread(figure: dict[str, Any], percent: bool) -> str:
    """Mean and sample deviation."""
    if figure["mean"] is None:
        return "-"
    mean, deviation = figure["mean"], figure["deviation"]
    return f"{100 * mean:.0f} ± {100 * deviation:.0f}" if percent else f"{mean:.2f} ± {deviation:.2f}"


def swept(results: dict[str, Any]) -> list[Row]:
    """The table of the sweep of weight decay: test accuracy at the end, and how many seeds generalise and end so."""
    heads = results["config"]["sweep"]["heads"]
    rows = [["decay", "what decays", *heads]]
    for decay, rule in dict.fromkeys((one["weight_decay"], one["decay_rule"]) for one in results["sweep"]):
        found = {o["head"]: o for o in results["sweep"] if (o["weight_decay"], o["decay_rule"]) == (decay, rule)}
        cells = [
            f"{100 * found[head]['test_accuracy']['mean']:.0f} ({found[head]['generalised']}, {found[head]['kept']})"
            for head in heads
        ]
        rows.append([f"{decay:g}", RULES[rule] if decay else "nothing", *cells])
    return rows


def markdown(rows: list[Row]) -> str:
    """Lines of a table."""
    return "\n".join([f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]])
