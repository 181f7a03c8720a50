"""`overtone` from a directory that is not the checkout, and that has folders of the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cli.__main__ import main
from common.checkout import ROOT, python_path
from launch import reach
from tests.support.tiny import make_data, tiny_tree

PROGRAM = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cli.__main__ import main; sys.exit(main())\n"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a tiny config, relative paths in it, and packages of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    make_data(tmp_path / "prepared")
    tree = tiny_tree(data__path="prepared", run="runs/tiny", train__steps=2)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for package in ("data", "model"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('of another project')\n")
    (tmp_path / "overtone").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_needs_nothing_in_the_checkout(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert python_path() == {"PYTHONPATH": f"{ROOT}{os.pathsep}/mine", "PYTHONSAFEPATH": "1"}
    monkeypatch.chdir(ROOT)
    assert python_path() == {}


@pytest.mark.slow
def test_two_ranks_train_and_the_run_says_by_what(elsewhere: Path) -> None:
    words = ["run", "--num-gpus", "2", "tiny.yaml", "data.tokenizer.vocab_size=67"]
    done = subprocess.run([sys.executable, "-I", "overtone", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"PYTHONPATH={ROOT} PYTHONSAFEPATH=1 " in done.stdout.splitlines()[0]
    run = elsewhere / "runs" / "tiny"
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert json.loads((run / "lock").read_text().splitlines()[0])["command"] == f"overtone {' '.join(words)}"


def test_hosts_and_slurm_find_the_checkout(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(["slurm", "tiny.yaml", "--nodes", "1"]) == 0
    script = (elsewhere / "runs" / "tiny" / "slurm.sh").read_text()
    assert f"\nexport PYTHONPATH={ROOT}\n" in script and f"--chdir={elsewhere}" in script
    asked: list = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(words[-1])
        return subprocess.CompletedProcess(words, 0, f"{reach.MARK}{{}}", "")

    monkeypatch.setattr(reach.subprocess, "run", run)
    assert reach.ask(["a"]) == {"a": {}}
    assert f"cd {elsewhere} && PYTHONPATH={ROOT} PYTHONSAFEPATH=1 {sys.executable} " in asked[0]
