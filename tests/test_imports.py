"""Who may import whom: walked from the sources, as docs and style promise."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import model
from tests.support.installed import environment, required_by

HOUSE = {"common", "data", "model", "pretrain", "launch", "cli", "benchmarks", "tests"}
ALLOWED_WITHIN = {  # folder -> folders of the house that it may import
    "common": {"common"},
    "data": {"data", "common"},
    "model": {"model"},
    "pretrain": {"pretrain", "model", "data", "common"},
    "launch": {
        *("launch", "common", "pretrain.config", "pretrain.run_folder", "pretrain.activations"),
        *("pretrain.runtime.agreement", "pretrain.runtime.claim", "pretrain.runtime.endings"),
    },
    "cli": {"cli", "launch", "pretrain", "data", "common"},
}
PRETRAIN = (  # from the lowest room up: each imports what stands before it
    *("records", "deepspeed_settings", "config", "runtime", "modules", "checkpoints", "energy", "optim", "cpu_adam"),
    *("batches", "engine", "inference", "run_folder", "recorder", "analysis", "window", "decisions", "loop"),
    *("opening", "replay", "study"),
)
EXCEPTIONS: dict[str, set[str]] = {
    "model/__main__.py": {"model", "cli"},  # the console script; nothing imports it
    # copied into exported folders, where nothing of the house is but for what is copied too
    "model/hf/configuration_overtone.py": set(),
    "model/hf/decoder_overtone.py": {"model.hf.configuration_overtone"},
    "model/hf/head_overtone.py": {"model.hf.configuration_overtone"},
    "model/hf/modeling_overtone.py": {f"model.hf.{name}_overtone" for name in ("configuration", "decoder", "head")},
    "model/hf/tokenization_overtone.py": set(),
}
OUTSIDERS = {  # package -> files that may import it; elsewhere in the four folders it is an error
    "torch": lambda path: path.parts[0] in ("model", "pretrain"),
    "deepspeed": lambda path: path.as_posix() in ("pretrain/engine.py", "pretrain/cpu_adam.py"),
    "zeus": lambda path: path.as_posix() == "pretrain/energy/meter.py",
    "tensorboard": lambda path: path.as_posix() == "pretrain/recorder.py",
    "torch.utils.tensorboard": lambda path: path.as_posix() == "pretrain/recorder.py",
    "lm_eval": lambda path: path.as_posix() == "pretrain/analysis/harness.py",
    "datasets": lambda path: path.parts[0] == "data" or path.as_posix() == "pretrain/study/vision/hub.py",
    "sentencepiece": lambda path: path.parts[0] == "data" or path.as_posix() == "model/hf/tokenization_overtone.py",
    "transformers": lambda path: path.parts[:2] == ("model", "hf"),
    "pyarrow": lambda path: path.parts[0] == "data",
    "torchvision": lambda path: path.as_posix() == "pretrain/study/vision/zoo.py",
    "PIL": lambda path: path.as_posix() == "pretrain/study/vision/pictures.py",
    "sklearn": lambda path: path.as_posix() == "pretrain/study/vision/sources.py",
}
SOURCES = [path for folder in ALLOWED_WITHIN for path in sorted(Path(folder).rglob("*.py"))]


def imports_of(path: Path, tree: ast.AST) -> set[str]:
    """Dotted names of all imports, wherever in the file; `from a import b` gives a and a.b.

    Inside model/, which is installed as `overtone`, the house's own names are relative; elsewhere none is.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.parts[:-1][: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            assert path.parts[0] == "model" or not node.level, f"{path}: a relative import hides where {module} is"
            relative = bool(node.level) or path.parts[0] != "model" or path.as_posix() in EXCEPTIONS
            assert relative or not inside(module, {"model"}), f"{path}: {module}: inside model/ it must be relative"
            found.update({module} | {f"{module}.{alias.name}" for alias in node.names})
    return found


