"""`python -m launch slurm`: what it writes and refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import ConfigError
from launch.__main__ import main
from launch.slurm import seconds_of
from tests.support.tiny import make_data, tiny_tree


def config(folder: Path, **changes: Any) -> Path:
    """A tiny run in `folder/run`; 16 passes of a step are to be shared by the ranks."""
    if not (folder / "data").exists():
        make_data(folder / "data")
    ours = {"train__tokens_per_step": 128, "train__micro_batch": 1, "timeouts__heartbeat_s": 120}
    tree = tiny_tree(run=str(folder / "run"), data__path=str(folder / "data"), **{**ours, **changes})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_script_has_what_was_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "a 'b' $c")
    monkeypatch.setenv("HF_TOKEN", "hidden")
    asked = [str(config(tmp_path)), "--nodes", "2", "--gpus-per-node", "4", "--time", "1-12", "--partition", "big"]
    more = ["--account", "me", "--sbatch", "qos=high", "--sbatch", "gpus-per-node=a100:4", "--sbatch", "hold"]
    assert main(["slurm", *asked, "train.steps=7", *more, "head={distance: dot}"]) == 0
    script = tmp_path / "run" / "slurm.sh"
    assert f"submit it with: sbatch {script}" in capsys.readouterr().out
    text = script.read_text()
    options = re.findall(r"^#SBATCH --(.*)", text, re.MULTILINE)
    assert options == [
        "job-name=run",
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=a100:4",
        "exclusive",
        "mem=0",
        "time=1-12",
        "partition=big",
        "account=me",
        f"chdir={os.getcwd()}",
        f"output={tmp_path}/run/slurm-%j.out",
        "open-mode=append",
        "requeue",
        "signal=USR1@90",
        "qos=high",
        "hold",
    ]
    assert "slots=4/" in text and "hidden" not in text
    assert f" -m launch run {asked[0]} train.steps=7 'head={{distance: dot}}' --hostfile " in text
    exported = "\n".join(line for line in text.splitlines() if line.startswith("export NCCL_DEBUG="))
    told = subprocess.run(["bash", "-c", f'{exported}\nprintf %s "$NCCL_DEBUG"'], capture_output=True, text=True)
    assert told.stdout == "a 'b' $c"


@pytest.mark.parametrize("option", ["cpus-per-task=8", "mem=64G"])
def test_a_job_takes_whole_nodes_unless_it_says_what_it_takes(tmp_path, option):
    assert main(["slurm", str(config(tmp_path)), "--nodes", "1", "--sbatch", option]) == 0
    text = (tmp_path / "run" / "slurm.sh").read_text()
    assert f"#SBATCH --{option}\n" in text and "--exclusive" not in text and "--mem=0" not in text
    assert "gpus-per-node" not in text and "slots=2/" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_the_script_passes_shellcheck(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "a 'b' $c `d`\n!")
    folder = tmp_path / "it's a #1 $HOME"
    folder.mkdir()
    assert main(["slurm", str(config(folder)), "--nodes", "2", "head={distance: dot}"]) == 0
    found = subprocess.run(["shellcheck", "run/slurm.sh"], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("3-12", 302400), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_times_are_read_as_slurm_reads_them(limit, seconds):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize("limit", ["", "soon", "1:2:3:4", "1-2:3:4:5", "-5", "5-", "1h", "1:30 ", "٣"])
def test_other_times_are_refused(limit):
    with pytest.raises(ConfigError, match="expected minutes, minutes:seconds"):
        seconds_of(limit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes 0: expected 1 or more"),
        (["--nodes", "1", "--gpus-per-node", "0"], "leave it out to train on cores"),
        (["--nodes", "3"], "With 2 ranks on each, --nodes can be 1, 2, 4, 8."),
        (["--nodes", "1", "--gpus-per-node", "3"], "With 3 ranks on each, --nodes can be no number."),
        (["--nodes", "1", "parallel.vocab=4"], "With 2 ranks on each, --nodes can be 2, 4, 8."),
        (["--nodes", "1", "--time", "soon"], "--time soon: expected minutes"),
        (["--nodes", "1", "--time", "1:30"], "told to save 90 s before its time is over"),
        (["--nodes", "1", "checkpoint.grace_s=65476"], "at most"),
        (["--nodes", "1", "--sbatch", "nodes=2"], "nodes is set by Overtone itself: use --nodes"),
        (["--nodes", "1", "--sbatch", "--qos=high"], "without its dashes"),
        (["--nodes", "1", "--sbatch", "qos=a\n#SBATCH --hold"], "on one line"),
        (["--nodes", "1", "resume=never"], "resume=auto"),
        (["--nodes", "1", "train.stepz=3"], "did you mean train.steps?"),
        (["--nodes", "1", "data.path=/nowhere"], "data prepare"),
        (["--nodes", "1", "--submit"], "--submit: sbatch is not found"),
    ],
)
def test_bad_input_stops_before_anything_is_written(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("launch.slurm.shutil.which", lambda name: None)
    path = str(config(tmp_path))
    words = [f"--sbatch={arguments[3]}"] if "--sbatch" in arguments else arguments[2:]
    assert main(["slurm", path, *arguments[:2], *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_slurm_refuses_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: huge' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["slurm", str(config(tmp_path)), "--nodes", "1", "--partition", "huge", "--submit"]) == 2
    assert "does not take" in (told := capsys.readouterr().err) and "invalid partition specified: huge" in told
