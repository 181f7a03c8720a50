"""The programs that people copy do what their headers say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installed import environment


def output_of(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_of(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]


@pytest.mark.slow
def test_the_classifier_learns_the_digits(tmp_path: Path) -> None:
    output = output_of(tmp_path, "examples/classifier.py")
    (accuracy,) = re.findall(r"held-out accuracy ([\d.]+)%", output)
    assert float(accuracy) > 95
    (digit, nearest) = re.findall(r"is a (\d); its nearest prototype is that of (\d)", output)[0]
    assert digit == nearest


@pytest.mark.slow
def test_the_language_model_learns_its_own_text(tmp_path: Path) -> None:
    losses = losses_of(output_of(tmp_path, "examples/language_model.py"))
    assert len(losses) == 10 and losses[-1] < 1.6 < 2.5 < losses[0]


@pytest.mark.slow
def test_the_language_model_does_not_see_how_many_ranks_it_has(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    losses = losses_of(output_of(whole, "examples/language_model.py"))
    assert losses_of(output_of(halves, *launcher, "2", "examples/language_model.py")) == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
def test_the_new_distance_is_as_exact_as_float32_and_learns(tmp_path: Path) -> None:
    output = output_of(tmp_path, "examples/new_distance.py")
    error, accuracy = re.search(r"float64: (\S+)\naccuracy ([\d.]+)%", output).groups()
    assert float(error) < 3e-6 and float(accuracy) > 95


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.py")), ids=str)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 90 and any(f"python {path}" in line for line in lines[:10])
