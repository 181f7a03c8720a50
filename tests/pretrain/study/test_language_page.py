"""The page of a study of language models: what it says, and that it requests nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.study.page.language import page
from pretrain.study.page.sections.prototypes import shown
from pretrain.study.page.sections.study import verdict
from tests.support.pages import Tree
from tests.support.study_fixture import AT_EDGE, DIVERGED, HEADS, HOSTILE, TRIALS, study_results


def rendered(results: dict[str, Any]) -> str:
    return page(json.loads(json.dumps(results)))


@pytest.fixture(scope="module")
def html() -> str:
    return rendered(study_results())


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    return Tree(html)


def test_the_page_is_one_file_that_requests_nothing(html: str, tree: Tree) -> None:
    assert html.startswith("<!doctype html>") and '<html lang="en">' in html
    assert len(html.encode()) < 2_000_000
    for tag, attributes in tree.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attributes and "srcset" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in html and "url(" not in html
    assert set(re.findall(r"\w+://[^'\"<\s]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, never requested


def test_plots_tables_and_the_document_are_labelled(tree: Tree) -> None:
    plots = [attributes for tag, attributes in tree.tags if tag == "svg"]
    assert len(plots) > 3 * len(HEADS)
    assert all(plot.get("role") == "img" and plot.get("aria-label") for plot in plots)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tree.tags if tag == "th")
    assert [tag for tag, _ in tree.tags if tag in ("title", "h1")] == ["title", "h1"]
    places = {attributes["id"] for _, attributes in tree.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in tree.tags if tag == "a"}
    assert links and links <= places
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_table_has_every_head_with_its_figures(tree: Tree) -> None:
    results = study_results()
    for head in results["heads"]:
        row = tree.row(head["name"])
        if head["name"] == DIVERGED:
            continue
        assert f"{head['bits_per_byte']['mean']:.4f}" in row
        assert f"[{head['bits_per_byte']['low']:.4f}, {head['bits_per_byte']['high']:.4f}]" in row
        assert f"{head['tokens_per_s']:,.0f}" in row and f"{head['pca90']:,.4g}" in row
        assert f"{head['effective_rank']:.1f}" in row and "not measured" in row
        learnt = f"{head['displacement_pca90']:,.4g} {head['start_share']:.0%} {head['hidden_pca90']:,.4g}"
        assert f" {learnt} {head['effective_rank']:.1f} {head['gradient_stability']['residual_variance']:.3g} " in row
        if head["name"] != "softmax":
            gap = head["difference"]
            for end in ("low", "high"):
                for prefix in ("", "corrected_", "seeds_", "documents_"):
                    assert f"{gap[prefix + end]:+.4f}".replace("-", "\N{MINUS SIGN}") in row
            assert f"{gap['mean']:+.4f}".replace("-", "\N{MINUS SIGN}") in row
            assert "p 0.012, corrected 0.046" in row
            assert f"{TRIALS}, {len(head['trials'])} 12.35M" in row, "what tuning took is beside each head"
    assert "0.62×" in tree.row("euclidean") and "baseline" in tree.row("softmax")
    assert "edge" in tree.row(AT_EDGE) and "edge" not in tree.row("euclidean")


def test_a_head_that_diverged_has_a_row_that_says_so(tree: Tree) -> None:
    assert f"all {TRIALS} trials diverged" in tree.row(DIVERGED) and tree.row(DIVERGED).endswith("0 of 0")
    assert f"{DIVERGED}: all {TRIALS} trials diverged." in tree.text


def test_a_study_with_a_choice_at_an_edge_calls_nothing_best(tree: Tree) -> None:
    assert "No head is called best, better or worse here" in tree.text
    assert f"{AT_EDGE}: lr 0.0291 lies at the high end of 0.001 to 0.03; try 0.001 to 0.16" in tree.text.replace(
        " :", ":"
    )
    told = "(the best trial inside, after the last rung that has one: +0.0031 bits/byte; spread of fresh seeds 0.0020)"
    assert told in tree.text and "1 of them counts: the best trial inside is further behind" in tree.text
    assert "Of values that make no difference, 9.0 would lie there by chance" in tree.text
    rows = " ".join(tree.row(name) for name in HEADS)
    assert "better" not in rows and "worse" not in rows and "Lowest mean" not in tree.text
    settled = Tree(rendered(study_results(settled=True)))
    assert "Lowest mean of test bits/byte: mahalanobis" in settled.text and "No head is called" not in settled.text
    for head in study_results(settled=True)["heads"]:
        if head["difference"]:
            assert str(verdict(head["difference"])) in settled.row(head["name"])
    assert "Better than softmax: the corrected interval is below 0, for euclidean" in settled.text


def test_the_protocol_is_told(tree: Tree) -> None:
    for told in (
        "Every head had 8 trials at the size d64: 8 trials of 300 steps, then 3 trials of 600 steps.",
        "a difference is found with probability 0.8 if it is 9.87 standard deviations",
        "3 seeds: with fewer than 5 an interval means little.",
        "a paper <1> lr 4.85×",
        "range of its own",
        "1.8800 1.9000 +0.0200 [+0.0100, +0.0300]",
        "could have shown 0.0213",
        "371,000 parameters",
        "needs three sizes",
    ):
        assert told in tree.text, told


def test_trials_are_shown_by_setting(html: str) -> None:
    """A dot for each trial of the first rung, a ring for the chosen one, a cross for each that diverged."""
    results = study_results()
    plot = html.split('aria-label="validation bits per byte of the trials by learning rate"')[1].split("</svg>")[0]
    first = [(head, trial) for head in results["heads"] for trial in head["trials"] if trial["rung"] == 0]
    lost = sum(trial["outcome"] == "diverged" for _, trial in first)
    ringed = sum(head["chosen"] is not None for head in results["heads"])
    assert plot.count('class="cross"') == lost and plot.count('class="ring"') == ringed
    assert plot.count('class="dot"') == len(first) - lost


def test_why_energy_was_not_measured_is_told_below_the_table_and_in_place_of_plots(tree: Tree) -> None:
    assert tree.text.count("GPU: no NVIDIA GPU; CPU: no RAPL counter that may be read.") == 4  # table, 2 plots, limits
    assert "the third axis is time, which is no measure of energy" in tree.text


def test_measured_energy_is_shown_and_takes_the_place_of_time() -> None:
    tree = Tree(rendered(study_results(energy=True)))
    assert "0.0003" in tree.row("softmax") and "not measured" not in tree.text.lower()
    assert "Sustainability is the energy per token" in tree.text and "axis is time" not in tree.text


def test_energy_that_one_head_lacks_is_not_compared() -> None:
    results = study_results(energy=True)
    results["heads"][3]["j_per_token"] = None
    tree = Tree(rendered(results))
    assert "Energy was not measured for every head. No reason was recorded." in tree.text
    assert "axis is time" in tree.text and "0.0003" in tree.row("softmax")


def test_facts_of_the_budget_are_told(tree: Tree) -> None:
    for told in (
        "1,181,824",
        "2,457,600",
        "9f2c41d07be5a3346c1f",
        "abc1234",
        "torch 2.13.0",
        "lr, warmup, prototype_decay",
        "81",
    ):
        assert told in tree.text


def test_values_off_the_radar_are_clipped_and_said_so() -> None:
    results = study_results()
    results["heads"][1]["bits_per_byte"]["mean"] = 3.5  # worse than token frequencies
    results["heads"][2]["seconds_per_token"] = 1e-9
    told = Tree(rendered(results)).text
    assert "Clipped to the scale: euclidean, quality; cosine, time." in told
    assert "0.00 (clipped)" in told and "1.00 (clipped)" in told


def test_hostile_text_is_escaped() -> None:
    results = study_results()
    evil = "</script><img src=x onerror=alert(1)>'\"&"
    for tree in (results, results["data"], results["heads"][1]):
        for key in ("title", "machine", "path", "fingerprint", "name", "exponent"):
            if isinstance(tree.get(key), str):
                tree[key] = evil
    results["not_measured"] = {"gpu": evil}
    results["versions"] = {evil: evil}
    tree = Tree(rendered(results))
    assert not [tag for tag, attributes in tree.tags if tag == "img" or "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in tree.tags) == 1
    assert evil in tree.text


def test_texts_of_tokens_reach_the_tips_unharmed(tree: Tree) -> None:
    tips = [json.loads(attributes["data-tips"] or "") for _, attributes in tree.tags if "data-tips" in attributes]
    told = {text.split("\n")[0] for found in tips for *_, text in found}
    assert {f"“{shown(text)}”" for text in HOSTILE} <= told


def test_blanks_and_control_characters_of_tokens_are_visible() -> None:
    assert shown(" a\n\t\x00") == "␣a⏎⇥\\x00" and shown("") == "(empty)" and shown("▁the") == "␣the"


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, list) and path[-1] in (
        *("heads", "trials", "eval_curve", "values", "scree", "explained", "sizes", "edges"),
    ):
        for place in range(min(2, len(tree))):
            yield from _leaves(tree[place], (*path, place))


def _small() -> dict[str, Any]:
    results = study_results()
    results["heads"] = results["heads"][:2]
    for head in results["heads"]:
        head["train_curve"] = head["train_curve"][::200]
        head["projection"]["points"] = head["projection"]["points"][:3]
    return results


@pytest.mark.slow
def test_any_figure_may_be_null() -> None:
    whole = _small()
    paths = [
        path
        for path in _leaves(whole)
        if path[0:3:2] != ("heads", "name")
        and path[0] != "runs"
        and path[-1] != "name"
        and not (isinstance(path[-1], int) and path[-2] in ("heads", "eval_curve", "trials", "sizes", "edges"))
    ]
    assert len(paths) > 80
    for path in paths:
        results = copy.deepcopy(whole)
        tree = results
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = None
        found = rendered(results)
        assert not re.search(r"\b(None|nan|inf)\b", found.split("</style>")[1].split("<script>")[0]), path


def test_a_study_of_nothing_has_a_page() -> None:
    studies: list[dict[str, Any]] = [{}, {"heads": []}, {"heads": [{"name": "softmax"}], "baseline": "softmax"}]
    for results in studies:
        assert "None" not in Tree(rendered(results)).text


def test_an_unmeasured_figure_is_a_dash_and_never_zero() -> None:
    results = study_results()
    head = results["heads"][1]
    head.update(tokens_per_s=None, pca90=None, effective_rank=None, gradient_stability=None, learning_stability=None)
    head.update(displacement_pca90=None, hidden_pca90=None, start_share=None)
    head["difference"].update(low=None, high=None, corrected_low=None, corrected_high=None)
    row = Tree(rendered(results)).row("euclidean")
    assert "no interval" in row and "better" not in row
    assert row.endswith("- not measured - - - - - - - 0 of 3")


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-2.0, -1.0, "better"),
        (1.0, 2.0, "worse"),
        (-1.0, 1.0, "no difference"),
        (None, 1.0, None),
        (0.0, 1.0, "no difference"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(low: float | None, high: float | None, word: str | None) -> None:
    assert verdict({"mean": 0.5, "low": -9.0, "high": -8.0, "corrected_low": low, "corrected_high": high}) == word


def test_the_document_tells_the_published_results() -> None:
    results = json.loads(Path("benchmarks/results/study-small.json").read_text())
    baseline = next(head for head in results["heads"] if head["name"] == results["baseline"])

    def bounds(found: dict[str, Any], form: str, prefix: str = "") -> str:
        return f"[{found[f'{prefix}low']:{form}}, {found[f'{prefix}high']:{form}}]"

    told = []
    for head in results["heads"]:
        bits, apart, speed = head["bits_per_byte"], head["difference"], head["tokens_per_s"]
        gaps = ["", ""]
        if apart is not None:
            gaps = [f"{apart['mean']:+.4f} {bounds(apart, '+.4f')}", bounds(apart, "+.4f", "documents_")]
        stable = head["gradient_stability"]
        told.append(
            [
                *(head["name"], f"{head['lr']:g}{' (edge)' if head['lr_at_edge'] else ''}"),
                *(f"{bits['mean']:.4f} {bounds(bits, '.4f')}", *gaps),
                *(f"{speed:,.0f} ({speed / baseline['tokens_per_s']:.2f})", f"{head['pca90']:.1f}"),
                *(f"{head['effective_rank']:.1f}", f"{stable['log_norm_variance']:.3f}", f"{stable['spikes']:.2f}"),
                f"{head['diverged']} of {head['started']}",
            ]
        )
    table = Path("docs/study-small.md").read_text().split("## Results\n\n")[1].split("\n\n")[0].splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == told


def test_what_is_wrong_with_the_published_study_is_told_wherever_it_is() -> None:
    """The figures are those of the three runs."""
    runs = json.loads(Path("benchmarks/results/study-small-softmax-start.json").read_text())["runs"]
    assert [(run["lr"], run["seed"], run["outcome"]) for run in runs] == [(0.003, seed, "done") for seed in (1, 2, 3)]
    bits = [f"{run['bits_per_byte']:.3f}" for run in runs]
    table = json.loads(Path("benchmarks/results/study-small.json").read_text())
    assert all(float(max(bits)) < head["bits_per_byte"]["mean"] for head in table["heads"])
    for place, told in {
        "docs/study-small.md": f"{bits[0]}, {bits[1]} and {bits[2]} bits/byte",
        "benchmarks/results/study-small.html": f"{bits[0]}, {bits[1]} and {bits[2]} bits/byte",
        "README.md": f"{min(bits)} to {max(bits)} bits/byte",
    }.items():
        opening = " ".join(Path(place).read_text().split("</style>")[-1][:2000].replace("\n> ", " ").split())
        assert told in opening and "do not stand" in opening, place
