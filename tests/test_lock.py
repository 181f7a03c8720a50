"""The lock: whole, pinned, hashed, without an address, and within the bounds of pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

FOLDER = Path("requirements")
LOCKS = ["run-cpu", "dev-cpu", "run-gpu", "dev-gpu"]
DEV = ["train", "eval", "export", "docs", "dev"]  # all that the extra `dev` brings
LEANED_ON = ["torch", "deepspeed", "transformers", "triton", "zeus", "datasets", "lm-eval"]


def pins(name: str, python: str) -> dict[str, str]:
    """Versions by package, of what one Python on Linux would install."""
    text = re.sub(r"^#.*\n", "", (FOLDER / f"{name}.txt").read_text(), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text.strip()):
        lines = [line.rstrip(" \\") for line in block.splitlines()]
        asked = Requirement(lines[0])
        assert len(lines) > 1 and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", line) for line in lines[1:]), block
        (pin,) = asked.specifier
        assert pin.operator == "==" and not pin.version.endswith("*"), block
        here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
                "platform_machine": "x86_64", "platform_python_implementation": "CPython"}  # fmt: skip
        if asked.marker is None or asked.marker.evaluate(here):
            assert found.get(asked.name, pin.version) == pin.version, f"{asked.name} twice for Python {python}"
            found[asked.name] = pin.version
    return found


def asked(*extras: str) -> list[Requirement]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    words = project["dependencies"] + [word for name in extras for word in project["optional-dependencies"][name]]
    return [Requirement(word) for word in words if not word.startswith("overtone")]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_all_that_is_asked_for_within_bounds(name: str, python: str) -> None:
    locked = pins(name, python)
    for one in asked(*(DEV if name.startswith("dev") else ["train"])):
        assert one.specifier.contains(locked[one.name.lower()]), one


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_locks_agree(python: str) -> None:
    """Set-up and tests run the same versions, CPUs and GPUs too; CPUs get nothing that only GPUs need."""
    run_cpu, dev_cpu, run_gpu, dev_gpu = (pins(name, python) for name in LOCKS)
    assert run_cpu.items() <= dev_cpu.items() and run_gpu.items() <= dev_gpu.items()
    assert run_cpu.pop("torch") == f"{run_gpu.pop('torch')}+cpu"
    assert run_cpu.items() <= run_gpu.items()
    only = run_gpu.keys() - run_cpu.keys()
    assert only and all(name.startswith(("nvidia-", "cuda-", "triton")) for name in only)
    assert pins("build", python).items() <= run_cpu.items()
    assert pins("torch-cpu", python)["torch"] == dev_cpu["torch"]


def test_no_file_of_the_lock_names_an_address() -> None:
    files = sorted(FOLDER.glob("*.txt"))
    assert len(files) == 7 and all("://" not in file.read_text() and " @ " not in file.read_text() for file in files)


def test_what_we_lean_on_has_bounds_on_both_sides() -> None:
    bounds = {one.name: {part.operator for part in one.specifier} for one in asked(*DEV)}
    assert all(bounds[name] == {">=", "<"} for name in LEANED_ON), bounds


def test_the_newest_of_everything_is_asked_for_without_bounds() -> None:
    command = [sys.executable, "requirements/lock.py", "newest"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(names) == {one.name for one in asked(*DEV)} and not set("<>=[") & set("".join(names))
