"""The wheel: model/ as `overtone`, and nothing else; with torch alone beside it, it trains."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import model
from tests.support.installed import requirements_of

pytestmark = pytest.mark.slow  # it is built and installed first


def call(*words: str | Path, cwd: Path, code: int = 0) -> str:
    """What a command wrote. It sees neither this checkout nor this environment."""
    outside = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=outside, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves folders where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree("model", folder / "model", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(name, folder)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", "dist"]
    call(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=folder)
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, torch and what torch requires: its folder of programs."""
    folder = tmp_path_factory.mktemp("bare")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in requirements_of("torch"):
        for file in metadata.files(distribution) or []:
            top = packages / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(Path(sysconfig.get_path("purelib")) / file.parts[0])
    python = folder / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        wheel,
        cwd=folder,
    )
    return folder / "bin"


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.stat().st_size < 160e3
    names = zipfile.ZipFile(wheel).namelist()
    kinds = {".py", ".cpp", ".h"}
    sources = [path for path in Path("model").rglob("*") if path.suffix in kinds]
    expected = {"overtone/py.typed"} | {f"overtone/{path.relative_to('model').as_posix()}" for path in sources}
    assert {".cpp", ".h"} <= {path.suffix for path in sources}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in names} == {"overtone", f"overtone-{model.__version__}.dist-info"}


def test_the_wheel_asks_for_torch_alone(wheel: Path) -> None:
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    lines = zipfile.ZipFile(wheel).read(name).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert len(required) == 1 and re.match("Requires-Dist: torch[<>]", required[0])
    assert {line for line in lines if line.startswith("Provides-Extra: ")} == {f"Provides-Extra: {e}" for e in extras}


def test_with_torch_alone_the_digits_are_learnt(bare: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, classes = datasets.load_digits(return_X_y=True)
    torch.save((torch.tensor(images, dtype=torch.float32), torch.tensor(classes)), tmp_path / "digits.pt")
    shutil.copy("examples/classifier.py", tmp_path)
    (accuracy,) = re.findall(
        r"held-out accuracy ([\d.]+)%", call(bare / "python", "classifier.py", "digits.pt", cwd=tmp_path)
    )
    assert float(accuracy) > 95


def test_no_generic_name_is_installed(bare: Path, tmp_path: Path) -> None:
    folders = [path.name for path in Path().iterdir() if (path / "__init__.py").exists()]
    assert {"data", "model", "pretrain", "launch", "common", "tests"} <= set(folders)
    program = f"from importlib.util import find_spec; print([name for name in {folders} if find_spec(name)])"
    assert call(bare / "python", "-c", program, cwd=tmp_path) == "[]\n"


def test_the_command_of_the_wheel_says_where_the_commands_are(bare: Path, tmp_path: Path) -> None:
    for command in ([bare / "overtone"], [bare / "python", "-m", "overtone"]):
        assert call(*command, "--version", cwd=tmp_path) == f"overtone {model.__version__}\n"
        assert "make setup" in call(*command, "train", "config.yaml", cwd=tmp_path, code=2)
