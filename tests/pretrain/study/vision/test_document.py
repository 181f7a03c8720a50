"""docs/study-vision.md: every figure in it is that of the published results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.study.page.vision import page
from pretrain.study.statistics import LEVEL
from pretrain.study.vision.results import verdict
from tests.support.prose import Prose

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


# ---- sentences


def sentences(results: dict[str, Any]) -> list[str]:
    """What the findings say with figures."""
    summary, against = of(results, "summary"), of(results, "comparison")
    seen = {key: one for key, one in against.items() if key[0] != "points"}
    assert all(verdict(one["accuracy"]) == "no difference" for one in seen.values())
    could = [100 * one["accuracy"]["could_show"] for one in seen.values()]
    first = places(results)[0]
    linear = {head: one["loss"] for (data, network, head), one in against.items() if (data, network) == first}
    choices = of(results, "choices")
    assert not choices[*first, "softmax"]["edges"]
    told = {head: verdict(one, True, edges=choices[*first, head]["edges"]) for head, one in linear.items()}
    lower, higher, open_ = ([h for h, word in told.items() if word == w] for w in ("better", "worse", "not settled"))
    assert len(lower) + len(higher) + len(open_) == len(linear)
    return [
        f"in none of {len(seen)} comparisons on digits and signals. Differences of {min(could):.1f} to "
        f"{max(could):.1f} points would have been found, by place.",
        f"lower than softmax's under {', '.join(lower)}, higher under {', '.join(higher)}; "
        f"{', '.join(open_)} chose a weight decay at the end of its list, so that its higher one is not settled",
        *_of_signals(summary),
        *_of_robustness(summary),
        *_of_points(summary, results),
    ]


def percent(figure: dict[str, Any]) -> str:
    """A mean."""
    return f"{100 * figure['mean']:.1f}%"


def _of_signals(summary: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    there = {head: one for (data, network, head), one in summary.items() if (data, network) == ("signals", "mlp")}
    errors = [100 * one["calibration_error"]["mean"] for head, one in there.items() if head != "softmax"]
    shares = [100 * one["prototypes_first_2"]["mean"] for head, one in there.items() if head != "softmax"]
    softmax = there["softmax"]
    return [
        f"its calibration error is {percent(softmax['calibration_error'])}, those of the others {min(errors):.1f} to "
        f"{max(errors):.1f}%.",
        f"{percent(softmax['prototypes_first_2'])} of the variance of softmax's prototypes is in two components, of "
        f"the others' {min(shares):.1f} to {max(shares):.1f}%.",
    ]


def _of_robustness(summary: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    def under(head: str) -> str:
        return ", ".join(percent(summary["digits", net, head]["accuracy_fgsm_0.3"]) for net in ("linear", "mlp", "cnn"))

    return [
        f"on digits (linear, MLP, CNN) softmax keeps {under('softmax')}, the Euclidean head {under('euclidean')}, "
        f"softmax over cosines {under('cosine_softmax')}."
    ]


def _of_points(summary: dict[tuple[str, str, str], dict[str, Any]], results: dict[str, Any]) -> list[str]:
    def seeds(head: str) -> str:
        return ", ".join(f"{100 * value:.1f}" for value in summary["points", "linear", head]["accuracy"]["values"])

    edges = sum(bool(one["edges"]) for one in results["choices"])
    return [
        f"softmax's seeds have {seeds('softmax')}% right, the Euclidean head's {seeds('euclidean')}%, softmax over "
        f"cosines {seeds('cosine_softmax')}%, cosine {seeds('cosine')}%.",
        f"{edges} of the {len(results['choices'])} choices lie at an end",
    ]


# ---- the document


def test_every_figure_is_of_the_published_results(results: dict[str, Any]) -> None:
    prose = Prose(DOCUMENT, "Results", "Findings", "Limits", "Beside accuracy")
    prose.table(compared(results))
    prose.table(beside(results))
    prose.holds(*sentences(results), "1,000 test examples of signals and 352 of digits")
    prose.holds(f"with {LEVEL:.0%} intervals")
    assert (results["data"]["signals"]["sizes"]["test"], results["data"]["digits"]["sizes"]["test"]) == (1000, 352)
    assert prose.figures() == []


def test_the_published_page_is_that_of_the_published_results(results: dict[str, Any]) -> None:
    assert PUBLISHED.with_suffix(".html").read_text() == page(results)
