"""What the cells of a vision study came to: head by head, and against the baseline.

Means over seeds have Student's interval. A difference in accuracy is taken example by example and seed by seed, and its
interval counts chance in both (pretrain/study/statistics.py); one in loss counts chance in seeds. Differences of a
measure are corrected together by Holm's method: over all data sets, networks and heads of the study.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.study.statistics import Estimate, corrected, crossed, interval, over_seeds
from pretrain.study.vision.cell import unpacked

Cells = Sequence[Mapping[str, Any]]
COMPARED = ("accuracy", "loss")
NAMES = ("data", "network", "head")


def summarise(cells: Cells, measures: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each data set, network and head, in the order of the cells: of each measure `mean`, `low`, `high`
    and `values` of the seeds that have it, None for what they have not.
    """
    return [
        {
            **dict(zip(NAMES, key, strict=True)),
            "seeds": len(runs),
            "diverged": sum(run["diverged"] is not None for run in runs),
            **{name: interval([run[name] for run in runs]) for name in measures},
        }
        for key, runs in _groups(cells).items()
    ]


def compare(cells: Cells, sizes: Mapping[str, int], baseline: str) -> list[dict[str, Any]]:
    """One entry for each data set, network and head but the baseline: its mean accuracy and mean loss less those of the
    baseline's cells with the same seed, each with `low` and `high`, Holm's `p` and, as `could_show`, the least true
    difference that this many seeds and examples find in four of five studies. None where a cell of either diverged.

    `cells` have their `right` answers, as `packed` wrote them; `sizes`: test examples by data set.
    """
    groups = _groups(cells)
    keys = [key for key in groups if key[2] != baseline]
    estimates: dict[str, list[Estimate | None]] = {name: [] for name in COMPARED}
    for key in keys:
        own, base = groups[key], groups[*key[:2], baseline]
        whole = all(run["diverged"] is None for run in (*own, *base))
        count = sizes[key[0]]
        estimates["accuracy"].append(of_accuracy(own, base, count) if whole else None)
        losses = [a["loss"] - b["loss"] for a, b in zip(own, base, strict=True)] if whole else []
        estimates["loss"].append(over_seeds(losses) if whole else None)
    told = {name: corrected(found) for name, found in estimates.items()}
    return [
        {**dict(zip(NAMES, key, strict=True)), **{name: told[name][place] for name in COMPARED}}
        for place, key in enumerate(keys)
    ]


def of_accuracy(own: Cells, base: Cells, count: int) -> Estimate:
    """The difference in accuracy of cells with the same seeds, over seeds and test examples together."""
    sides = [np.stack([unpacked(run["right"], count) for run in runs]).astype(float) for runs in (own, base)]
    # of nats it makes bits, that is the table again, and its examples have one byte each
    return crossed((sides[0] - sides[1]) * math.log(2), np.ones(count))


def verdict(difference: Mapping[str, Any] | None, smaller_is_better: bool = False, *, edges: Sequence[str] = ()) -> str:
    """better, worse or no difference, by the interval; - without one. `edges`: of the settings of both; with any of
    them, what is no chance may still be the search's, and is not settled.
    """
    if difference is None or difference["low"] is None:
        return "-"
    if difference["low"] <= 0 <= difference["high"]:
        return "no difference"
    if edges:
        return "not settled"
    return "better" if (difference["mean"] < 0) == smaller_is_better else "worse"


def _groups(cells: Cells) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """Cells by data set, network and head."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["data"], cell["network"], cell["head"]), []).append(cell)
    return groups
