"""A real Slurm, of two hosts on this machine, runs what `python -m launch slurm` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts.network import Hosts
from benchmarks.hosts.slurm import Slurm, why_no_slurm
from pretrain.config import load
from tests.launch.test_slurm import config
from tests.support.ranks import run_ranks
from tests.support.tiny import run_to_end

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_no_slurm() is not None, reason=why_no_slurm() or ""),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(2, folder) as hosts:
        yield Slurm(hosts, folder / "slurm")


def test_a_preempted_job_is_queued_again_and_ends_as_the_unbroken_one(slurm: Slurm, tmp_path: Path) -> None:
    """Two nodes, two ranks on each, prototypes shared within a node; the run folder has an odd name."""
    changes = {"train__steps": 80, "logging__every": 1, "parallel__vocab": "node", "parallel__zero": 1}
    folder = tmp_path / "it's 100% odd"
    folder.mkdir()
    path = config(folder, **changes)
    cut = slurm.submit(path, "--nodes", "2", "--time", "10")
    cut.wait_for_step(3)
    slurm.told("scancel", "--signal=USR1", cut.number)
    slurm.wait_for(lambda: (cut.fact("JobState"), cut.fact("Restarts")) == ("PENDING", "1"))
    # Slurm has it wait for two minutes: a node does not start a job again within the second in which it ended it.
    slurm.wait_for(slurm.is_idle)
    slurm.told("scontrol", "update", f"JobId={cut.number}", "StartTime=now+3")
    assert cut.end() == ("COMPLETED", "0:0"), cut.output()
    assert cut.fact("Restarts") == "1"
    assert "resumed from" in cut.output() and cut.output().count("\nstep 80/") == 1
    unbroken = load(path, [f"run={folder / 'whole'}", "parallel.vocab=2"])
    whole = run_ranks(run_to_end, 4, tmp_path, cfg=unbroken)[0]
    assert list(cut.losses().values()) == whole and len(whole) == 80


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(config(tmp_path, train__steps=10**6, logging__every=1, optim__lr=1e-5), "--nodes", "1")
    job.wait_for_step(3)
    slurm.told("scancel", job.number)
    assert job.end()[0] == "CANCELLED", job.output()
    slurm.wait_for(lambda: (job.run / "exit.json").exists(), 60)
    assert json.loads((job.run / "exit.json").read_text())["code"] == 75
    slurm.wait_for(lambda: slurm.told("squeue", "--noheader") == "", 60)
    assert job.fact("Restarts") == "0" and list((job.run / "checkpoints").glob("step-*"))


def test_a_job_that_fails_says_so_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    path = config(tmp_path)
    job = slurm.submit(path, "--nodes", "2", "--sbatch", "hold")
    shutil.rmtree(tmp_path / "data")
    slurm.told("scontrol", "release", job.number)
    assert job.end() == ("FAILED", "2:0"), job.output()
    assert job.fact("Restarts") == "0" and "data prepare" in job.output()
