"""Files and functions that a reader can hold."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

import pytest

ROOMS = ("common", "data", "model", "pretrain", "launch", "cli", "benchmarks", "examples")
FILES = sorted(path for room in ROOMS for path in Path(room).rglob("*") if path.suffix in (".py", ".cpp", ".h"))
LINES = {path: len(path.read_text().splitlines()) for path in FILES}
TESTS = sorted(Path("tests").rglob("*.py"))


def test_no_source_file_is_long_and_most_are_short() -> None:
    assert {path: count for path, count in LINES.items() if count >= 450} == {}
    assert median(count for count in LINES.values() if count) < 180


@pytest.mark.parametrize("path", [path for path in [*FILES, *TESTS] if path.suffix == ".py"], ids=str)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    long = {node.name: size for node in functions if (size := (node.end_lineno or 0) - node.lineno + 1) > 60}
    assert long == {}
