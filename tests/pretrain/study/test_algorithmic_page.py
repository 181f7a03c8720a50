"""The page of an algorithmic study."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.study.algorithmic_results import MEASURES, compare, summarise
from pretrain.study.page.algorithmic import page
from pretrain.study.page.layout import MINUS
from pretrain.study.tasks import TASKS
from tests.support.pages import Tree

PUBLISHED = Path("benchmarks/results/study-algorithmic.json")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


@pytest.fixture(scope="module")
def html(results: dict[str, Any]) -> str:
    return page(results)


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    return Tree(html)


def changed(results: dict[str, Any], change: Any) -> dict[str, Any]:
    """The results with every cell changed by a function, summarised again."""
    found = copy.deepcopy(results)
    for cell in found["cells"]:
        change(cell)
    found["summary"] = summarise(found["cells"])
    found["comparison"] = compare(found["cells"], found["summary"], found["config"]["baseline"])
    return found


def rows(tree: Tree, head: str, network: str) -> list[str]:
    """Rows of all tables about a head: the comparison, the data needed, and one for each task."""
    found = [" ".join(" ".join(row).split()) for row in tree.rows]
    return [row for row in found if row.startswith(f"{head} {network} ")]


def test_the_page_is_one_file_that_requests_nothing(html: str, tree: Tree) -> None:
    assert html.startswith("<!doctype html>") and len(html.encode()) < 1_000_000
    assert not [tag for tag, _ in tree.tags if tag in ("link", "iframe", "img", "object", "embed", "base")]
    assert not [attributes for _, attributes in tree.tags if {"src", "srcset"} & attributes.keys()]
    assert set(re.findall(r"\w+://[^'\"<\s]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, never requested
    links = {attributes["href"] for tag, attributes in tree.tags if tag == "a"}
    assert links == {f"#{attributes['id']}" for tag, attributes in tree.tags if tag == "section"}
    assert len(links) == len(TASKS) + 3
    assert not re.search(r"\b(None|nan|inf)\b", tree.text)


def test_every_head_has_its_figures_in_every_table(results: dict[str, Any], tree: Tree) -> None:
    for one in results["comparison"]:
        told, needed, *tasks = rows(tree, one["head"], one["network"])
        assert told.startswith(f"{one['head']} {one['network']} {one['generalised']} of {one['cells']} {one['lost']} ")
        if one["epochs_ratio"] is not None:
            counts = (one[key] for key in ("less_data", "more_data", "only_it", "only_baseline"))
            apart = one["accuracy"]
            ratio = f"{one['epochs_ratio']:.2f} of {one['both']} {100 * apart['mean']:+.1f}% "
            bounds = f"{100 * apart['low']:+.1f}% to {100 * apart['high']:+.1f}%"
            assert told.endswith(f"{' '.join(map(str, counts))} {ratio}{bounds}".replace("-", MINUS))
        mine = [s for s in results["summary"] if (s["head"], s["network"]) == (one["head"], one["network"])]
        shares = [
            f"{s['data_needed']:.0%} {s['examples_needed']} examples" if s["data_needed"] else "more" for s in mine
        ]
        assert needed == f"{one['head']} {one['network']} {' '.join(shares)}"
        assert len(tasks) == len(mine) == len(TASKS)
        for summary, row in zip(mine, tasks, strict=True):
            for at in summary["fractions"]:
                median = at["median_epochs_to_generalise"]
                assert f"{'never' if median is None else f'{median:,.0f}'} {at['generalised']} of 5 seeds" in row
            assert f"{at['test_accuracy']['mean']:.0%} ± {at['test_accuracy']['deviation']:.0%}" in row
            assert row.endswith(f" {at['gflops']['mean']:.1f}")


def test_choices_at_an_end_of_what_was_tried_are_told(results: dict[str, Any], tree: Tree) -> None:
    at = [one for one in results["choices"] if one["edges"]]
    mine = [one for one in at if one["head"] == "cosine"]
    assert (
        at and f"no head is called better: softmax {len([o for o in at if o['head'] == 'softmax'])} of 10" in tree.text
    )
    assert f"cosine {len(mine)} of 10" in tree.text
    inside = {**results, "choices": [{**one, "edges": []} for one in results["choices"]]}
    assert "no head is called better" not in page(inside)


def test_seeds_that_never_generalise_are_crosses_and_the_others_dots(results: dict[str, Any], html: str) -> None:
    never = {
        (one["task"], one["network"], one["head"], at["fraction"])
        for one in results["summary"]
        for at in one["fractions"]
        if at["never"]
    }
    assert html.count('class="cross"') == len(never) > 50
    reached = sum(cell["epochs_to_generalise"] is not None for cell in results["cells"])
    plots = re.findall(r'<svg[^>]*aria-label="[^"]*epochs to generalise by share.*?</svg>', html)
    assert len(plots) == 10 and sum(plot.count('class="dot"') for plot in plots) == reached > 100


def test_cells_that_diverge_are_told(results: dict[str, Any]) -> None:
    def diverges(cell: dict[str, Any]) -> None:
        if (cell["task"], cell["network"], cell["head"]) == ("circle", "mlp", "cosine"):
            cell.update(dict.fromkeys(MEASURES), diverged=3, epochs_to_generalise=None)

    tree = Tree(page(changed(results, diverges)))
    row = rows(tree, "cosine", "mlp")[3]
    assert row.count("never 0 of 5 seeds, 5 diverged") == 3 and row.endswith("5 diverged - - - - - -")


def test_a_study_in_which_nothing_generalises_has_a_page(results: dict[str, Any]) -> None:
    tree = Tree(page(changed(results, lambda cell: cell.update(epochs_to_generalise=None, test_accuracy=0.1))))
    assert all(row.count("never") == 3 for row in rows(tree, "softmax", "mlp")[2:])
    assert rows(tree, "euclidean", "mlp")[:2] == [
        "euclidean mlp 0 of 75 0 0 0 0 0 - +0.0% +0.0% to +0.0%",
        "euclidean mlp more more more more more",
    ]


def test_hostile_names_are_escaped(results: dict[str, Any]) -> None:
    evil = "</script><img src=x onerror=alert(1)>'\"&"
    found = json.loads(json.dumps(results).replace('"cosine"', json.dumps(evil)))
    found["config"]["title"] = found["torch"] = found["machine"] = evil
    tree = Tree(page(found))
    assert not [tag for tag, attributes in tree.tags if tag == "img" or "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in tree.tags) == 1 and tree.text.count(evil) > 3


def test_the_published_page_is_what_the_present_code_makes_of_the_published_cells(results: dict[str, Any]) -> None:
    assert summarise(results["cells"]) == results["summary"]
    assert compare(results["cells"], results["summary"], "softmax") == results["comparison"]
    assert PUBLISHED.with_suffix(".html").read_text() == page(results)
