"""The main job between hosts: as on one host, ended in time and with the culprit named, preempted, started again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.hosts.network import Host, Hosts
from benchmarks.processes import Job, until
from pretrain.config import load
from tests.support.hosts import needs_hosts
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, run_to_end, tiny_tree

pytestmark = [needs_hosts, pytest.mark.hosts, pytest.mark.timeout(900)]
IN_TIME_S = 60.0
LAUNCH = [sys.executable, "-m", "launch", "run"]
needs_open_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="missing: mpirun (Debian: openmpi-bin)")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path) as made:
        yield made


def config(folder: Path, **changes: Any) -> Path:
    """A tiny run in `folder/run`, its prototypes sharded over all ranks."""
    if not (folder / "data").exists():
        make_data(folder / "data")
    tree = tiny_tree(
        run=str(folder / "run"), data__path=str(folder / "data"), parallel__vocab="world", parallel__zero=1, **changes
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> dict[int, float]:
    """By step; none before there are records."""
    records = read_records(run) if (run / "metrics.jsonl").exists() else []
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def on_one_host(config: Path) -> dict[int, float]:
    """The losses of the same run on one rank of this machine."""
    base = config.parent
    return dict(enumerate(run_ranks(run_to_end, 1, base, cfg=load(config, [f"run={base / 'one'}"]))[0], start=1))


class Endless(Job):
    """`launch run` of an endless job on the first host, past its first steps."""

    def __init__(
        self, hosts: Hosts, folder: Path, *more: str, environment: Mapping[str, str] | None = None, **changes: Any
    ) -> None:
        self.hosts, self.run = hosts, folder / "run"
        endless = {"train__steps": 10**6, "logging__every": 1, "timeouts__heartbeat_s": 10, "optim__lr": 1e-5}
        path = config(folder, **{**endless, **changes})
        words = [*LAUNCH, str(path), "--hostfile", str(hosts.hostfile()), *more]
        super().__init__(words, folder / "output", hosts[0].popen, environment=environment)
        self.wait_for(lambda: 3 in losses(self.run))

    def rank_on(self, host: Host) -> int:
        """The process id, as this machine counts, of the rank on a host."""
        return host.running("-u -m pretrain ")[0]

    def end_in_time(self) -> tuple[int, str]:
        """Exit code and output, with no rank left anywhere."""
        began = time.monotonic()
        code = self.end(IN_TIME_S)
        no_ranks_within(IN_TIME_S - (time.monotonic() - began), self.hosts)
        return code, self.said()

    def last_lines(self) -> str:
        return "\n".join(self.said().splitlines()[-30:])


def no_ranks_within(limit_s: float, hosts: Hosts) -> None:
    assert until(lambda: not any(host.running("-m pretrain ") for host in hosts), limit_s), "ranks are left"


def test_three_hosts_train_as_one_does(tmp_path: Path) -> None:
    """Prototypes are shared between the hosts, and what the launcher drops reaches them: overrides with spaces too."""
    path = config(tmp_path, train__steps=4, train__tokens_per_step=96, train__micro_batch=2, logging__every=1)
    odd = {"HF_HOME": '/tmp/a b$HOME`x`"q" 100%h\\', "https_proxy": "http://nowhere", "HF_TOKEN": "secret"}
    with Hosts(3, tmp_path) as hosts:
        asked = [*LAUNCH, str(path), "--hostfile", str(hosts.hostfile()), "checkpoint={every: 2, keep: 1}"]
        dry = hosts[0].call(*asked, "--dry-run")
        assert dry.returncode == 0 and " --master_addr 10.77.0.1 " in dry.stdout and not (tmp_path / "run").exists()
        trained = hosts[0].call(*asked, environment=odd)
        assert trained.returncode == 0, trained.stdout + trained.stderr
    text = (tmp_path / "run" / "launch.env").read_text()
    assert "HF_HOME" in text and "nowhere" not in text and "secret" not in text
    assert not list((tmp_path / "run").glob("lease-*"))
    one, three = on_one_host(path), losses(tmp_path / "run")
    assert list(one) == [1, 2, 3, 4] and three == pytest.approx(one, abs=2e-5)


def by_open_mpi(hosts: Hosts) -> dict[str, str]:
    """What Open MPI needs to be told to start ranks as root, over the ssh of these hosts."""
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    return {**root, "OMPI_MCA_plm_rsh_args": shlex.join(hosts.ssh)}


@needs_open_mpi
def test_open_mpi_trains_as_one_host_does(tmp_path: Path, hosts: Hosts) -> None:
    path = config(tmp_path, train__steps=4, train__micro_batch=2, logging__every=1)
    asked = [*LAUNCH, str(path), "--hostfile", str(hosts.hostfile(2)), "--launcher", "openmpi"]
    trained = hosts[0].call(*asked, environment=by_open_mpi(hosts))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    one, four = on_one_host(path), losses(tmp_path / "run")
    assert list(one) == [1, 2, 3, 4] and four == pytest.approx(one, abs=2e-5)


def test_a_killed_rank_is_named(tmp_path: Path, hosts: Hosts) -> None:
    job = Endless(hosts, tmp_path)
    os.kill(job.rank_on(hosts[1]), signal.SIGKILL)
    code, told = job.end_in_time()
    assert code not in (0, 75)
    assert "rank 1 on node2 failed first: it left no word" in job.last_lines(), told


def test_bad_input_on_one_host_is_told_with_that_host(tmp_path: Path, hosts: Hosts) -> None:
    """A shard is missing there: its rank refuses before the others are met, and they do not wait for it."""
    path = config(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "lacking")
    (tmp_path / "lacking" / "train-00000.bin").unlink()
    hosts[1].hide(tmp_path / "data", tmp_path / "lacking")
    refused = hosts[0].call(*LAUNCH, str(path), "--hostfile", str(hosts.hostfile()))
    assert refused.returncode == 2, refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert "rank 1 on node2 failed first" in last and "train-00000.bin: missing" in last, refused.stderr
    assert not any(host.running("-m pretrain ") for host in hosts)


def test_a_frozen_rank_is_named_and_its_stacks_are_kept(tmp_path: Path, hosts: Hosts) -> None:
    job = Endless(hosts, tmp_path)
    os.kill(job.rank_on(hosts[1]), signal.SIGSTOP)
    code, told = job.end_in_time()
    assert code not in (0, 75)
    assert "rank 1 on node2 failed first" in job.last_lines(), told
    stacks = (tmp_path / "run" / "failures" / "rank-0.stacks").read_text()
    assert "distributed_c10d.py" in stacks or "vocab_parallel.py" in stacks, stacks  # where ranks wait for others


def test_a_host_that_is_cut_off_is_named_and_the_job_finishes_on_the_others(tmp_path: Path, hosts: Hosts) -> None:
    more = ["--max-restarts", "2", "--elastic"]
    job = Endless(hosts, tmp_path, *more, train__steps=30, checkpoint__every=2, optim__lr=0.01)
    hosts[1].cut()
    job.wait_for(lambda: "restart 1 of 2" in job.said(), IN_TIME_S)
    assert "rank 1 on node2 failed first" in job.said() and "node2 cannot be reached" in job.said(), job.said()
    code = job.end(400)
    assert code == 0, job.said()
    assert "without node2" in job.said()
    assert (tmp_path / "run" / "failures-1" / "rank-0.stacks").exists()
    one, cut = on_one_host(tmp_path / "config.yaml"), losses(tmp_path / "run")
    assert list(cut) == list(range(1, 31)) and cut == pytest.approx(one, abs=5e-5)


@pytest.mark.parametrize(("who", "how"), [("launcher", signal.SIGTERM), ("rank", signal.SIGUSR1)])
def test_a_stop_of_the_launcher_or_a_rank_saves_on_all_hosts(
    tmp_path: Path, hosts: Hosts, who: str, how: signal.Signals
) -> None:
    job = Endless(hosts, tmp_path)
    os.kill(hosts[0].running("-m launch run ")[0] if who == "launcher" else job.rank_on(hosts[1]), how)
    code, told = job.end_in_time()
    assert code == 75, told
    ended = json.loads((job.run / "exit.json").read_text())
    assert (job.run / "checkpoints" / f"step-{ended['step']:08d}").is_dir()


def test_ranks_on_other_hosts_do_not_outlive_the_launcher(tmp_path: Path, hosts: Hosts) -> None:
    """They save first: nothing failed but the launcher."""
    job = Endless(hosts, tmp_path)
    os.kill(hosts[0].running("-m launch run ")[0], signal.SIGKILL)
    job.process.wait()
    no_ranks_within(IN_TIME_S, hosts)
    assert json.loads((job.run / "exit.json").read_text())["code"] == 75


def test_a_host_that_does_not_answer_is_named_at_once(tmp_path: Path, hosts: Hosts) -> None:
    path = config(tmp_path)
    hosts[1].cut()
    began = time.monotonic()
    refused = hosts[0].call(*LAUNCH, str(path), "--hostfile", str(hosts.hostfile()))
    assert refused.returncode == 2 and "node2: cannot be reached by ssh" in refused.stderr, refused.stderr
    assert time.monotonic() - began < IN_TIME_S and not (tmp_path / "run").exists()


def test_each_host_can_start_its_own_ranks(tmp_path: Path, hosts: Hosts) -> None:
    """`--launcher none`: the same command on every host, and no ssh."""
    path = config(tmp_path, train__steps=4, logging__every=1)
    words = [*LAUNCH, str(path), "--hostfile", str(hosts.hostfile()), "--launcher", "none"]
    told = hosts[0].call(*words, "--dry-run").stdout.splitlines()
    assert [line.split(":")[0] for line in told] == ["node1", "node2"] and "--node_rank 1 " in told[1]
    away = {"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", "PDSH_SSH_ARGS_APPEND": "-i /dev/null"}
    started = [host.start(*words, environment=away, stdout=subprocess.DEVNULL) for host in hosts]
    assert [one.wait(240) for one in started] == [0, 0]
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]
