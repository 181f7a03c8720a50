"""docs/study-vision.md: every figure in it is that of the published results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PUBLISHED = Path("benchmarks/results/study-vision.json")
DOCUMENT = Path("docs/study-vision.md")
Row = list[str]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


def of(results: dict[str, Any], table: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """`summary`, `comparison` or `choices` by data set, network and head."""
    return {(one["data"], one["network"], one["head"]): one for one in results[table]}


def places(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Data sets with networks, in their order."""
    return list(dict.fromkeys((one["data"], one["network"]) for one in results["summary"]))


def bounds(figure: dict[str, Any] | None, form: str, times: float = 1.0) -> str:
    """A mean with its interval."""
    if figure is None or figure["mean"] is None:
        return "-"
    mean, low, high = (form.format(times * figure[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def compared(results: dict[str, Any]) -> list[Row]:
    """Accuracy and loss of the test part, and their differences to the baseline."""
    base = results["config"]["baseline"]
    against, choices = of(results, "comparison"), of(results, "choices")
    heading = ["data", "network", "head", "rate, decay, start", "accuracy, %", f"less {base}, points", "could show"]
    rows = [[*heading, "loss, nats", f"less {base}"]]
    for key, one in of(results, "summary").items():
        chosen, apart = choices[key], against.get(key)
        names = ("lr", "weight_decay", "init")
        setting = ", ".join(f"{chosen[name]:g}{'*' * (name in chosen['edges'])}" for name in names)
        row = [*key, setting, bounds(one["accuracy"], "{:.1f}", 100)]
        if apart is None:
            row += ["", "", f"{one['loss']['mean']:.3f}", ""]
        else:
            row += [bounds(apart["accuracy"], "{:+.1f}", 100), f"{100 * apart['accuracy']['could_show']:.1f}"]
            row += [f"{one['loss']['mean']:.3f}", bounds(apart["loss"], "{:+.3f}")]
        rows.append(row)
    return rows


def beside(results: dict[str, Any]) -> list[Row]:
    """Calibration, robustness, geometry and speed."""
    robust = [name for name in results["summary"][0] if name.startswith(("accuracy_noise", "accuracy_fgsm"))]
    named = {"accuracy_noise_": "noise ", "accuracy_fgsm_": "gradient sign "}
    heading = ["data", "network", "head", "calibration error, %"]
    for name in robust:
        start = next(start for start in named if name.startswith(start))
        heading.append(f"{named[start]}{name.removeprefix(start)}, %")
    rows = [[*heading, "prototypes: 2 components, %", "features: 2 components, %", "features: effective rank"]]
    for key, one in of(results, "summary").items():
        shares = ["calibration_error", *robust, "prototypes_first_2", "features_first_2"]
        told = [f"{100 * one[name]['mean']:.1f}" if one[name]["mean"] is not None else "-" for name in shares]
        rank = one["features_effective_rank"]["mean"]
        rows.append([*key, *told, "-" if rank is None else f"{rank:.1f}"])
    return rows
