"""The README is a promise: its code runs, and its commands, files and links are there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

README = Path("README.md").read_text()


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "overtone", importlib.import_module("model"))  # as it is installed
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_its_modules_and_recipes_are_there() -> None:
    modules = set(re.findall(r"python -m ([a-z_.]+)", README))
    assert {"data", "pretrain", "pretrain.evaluate", "pretrain.report", "launch", "benchmarks.train"} <= modules
    for module in modules:
        name = module if "." in module else f"{module}.__main__"
        assert importlib.util.find_spec(name), module
    recipes = set(re.findall(r"configs/[\w.-]+\.yaml", README))
    assert recipes == {str(path) for path in Path("configs").glob("*.yaml")}


def test_it_names_every_command() -> None:
    from cli.__main__ import TABLE

    assert set(re.findall(r"\bovertone ([a-z][a-z-]+)", README)) == set(TABLE)


def test_its_links_and_targets_are_there() -> None:
    assert all(Path(link).exists() for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", README))
    makefile = Path("Makefile").read_text()
    targets = set(re.findall(r"(?:`|^    )make ([a-z]+)", README, re.MULTILINE))
    assert {"quickstart", "test", "setup"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_recipe_is_in_its_table() -> None:
    assert all(f"`{path}`" in README for path in Path("configs").glob("*.yaml"))
