"""Who may import whom: walked from the sources, as docs and style promise."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HOUSE = {"data", "model", "pretrain", "launch", "benchmarks", "tests"}
ALLOWED_WITHIN = {  # folder -> folders of the house that it may import
    "data": {"data"},
    "model": {"model"},
    "pretrain": {"pretrain", "model", "data"},
    "launch": {"launch", "pretrain.config", "pretrain.claim", "pretrain.gpus", "pretrain.plain", "data.settings"},
}
EXCEPTIONS: dict[str, set[str]] = {
    "model/__main__.py": {"model", "pretrain", "data"},  # reads runs and text; nothing imports it
    "model/hf/modeling_overtone.py": set(),  # copied into exported folders, where nothing of the house is
    "model/hf/tokenization_overtone.py": set(),
}
OUTSIDERS = {  # package -> files that may import it; elsewhere in the four folders it is an error
    "torch": lambda path: path.parts[0] in ("model", "pretrain"),
    "deepspeed": lambda path: path.as_posix() in ("pretrain/engine.py", "pretrain/checkpoint.py"),
    "zeus": lambda path: path.as_posix() == "pretrain/energy.py",
    "tensorboard": lambda path: path.as_posix() == "pretrain/metrics.py",
    "torch.utils.tensorboard": lambda path: path.as_posix() == "pretrain/metrics.py",
    "lm_eval": lambda path: path.as_posix() == "pretrain/harness.py",
    "datasets": lambda path: path.parts[0] == "data",
    "sentencepiece": lambda path: path.parts[0] == "data" or path.as_posix() == "model/hf/tokenization_overtone.py",
    "transformers": lambda path: path.parts[:2] == ("model", "hf"),
    "pyarrow": lambda path: path.parts[0] == "data",
}
SOURCES = [path for folder in ALLOWED_WITHIN for path in sorted(Path(folder).rglob("*.py"))]


def imports_of(source: str) -> set[str]:
    """Dotted names of all imports, wherever in the file; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            found.update({node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names})
    return found


def inside(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") or one.startswith(name + ".") for one in allowed)


def violations(path: Path, source: str) -> list[str]:
    found = []
    allowed = EXCEPTIONS.get(path.as_posix(), ALLOWED_WITHIN[path.parts[0]])
    for name in sorted(imports_of(source)):
        if name.split(".")[0] in HOUSE and not inside(name, allowed):
            found.append(f"{path} imports {name}")
        for package, may in OUTSIDERS.items():
            if (name == package or name.startswith(package + ".")) and not may(path):
                found.append(f"{path} imports {name}")
    if path.stem == "config" and any(name.split(".")[0] == "torch" for name in imports_of(source)):
        found.append(f"{path}: a config needs no torch")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_import_directions(path: Path) -> None:
    assert not violations(path, path.read_text())


def test_the_walk_sees_violations() -> None:
    assert violations(Path("model/decoder.py"), "def f():\n    from pretrain.ranks import Ranks\n")
    assert violations(Path("model/decoder.py"), "import deepspeed")
    assert violations(Path("model/sample.py"), "from data.tokenizer import Tokenizer")
    assert violations(Path("model/hf/modeling_overtone.py"), "from model.config import DecoderConfig")
    assert violations(Path("launch/hosts.py"), "from pretrain.loop import Run")
    assert violations(Path("data/config.py"), "import torch")
    assert violations(Path("pretrain/config.py"), "import torch.nn")
    assert not violations(Path("launch/hosts.py"), "from pretrain.config import load")


def test_package_markers_are_empty() -> None:
    assert all(path.read_text() == "" for path in SOURCES if path.name == "__init__.py")
