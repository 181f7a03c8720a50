"""A real Slurm of two hosts on this machine: munged and slurmctld on the first of them, slurmd on both."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.hosts.network import Host, Hosts, why_not

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
    """Why there can be no Slurm here; None if there can."""
    missing = [
        tool for tool in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(tool, path=PATH) is None
    ]
    return f"missing: {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else why_not()


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
        """What a command says on the first host."""
        called = self.head.call(*words, environment=self.environment)
        return (called.stdout + called.stderr).strip()

    def is_idle(self) -> bool:
        """No node runs a job, or ends one."""
        return self.told("sinfo", "--noheader", "--format=%D %t") == "2 idle"

    def submit(self, path: Path, *more: str, environment: Mapping[str, str] | None = None) -> Job:
        """`overtone slurm CONFIG --submit`, with `environment` beside the host's own."""
        words = [*LAUNCH, "slurm", str(path), "--submit", *more]
        submitted = self.head.call(*words, environment={**self.environment, **(environment or {})})
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        number = re.search(r"Submitted batch job (\d+)", submitted.stdout)
        assert number, submitted.stdout
        run = next((Path(word[4:]) for word in more if word.startswith("run=")), path.parent / "run")
        return Job(self, number[1], run)

    def wait_for(self, happened: Callable[[], bool], seconds: float = 400) -> None:
        """Raises AssertionError, with what Slurm says of its jobs, if something does not become so."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.told("scontrol", "show", "job")
            time.sleep(0.2)


class Job:
    """A job of that Slurm's."""

    def __init__(self, slurm: Slurm, number: str, run: Path) -> None:
        self.slurm, self.number, self.run = slurm, number, run

    def fact(self, name: str) -> str:
        """What Slurm says of the job, such as its JobState."""
        told = self.slurm.told("scontrol", "--oneliner", "show", "job", self.number)
        return next((word.partition("=")[2] for word in told.split() if word.startswith(f"{name}=")), told)

    def output(self) -> str:
        """Its output so far."""
        file = self.run / f"slurm-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def wait_for_step(self, step: int) -> None:
        """Until it has trained that step."""

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
        """By step."""
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
