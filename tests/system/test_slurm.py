"""A real Slurm, of two hosts on this machine, runs what `python -m launch slurm` writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.config import load
from tests.launch.test_slurm import config
from tests.support.hosts import Host, Hosts, why_not
from tests.support.ranks import run_ranks
from tests.support.tiny import run_to_end

LAUNCH = [sys.executable, "-m", "launch"]
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
SLURM_CONF = """
ClusterName=test
SlurmctldHost=node1
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SchedulerParameters=sched_interval=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node[1-2] CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    missing = [
        tool for tool in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(tool, path=PATH) is None
    ]
    return f"missing: {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else why_not()


pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_no_slurm() is not None, reason=why_no_slurm() or ""),
]


class Slurm:
    """munged and slurmctld on the first of two hosts, and slurmd on both; they end with the hosts."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
        self.head: Host = hosts[0]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        # As Debian writes it: a host's own name is a loopback address there.
        own = folder / "hosts"
        own.write_text((hosts.folder / "hosts").read_text().replace("10.77.0.1 node1", "127.0.1.1 node1"))
        self.head.hide(Path("/etc/hosts"), own)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        places = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
        log = (folder / "munged").open("w")  # --force: though only root may go to its folder
        self.head.start("munged", "--foreground", "--force", *places, stdout=log, stderr=subprocess.STDOUT)
        self.wait_for((folder / "munge.socket").exists, 60)
        for host in hosts:
            for daemon in ("slurmctld", "slurmd")[host is not self.head :]:
                log = (folder / f"{host.name}-{daemon}").open("w")
                host.start(daemon, "-D", environment=self.environment, stdout=log, stderr=subprocess.STDOUT)
        self.wait_for(self.is_idle, 60)

    def told(self, *words: str) -> str:
        called = self.head.call(*words, environment=self.environment)
        return (called.stdout + called.stderr).strip()

    def is_idle(self) -> bool:
        """No node runs a job, or ends one."""
        return self.told("sinfo", "--noheader", "--format=%D %t") == "2 idle"

    def submit(self, path: Path, *more: str) -> Job:
        words = [*LAUNCH, "slurm", str(path), "--submit", *more]
        submitted = self.head.call(*words, environment=self.environment)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        number = re.search(r"Submitted batch job (\d+)", submitted.stdout)
        assert number, submitted.stdout
        run = next((Path(word[4:]) for word in more if word.startswith("run=")), path.parent / "run")
        return Job(self, number[1], run)

    def wait_for(self, happened: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.told("scontrol", "show", "job")
            time.sleep(0.2)


class Job:
    def __init__(self, slurm: Slurm, number: str, run: Path) -> None:
        self.slurm, self.number, self.run = slurm, number, run

    def fact(self, name: str) -> str:
        """What Slurm says of the job, such as its JobState."""
        told = self.slurm.told("scontrol", "--oneliner", "show", "job", self.number)
        return next((word.partition("=")[2] for word in told.split() if word.startswith(f"{name}=")), told)

    def output(self) -> str:
        file = self.run / f"slurm-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def wait_for_step(self, step: int) -> None:
        def happened() -> bool:
            assert self.fact("JobState") in ("PENDING", "RUNNING"), self.output()
            return f"\nstep {step}/" in self.output()

        self.slurm.wait_for(happened)

    def end(self) -> tuple[str, str]:
        """State and exit code at the end."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.slurm.wait_for(lambda: self.fact("JobState") in over)
        return self.fact("JobState"), self.fact("ExitCode")

    def losses(self) -> dict[int, float]:
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


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
