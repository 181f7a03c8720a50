"""A stage for scenarios: hosts, prepared data, and an endless job whose end is timed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos.__main__ import config_of
from benchmarks.hosts.network import Host, Hosts
from benchmarks.processes import ROOT, Job, until

LAUNCH = (sys.executable, "-m", "launch", "run")
ENDLESS = ("train.steps=1000000", "optim.lr=1e-6", "checkpoint.every=null", "timeouts.heartbeat_s=10")
LIMIT_S = 400.0
# Read by every Python of a job whose PYTHONPATH has its folder: steps from the third on take SECONDS longer.
SLOW = """
import importlib.util, os, sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "pretrain.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            step, taken = module.Trainer.train_step, []

            def slow(trainer, *rest):
                taken.append(None)
                if len(taken) > 3:
                    print("a slow step begins", flush=True)
                    time.sleep(SECONDS)
                return step(trainer, *rest)

            module.Trainer.train_step = slow

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Slow())
"""


@dataclass(frozen=True)
class Ended:
    """How a scenario ended."""

    seconds: float  # from what was done to it
    code: int
    last: str  # line of its output
    note: str = ""  # what else there is to see


class Stage:
    """Hosts and one run folder; `Endless` jobs train in it."""

    def __init__(self, folder: Path, hosts: Hosts, data: Path) -> None:
        self.folder, self.hosts, self.run = folder, hosts, folder / "run"
        self.config = folder / "config.yaml"
        tree = config_of(folder, 10)
        tree["run"], tree["data"]["path"] = str(self.run), str(data)
        self.config.write_text(yaml.safe_dump(tree))

    def launch(self, *more: str, slots: int = 1, command: Sequence[str] = LAUNCH) -> list[str]:
        """`overtone run` of an endless job on all hosts."""
        return [*command, str(self.config), "--hostfile", str(self.hosts.hostfile(slots)), *ENDLESS, *more]

    def start(self, words: Sequence[str], environment: Mapping[str, str] | None = None, steps: int = 3) -> Job:
        """A job on the first host, past its first steps."""
        job = Job(words, self.folder / f"output-{time.monotonic_ns()}", self.hosts[0].popen, environment=environment)
        if steps:
            job.wait_for(lambda: self.steps() >= steps, LIMIT_S)
        return job

    def steps(self) -> int:
        """Steps that the run has recorded."""
        file = self.run / "metrics.jsonl"
        return file.read_text().count('"train"') if file.exists() else 0

    def rank_on(self, host: Host) -> int:
        """The process id, as this machine counts, of the first rank on a host."""
        return host.running("-u -m pretrain ")[0]

    def ended(self, job: Job, began: float, note: str = "") -> Ended:
        """Waits for the end, and for that of every rank, which must not be later than a few seconds."""
        code = job.end(LIMIT_S)
        seconds = time.monotonic() - began
        if not until(lambda: not any(host.running("-m pretrain ") for host in self.hosts), 5.0):
            note += "; RANKS ARE LEFT"
        return Ended(seconds, code, last_line(job.said()), self.saved() + note)

    def saved(self) -> str:
        """What the run folder tells of the end."""
        newest = max((path.name for path in (self.run / "checkpoints").glob("step-*")), default="nothing")
        record = self.run / "exit.json"
        code = json.loads(record.read_text())["code"] if record.exists() else "none"
        return f"saved {newest}, exit.json {code}, trained {self.steps()} steps"

    def slow_steps(self, seconds: float) -> dict[str, str]:
        """An environment in which steps from the fourth on take so much longer."""
        folder = self.folder / "slow"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SLOW.replace("SECONDS", str(seconds)))
        return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def last_line(text: str) -> str:
    """The last line of an output that has any words, but for what deepspeed's launchers log."""
    lines = [line.strip() for line in text.splitlines() if "[launch.py:" not in line]
    return next((line for line in reversed(lines) if line), "")


def send(pids: Sequence[int], number: signal.Signals) -> float:
    """Sends a signal to processes; returns when."""
    for pid in pids:
        os.kill(pid, number)
    return time.monotonic()


def by_open_mpi(hosts: Hosts) -> dict[str, str]:
    """What Open MPI needs to be told to start ranks as root, over the ssh of these hosts."""
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    return {**root, "OMPI_MCA_plm_rsh_args": shlex.join(hosts.ssh)}


def prepare(folder: Path) -> Path:
    """Prepares the data that all scenarios train on."""
    config = folder / "prepare.yaml"
    tree: dict[str, Any] = config_of(folder, 10)
    config.write_text(yaml.safe_dump(tree))
    subprocess.run([sys.executable, "-m", "data", "prepare", str(config)], cwd=ROOT, check=True, capture_output=True)
    return Path(tree["data"]["path"])
