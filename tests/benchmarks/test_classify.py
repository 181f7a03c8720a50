"""The head as a plain classifier: every distance learns real data, and the page about it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.classify import VARIANTS, Variant, digits, told, train_addition, train_digits
from model.distances import DISTANCES
from tests.support.prose import Prose

PAGE = Path("docs/classifier.md").read_text()


def test_every_distance_is_tried() -> None:
    assert {variant.distance for variant in VARIANTS} == set(DISTANCES)


def test_the_split_is_fixed_and_even() -> None:
    split = digits()
    assert split.inputs.shape == (1347, 64) and split.test_inputs.shape == (450, 64)
    assert split.inputs.abs().max() <= 1
    counts = split.test_classes.bincount()
    assert len(counts) == 10 and counts.max() - counts.min() <= 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_digits(variant: Variant) -> None:
    assert train_digits(variant, seed=0).test_accuracy > 0.95


@pytest.mark.parametrize("exponent", ["learned", (2.0, 12.0)], ids=str)
def test_other_exponents(exponent: str | tuple[float, float]) -> None:
    assert train_digits(Variant("euclidean", exponent=exponent), seed=0).test_accuracy > 0.95


def test_modular_addition_generalises() -> None:
    trained = train_addition(Variant("euclidean"), seed=0, epochs=500)
    assert trained.train_accuracy > 0.99
    assert trained.test_accuracy > 0.9


def test_the_pages_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/classifier.md", "exec"), {})


def test_the_page_tells_every_distance_with_its_formula() -> None:
    rows = PAGE.replace("\\|", "|")  # a table's cells write | so
    assert all(f"| `{name}` | `{entry.formula}` |" in rows for name, entry in DISTANCES.items())


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"benchmarks/results/classify-{name}-cpu.json").read_text())
    return found


@pytest.mark.parametrize("name", ["digits", "addition"])
def test_the_page_has_the_table_of_the_results(name: str) -> None:
    found = results(name)
    Prose("docs/classifier.md", "Measured").table(told(found["rows"], found["epochs"]))
    assert {len(row["test_accuracy"]) for row in found["rows"]} == {5}


def test_the_page_has_the_exponents_of_the_results() -> None:
    by_head: dict[str, list[str]] = {}
    for head, _, accuracy, *_ in told(results("exponents")["rows"], 20)[1:]:
        by_head.setdefault(head, []).append(accuracy)
    heading = ["head", "n = 1", "sqrt(32) = 5.7", "n = 32", "learned"]
    Prose("docs/classifier.md", "The exponent").table([heading, *([head, *row] for head, row in by_head.items())])


def test_what_generalises_without_decay_is_as_the_page_says() -> None:
    reached = {row["head"]: row["test_accuracy"] for row in results("addition")["rows"] if not row["weight_decay"]}
    free = {"euclidean", "cosine", "cosine_softmax"}
    assert all((min(accuracies) > 0.9) == (head in free) for head, accuracies in reached.items())
    assert all(max(accuracies) < 0.2 for head, accuracies in reached.items() if head not in free)
