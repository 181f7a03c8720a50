"""Scenarios of how jobs end: what is done to one, and how soon and with which words it is over."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.hosts.slurm import Slurm
from benchmarks.hosts.stage import ENDLESS, LIMIT_S, Ended, Stage, by_open_mpi, send
from benchmarks.processes import Job

DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")),)


def rank_killed(stage: Stage) -> Ended:
    """the rank on the second host is killed"""
    job = stage.start(stage.launch())
    return stage.ended(job, send([stage.rank_on(stage.hosts[1])], signal.SIGKILL))


def rank_frozen(stage: Stage) -> Ended:
    """the rank on the second host is stopped (SIGSTOP)"""
    job = stage.start(stage.launch())
    return stage.ended(job, send([stage.rank_on(stage.hosts[1])], signal.SIGSTOP))


def network_cut(stage: Stage) -> Ended:
    """the second host's cable is taken out"""
    job = stage.start(stage.launch())
    stage.hosts[1].cut()
    return stage.ended(job, time.monotonic())


def _ssh_to(stage: Stage, host: int, at: int = 0) -> list[int]:
    """The ssh client, on the host `at`, of a job's session to a host."""
    name = stage.hosts[host].name
    return [pid for pid in stage.hosts[at].running("ssh ") if f" {name} " in _words(pid) and "pdsh" not in _words(pid)]


def _sshd_of(stage: Stage, host: int) -> list[int]:
    """The server side of a job's session on a host."""
    return stage.hosts[host].running("sshd: root")


def _words(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def ssh_ended(stage: Stage) -> Ended:
    """the ssh session to the first host ends"""
    job = stage.start(stage.launch())
    return stage.ended(job, send(_sshd_of(stage, 0), signal.SIGKILL))


def ssh_client_ended(stage: Stage) -> Ended:
    """the launcher's ssh to the only host is killed"""
    shutil.copy(stage.hosts.hostfile(), stage.folder / "hostfile")
    job = stage.start(stage.launch("--include", "node2", slots=1))
    return stage.ended(job, send(_ssh_to(stage, 1), signal.SIGKILL))


def ssh_ended_restarts(stage: Stage) -> Ended:
    """the ssh session to the first host ends, under --max-restarts 1"""
    job = stage.start(stage.launch("--max-restarts", "1", "train.steps=400", "checkpoint.every=50"))
    ended = stage.ended(job, send(_sshd_of(stage, 0), signal.SIGKILL))
    return replace(ended, note=f"{ended.note}; {job.said().count('launch: restart 1 of 1')} restart")


def ssh_frozen(stage: Stage) -> Ended:
    """the ssh session to the first host is stopped for 25 s; the launcher is told to stop 5 s later"""
    job = stage.start(stage.launch())
    servers = _sshd_of(stage, 0)
    began = send(servers, signal.SIGSTOP)
    time.sleep(25)
    send(servers, signal.SIGCONT)
    before = stage.steps()
    time.sleep(5)
    note = f"; {stage.steps() - before} steps in the 5 s after it"
    send(stage.hosts[0].running("-m launch run "), signal.SIGTERM)
    return stage.ended(job, began, note)


def port_blocked(stage: Stage) -> Ended:
    """the second host may not speak to the first one's ports but for ssh (timeouts.rendezvous_s=20)"""
    rule = ["ip", "rule", "add", "ipproto", "tcp", "dport", "20000-32000", "prohibit"]
    made = stage.hosts[1].call(*rule)
    assert made.returncode == 0, made.stderr
    began = time.monotonic()
    job = stage.start(stage.launch("timeouts.rendezvous_s=20"), steps=0)
    return stage.ended(job, began)


def config_refused(stage: Stage) -> Ended:
    """the second host's config has an unknown key"""
    other = stage.folder / "other.yaml"
    other.write_text(stage.config.read_text() + "nonsense: 1\n")
    stage.hosts[1].hide(stage.config, other)
    began = time.monotonic()
    job = stage.start(stage.launch(), steps=0)
    return stage.ended(job, began)


def data_refused(stage: Stage) -> Ended:
    """the second host's data lack a shard"""
    data = stage.folder.parent / "data"
    shutil.copytree(data, stage.folder / "lacking")
    next((stage.folder / "lacking").glob("train-*.bin")).unlink()
    stage.hosts[1].hide(data, stage.folder / "lacking")
    began = time.monotonic()
    job = stage.start(stage.launch(), steps=0)
    return stage.ended(job, began)


def _plain(stage: Stage, victim: int) -> Ended:
    """Plain deepspeed, without a launcher of ours."""
    addresses = ["--force_multi", "--no_ssh_check", "--master_addr", stage.hosts[0].address]
    words = [*DEEPSPEED, "--hostfile", str(stage.hosts.hostfile()), *addresses, "--module", "pretrain"]
    job = stage.start([*words, *stage.launch(command=())[:1], *stage.launch(command=())[3:]])
    return stage.ended(job, send([stage.rank_on(stage.hosts[victim])], signal.SIGSTOP))


def deepspeed_frozen(stage: Stage) -> Ended:
    """plain deepspeed: the rank on the second host is stopped (SIGSTOP)"""
    return _plain(stage, 1)


def deepspeed_first_frozen(stage: Stage) -> Ended:
    """plain deepspeed: the first rank is stopped (SIGSTOP)"""
    return _plain(stage, 0)


def inner_launcher_killed(stage: Stage) -> Ended:
    """deepspeed's launcher on the second host is killed"""
    job = stage.start(stage.launch())
    return stage.ended(job, send(stage.hosts[1].running("-u -m deepspeed.launcher.launch"), signal.SIGKILL))


def runner_killed(stage: Stage) -> Ended:
    """the deepspeed command and pdsh are killed"""
    job = stage.start(stage.launch())
    pids = [*stage.hosts[0].running("bin/deepspeed "), *stage.hosts[0].running("pdsh -S")]
    return stage.ended(job, send(pids, signal.SIGKILL))


def open_mpi(stage: Stage) -> Ended:
    """a log of OpenMPI: its terminal escapes are counted"""
    more = ["--launcher", "openmpi", "train.steps=30"]
    began = time.monotonic()
    job = stage.start(stage.launch(*more), by_open_mpi(stage.hosts), steps=0)
    ended = stage.ended(job, began)
    escapes, returns = (job.output.read_bytes().count(mark) for mark in (b"\x1b", b"\r"))
    return replace(ended, note=f"{ended.note}; {escapes} escapes, {returns} carriage returns")


def mpirun_alone(stage: Stage) -> Ended:
    """mpirun -n 2 without MASTER_ADDR"""
    words = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, "-m", "pretrain", str(stage.config)]
    began = time.monotonic()
    job = stage.start(words, by_open_mpi(stage.hosts), steps=0)
    ended = stage.ended(job, began)
    return replace(ended, last=_error_in(job, ended.last))


