"""`python -m launch slurm`: what it writes and refuses; a real Slurm, of two hosts on this machine, runs it."""

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
from typing import Any

import pytest
import yaml

from common.errors import ConfigError
from launch.__main__ import main
from launch.slurm import seconds_of
from pretrain.config import load
from tests.support.hosts import Host, Hosts, why_not
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, run_to_end, tiny_tree

LAUNCH = [sys.executable, "-m", "launch"]
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def config(folder: Path, **changes: Any) -> Path:
    """A tiny run in `folder/run`; 16 passes of a step are to be shared by the ranks."""
    if not (folder / "data").exists():
        make_data(folder / "data")
    ours = {"train__tokens_per_step": 128, "train__micro_batch": 1, "timeouts__heartbeat_s": 120}
    tree = tiny_tree(run=str(folder / "run"), data__path=str(folder / "data"), **{**ours, **changes})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


# ---- what is written


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


# ---- a real Slurm

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


needs_slurm = pytest.mark.skipif(why_no_slurm() is not None, reason=why_no_slurm() or "")


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


@needs_slurm
@pytest.mark.timeout(900)
def test_a_preempted_job_is_queued_again_and_ends_as_the_unbroken_one(slurm: Slurm, tmp_path: Path) -> None:
    """Two nodes, two ranks on each, prototypes shared within a node; the run folder has an odd name."""
    changes = {"train__steps": 150, "logging__every": 1, "parallel__vocab": "node", "parallel__zero": 1}
    folder = tmp_path / "it's 100% odd"
    folder.mkdir()
    path = config(folder, **changes)
    cut = slurm.submit(path, "--nodes", "2", "--time", "10")
    cut.wait_for_step(5)
    slurm.told("scancel", "--signal=USR1", cut.number)
    slurm.wait_for(lambda: (cut.fact("JobState"), cut.fact("Restarts")) == ("PENDING", "1"))
    # Slurm has it wait for two minutes: a node does not start a job again within the second in which it ended it.
    slurm.wait_for(slurm.is_idle)
    slurm.told("scontrol", "update", f"JobId={cut.number}", "StartTime=now+3")
    assert cut.end() == ("COMPLETED", "0:0"), cut.output()
    assert cut.fact("Restarts") == "1"
    assert "resumed from" in cut.output() and cut.output().count("\nstep 150/") == 1
    unbroken = load(path, [f"run={folder / 'whole'}", "parallel.vocab=2"])
    whole = run_ranks(run_to_end, 4, tmp_path, cfg=unbroken)[0]
    assert list(cut.losses().values()) == whole and len(whole) == 150


@needs_slurm
@pytest.mark.timeout(900)
def test_a_cancelled_job_saves_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(config(tmp_path, train__steps=10**6, logging__every=1, optim__lr=1e-5), "--nodes", "1")
    job.wait_for_step(3)
    slurm.told("scancel", job.number)
    assert job.end()[0] == "CANCELLED", job.output()
    slurm.wait_for(lambda: (job.run / "exit.json").exists(), 60)
    assert json.loads((job.run / "exit.json").read_text())["code"] == 75
    slurm.wait_for(lambda: slurm.told("squeue", "--noheader") == "", 60)
    assert job.fact("Restarts") == "0" and list((job.run / "checkpoints").glob("step-*"))


@needs_slurm
@pytest.mark.timeout(900)
def test_a_job_that_fails_says_so_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    path = config(tmp_path)
    job = slurm.submit(path, "--nodes", "2", "--sbatch", "hold")
    shutil.rmtree(tmp_path / "data")
    slurm.told("scontrol", "release", job.number)
    assert job.end() == ("FAILED", "2:0"), job.output()
    assert job.fact("Restarts") == "0" and "data prepare" in job.output()