def inside(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") or one.startswith(name + ".") for one in allowed)


def room_of(name: str) -> str:
    """The file or folder of pretrain/ that a module is in."""
    return name.split(".")[1] if name.startswith("pretrain.") else ""


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


MODULES = {module_of(source) for source in SOURCES}


@functools.cache
def imports_when_run(path: Path) -> set[str]:
    """The house's modules that a module imports, at once or later, but for the sake of types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return imports_of(path, tree) & MODULES - {module_of(path)}


def violations(path: Path, source: str) -> list[str]:
    found = []
    allowed = EXCEPTIONS.get(path.as_posix(), ALLOWED_WITHIN[path.parts[0]])
    imported = imports_of(path, ast.parse(source))
    for name in sorted(imported):
        if name.split(".")[0] in HOUSE and not inside(name, allowed):
            found.append(f"{path} imports {name}")
        for package, may in OUTSIDERS.items():
            if (name == package or name.startswith(package + ".")) and not may(path):
                found.append(f"{path} imports {name}")
    if path.stem == "config" and any(name.split(".")[0] == "torch" for name in imported):
        found.append(f"{path}: a config needs no torch")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_import_directions(path: Path) -> None:
    assert not violations(path, path.read_text())


def test_rooms_of_pretrain_import_downwards() -> None:
    height = {room: place for place, room in enumerate(PRETRAIN)}
    for path in (source for source in SOURCES if source.parts[0] == "pretrain"):
        here = height.get(room_of(module_of(path)), len(PRETRAIN))  # commands are above all
        for name in imports_when_run(path):
            if room_of(name) in height:
                assert height[room_of(name)] <= here, f"{path} imports {name}, which stands above it"
            else:
                assert room_of(name) in ("", room_of(module_of(path))), f"{path} imports the command {name}"


def test_no_module_imports_itself_on_a_way_round() -> None:
    above = {module_of(path): imports_when_run(path) for path in SOURCES}
    while lowest := [name for name, below in above.items() if not below & above.keys()]:
        for name in lowest:
            del above[name]
    assert not above, f"these import each other: {', '.join(above)}"


def test_the_walk_sees_violations() -> None:
    assert violations(Path("model/decoder.py"), "def f():\n    from pretrain.runtime.ranks import Ranks\n")
    assert violations(Path("model/decoder.py"), "import deepspeed")
    assert violations(Path("model/sample.py"), "from data.tokenizer import Tokenizer")
    assert violations(Path("model/hf/modeling_overtone.py"), "from model.config import DecoderConfig")
    assert violations(Path("launch/hosts.py"), "from pretrain.loop import Run")
    assert violations(Path("data/config.py"), "import torch")
    assert violations(Path("pretrain/config.py"), "import torch.nn")
    assert not violations(Path("launch/hosts.py"), "from pretrain.config import load")


def test_package_markers_are_empty() -> None:
    """But for that of the installed package, which holds its public names."""
    markers = [path for path in SOURCES if path.name == "__init__.py"]
    assert [path.as_posix() for path in markers if path.read_text()] == ["model/__init__.py"]


def run(program: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_public_names_are_imported_at_first_use(tmp_path: Path) -> None:
    assert all(hasattr(model, name) for name in model.__all__) and set(model.__all__) <= set(dir(model))
    assert not hasattr(model, "HarmonicHat")
    program = """
import sys, overtone, overtone.__main__, model
assert "torch" not in sys.modules
from overtone import *
assert HarmonicHead.__module__ == "overtone.head" and "torch" in sys.modules
"""
    run(program, environment(tmp_path))


@pytest.mark.slow
def test_a_checkout_is_imported_under_both_its_names(tmp_path: Path) -> None:
    """As an editable installation has them. The kernels in C++ are torch's, and registered once."""
    program = """
import torch, model.head, overtone.head
features, targets = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6)
losses = [head.HarmonicHead(10, 8, seed=1)(features, targets) for head in (model.head, overtone.head)]
assert losses[0] == losses[1] and model.head.HarmonicHead is not overtone.head.HarmonicHead
"""
    run(program, environment(tmp_path))


HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        known = first in ALLOWED or first in sys.stdlib_module_names or first.startswith("_sysconfigdata")
        if known:
            return self.finder.find_spec(name, path, target)
        places = [place for place in path or sys.path if "/setuptools/_vendor" in place]  # it brings these itself
        return PathFinder.find_spec(name, places, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
HEAD = """
import torch
from overtone import HarmonicHead
head = HarmonicHead(10, 8, seed=1)
optimizer = torch.optim.AdamW(head.parameters())
features, targets = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6)
losses = []
for _ in range(2):
    losses.append(head(features, targets))
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[1] < losses[0]
"""
PUBLIC = """
import sys
from overtone import *
import overtone.attention
assert "pydantic" not in sys.modules and "overtone.config" not in sys.modules
"""


@pytest.mark.parametrize("program", [HEAD, PUBLIC], ids=["the head trains", "public names are imported"])
@pytest.mark.slow
def test_torch_alone_is_needed(program: str, tmp_path: Path) -> None:
    allowed = {"overtone"} | required_by("torch")
    assert "torch" in allowed and not allowed & {"pydantic", "yaml", "numpy", "rich", "deepspeed", "ninja"}
    run(f"ALLOWED = {allowed!r}\n{HIDING}\n{program}", environment(tmp_path))


@pytest.mark.slow
def test_the_engine_leaves_the_compiler_alone() -> None:
    code = (
        "import sys, torch; compile = torch.compile; import pretrain.engine; assert torch.compile is compile; "
        "import deepspeed.runtime.zero.muon.muon_optimizer; assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