def _error_in(job: Job, else_: str) -> str:
    """A rank's own line, which a launcher's follow."""
    return next((line for line in job.said().splitlines() if "error:" in line), else_)


def _slurm(stage: Stage, name: str) -> Ended:
    """The signal goes to every process of the job's step, while a training step of 45 s is under way."""
    slurm = Slurm(stage.hosts, stage.folder / "slurm")
    more = ["--nodes", "2", "train.micro_batch=1", *ENDLESS]
    job = slurm.submit(stage.config, *more, environment=stage.slow_steps(45))
    slurm.wait_for(lambda: "a slow step begins" in job.output())
    began = time.monotonic()
    slurm.told("scancel", f"--signal={name}", job.number)
    slurm.wait_for(lambda: job.fact("Restarts") == "1" or job.fact("JobState") == "FAILED", LIMIT_S)
    seconds, restarts, state = time.monotonic() - began, job.fact("Restarts"), job.fact("JobState")
    slurm.told("scancel", job.number)
    told = [line for line in job.output().splitlines() if line.startswith("launch: exit code")]
    code = int(told[-1].split()[3].rstrip(":")) if told else -1
    return Ended(seconds, code, told[-1] if told else "", f"{stage.saved()}; {state}, {restarts} restarts")


def slurm_time(stage: Stage) -> Ended:
    """a Slurm job's time is nearly over (SIGUSR1) in a step of 45 s"""
    return _slurm(stage, "USR1")


def slurm_preempted(stage: Stage) -> Ended:
    """a Slurm job is preempted with a grace time (SIGTERM) in a step of 45 s"""
    return _slurm(stage, "TERM")


def srun_ranks(stage: Stage) -> Ended:
    """srun -n 2 without a launcher"""
    return _srun(stage, "pretrain")


def srun_launchers(stage: Stage) -> Ended:
    """srun -n 2 of `overtone run`, which starts all ranks itself"""
    return _srun(stage, "launch", "run")


def _srun(stage: Stage, *module: str) -> Ended:
    slurm = Slurm(stage.hosts, stage.folder / "slurm")
    words = ["srun", "-N", "2", "-n", "2", "--chdir", os.getcwd(), sys.executable, "-m", *module, str(stage.config)]
    began = time.monotonic()
    job = stage.start(words, slurm.environment, steps=0)
    ended = stage.ended(job, began)
    return replace(ended, last=_error_in(job, ended.last))


SCENARIOS = {
    "rank killed": rank_killed,
    "rank frozen": rank_frozen,
    "network cut": network_cut,
    "ssh session ended": ssh_ended,
    "ssh client ended": ssh_client_ended,
    "ssh session ended, restarts": ssh_ended_restarts,
    "ssh frozen 25 s": ssh_frozen,
    "port blocked": port_blocked,
    "config refused on one host": config_refused,
    "data refused on one host": data_refused,
    "plain deepspeed, rank frozen": deepspeed_frozen,
    "plain deepspeed, first rank frozen": deepspeed_first_frozen,
    "inner launcher killed": inner_launcher_killed,
    "deepspeed and pdsh killed": runner_killed,
    "openmpi log": open_mpi,
    "mpirun without MASTER_ADDR": mpirun_alone,
    "srun without a launcher": srun_ranks,
    "srun of launchers": srun_launchers,
    "Slurm: time over in a long step": slurm_time,
    "Slurm: preempted in a long step": slurm_preempted,
}
