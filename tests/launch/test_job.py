"""How jobs end under the real launcher: honest exit codes, and no rank left behind."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.processes import Job, alive
from common.variables import BIND_VARIABLE
from launch.hosts import Placement
from launch.job import exit_code, run
from launch.lease import Lease
from pretrain.runtime.claim import STOP, Holder, hold
from pretrain.runtime.endings import Exit

pytestmark = pytest.mark.slow

# ---- what the exit code is


@pytest.mark.parametrize(
    ("child", "record", "code", "reason"),
    [
        (0, {"code": 0}, 0, "done"),
        (0, None, 1, "left no record"),
        (0, {"code": 3, "reason": "10 steps in a row", "step": 7}, 3, "10 steps in a row (step 7)"),
        (1, {"code": 75, "reason": "stopped by SIGTERM", "step": 7}, 75, "the same command goes on"),
        (1, {"code": 0}, 1, "a rank failed"),
        (1, None, 1, "a rank failed"),
        (
            247,
            {"code": 1, "reason": "reset by peer", "step": 7},
            1,
            "killed by SIGKILL; rank 0: reset by peer (step 7)",
        ),
        (247, None, 137, "a rank was killed by SIGKILL"),
        (250, {"code": 0}, 134, "SIGABRT"),
        (-15, None, 143, "deepspeed was killed by SIGTERM"),
        (-9, {"code": 75, "reason": "r", "step": 0}, 1, "was killed; the ranks saved and left: r (step 0)"),
        (0, {"code": 75, "reason": "r", "step": 0}, 1, "was killed"),
        (137, {"code": 75, "reason": "r", "step": 0}, 1, "was killed"),
        (1, {"code": 75, "reason": "r", "step": 0}, 75, "goes on"),
        (1, {"code": 1, "reason": "r", "step": None}, 1, "r"),
    ],
)
def test_the_record_and_the_child_decide(child, record, code, reason):
    found = exit_code(child, record and Exit(**record))
    assert found[0] == code and reason in found[1]


@pytest.mark.parametrize(
    ("record", "told", "code", "reason"),
    [
        (None, [signal.SIGTERM], 143, "killed before there was anything saved"),
        (None, [signal.SIGINT, signal.SIGINT], 137, "a second signal"),
        ({"code": 0}, [signal.SIGTERM], 0, "done"),
        ({"code": 0}, [], 137, "deepspeed was killed by SIGKILL"),
        ({"code": 75, "reason": "r"}, [signal.SIGTERM], 75, "goes on"),
    ],
)
def test_what_this_launcher_killed_is_not_told_as_anothers_doing(record, told, code, reason):
    found = exit_code(-signal.SIGKILL, record and Exit(**record), told=told)
    assert found[0] == code and reason in found[1]


# ---- how jobs end, under the real launcher

RANK = """
import json, os, signal, sys, time
from pathlib import Path

plan, here = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent
rank, told = int(os.environ["RANK"]), []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: told.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])  # as a launcher starts its job


def leave(name, text):
    draft = here / f"draft{os.getpid()}"
    draft.write_text(text)
    draft.rename(here / f"{name}{rank}")


def everyone(name, text=""):
    leave(name, text)
    while not all((here / f"{name}{k}").exists() for k in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)


if plan.get("helper") and os.fork() == 0:
    leave("helper", str(os.getpid()))
    while not told:
        time.sleep(0.01)
    leave("helper-told", "")
    time.sleep(60)
everyone("up", json.dumps([os.getpid(), os.getppid(), os.environ["OMP_NUM_THREADS"]]))
if plan.get("killed") == rank:
    os.kill(os.getpid(), signal.SIGKILL)
while plan.get("deaf") or plan.get("trains") and not told:
    time.sleep(0.01)
if plan.get("saves"):
    time.sleep(0.5)
    everyone("told", str(len(told)))
if rank == 0 and "record" in plan:
    record = {"job": os.environ["OVERTONE_JOB"], "code": plan["record"], "reason": "so planned", "step": 5}
    (here / "exit.json").write_text(json.dumps(record))
sys.exit(plan["code"])
"""

DRIVER = """
import sys
from pathlib import Path
from launch.invocation import command, environment
from launch.hosts import Placement
from launch.job import run
from launch.lease import take

plan, grace_s = Path(sys.argv[1]), float(sys.argv[2])
placement = Placement({"localhost": 2})
words = command(str(plan), [], placement, module="fake_rank")
with take(plan.parent, placement) as claim:
    added = environment(placement, claim=claim)
    sys.exit(run(words, added, claim, placement, module="fake_rank", grace_s=grace_s).code)
"""


class Planned(Job):
    def __init__(self, folder: Path, grace_s: float, plan: dict[str, Any]) -> None:
        self.folder = folder
        (folder / "fake_rank.py").write_text(RANK)
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "exit.json").write_text('{"code": 99, "reason": "an earlier run"}')
        environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", BIND_VARIABLE):
            environment.pop(name, None)
        words = [sys.executable, "-c", DRIVER, str(folder / "plan.json"), str(grace_s)]
        super().__init__(words, folder / "output", env=environment)

    def ranks(self) -> list[tuple[int, int]]:
        """Process ids of each rank and its parent, once both are up."""
        self.wait_for(lambda: all((self.folder / f"up{rank}").exists() for rank in range(2)))
        words = [json.loads((self.folder / f"up{rank}").read_text()) for rank in range(2)]
        return [(rank, parent) for rank, parent, _ in words]

    def ended(self) -> tuple[int, str]:
        """The exit code and the output; asserts that no rank is left."""
        code = self.end(120)
        for file in self.folder.glob("up?"):
            assert not alive(json.loads(file.read_text())[0]), self.said()
        return code, self.said()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Planned]]:
    jobs: list[Planned] = []

    def make(grace_s: float = 60, **plan: Any) -> Planned:
        jobs.append(Planned(tmp_path, grace_s, plan))
        return jobs[-1]

    yield make
    for job in jobs:
        job.kill()


def test_done(start):
    job = start(code=0, record=0)
    assert job.ended() == (0, "")
    cores = len(os.sched_getaffinity(0))
    assert json.loads((job.folder / "up1").read_text())[2] == str(max(1, cores // 2))


def test_a_failing_rank(start):
    code, output = start(code=1).ended()
    assert code == 1 and "a rank failed" in output


def test_a_code_of_ours(start):
    code, output = start(code=2, record=2).ended()
    assert code == 2 and "exit code 2: so planned (step 5)" in output


def test_the_record_of_a_stopped_job_is_waited_for(tmp_path):
    """Rank 0 is on another host, saves, and leaves its record after this host's processes are gone."""
    word = "import os, signal, time; os.kill(os.getppid(), signal.SIGUSR1); time.sleep(60)"
    record = json.dumps({"job": "j", "code": 75, "reason": "stopped by SIGUSR1", "step": 5})
    saved = threading.Timer(2.0, lambda: (tmp_path / "exit.json").write_text(record))
    saved.start()
    placement = Placement({"a": 1, "b": 1}, tmp_path / "hosts")
    with hold(tmp_path, Holder("j", launcher=True)) as claim:
        ended = run([sys.executable, "-c", word], {}, claim, placement, node=1)
    saved.join()
    assert ended.code == 75 and ended.told


def test_ranks_that_a_lost_connection_left_behind_are_told_to_save(tmp_path):
    """ssh ends with its own code at once; rank 0, on another host, reads the lease, saves and leaves its record."""
    record = {"job": "j", "code": 75, "reason": "the launcher asked to stop", "step": 5}

    def rank() -> None:
        while STOP not in (tmp_path / "lease-0").read_text():
            time.sleep(0.05)
        (tmp_path / "exit.json").write_text(json.dumps(record))

    placement = Placement({"a": 1, "b": 1}, tmp_path / "hosts")
    with hold(tmp_path, Holder("j", launcher=True)) as claim, Lease(tmp_path / "lease-0", "j"):
        thread = threading.Thread(target=rank)
        thread.start()
        ended = run([sys.executable, "-c", "import sys; sys.exit(255)"], {}, claim, placement, grace_s=30)
        thread.join()
    assert (ended.code, ended.told, ended.cut_off) == (75, False, True)


def test_what_is_sent_to_all_processes_reaches_the_ranks_alone(start):
    """As Slurm does; deepspeed's launchers would end at once, and the ranks within 30 s."""
    job = start(code=75, record=75, trains=True, saves=True)
    job.ranks()
    launcher = psutil.Process(job.process.pid)
    below = launcher.children(recursive=True)
    assert len([process for process in below if "deepspeed" in str(process.cmdline())]) == 2
    for process in below:
        process.send_signal(signal.SIGUSR1)
    code, output = job.ended()
    assert code == 75 and "deepspeed ended without its ranks" not in output, output


def test_a_killed_rank(start):
    code, output = start(code=0, killed=1, trains=True).ended()
    assert code == 137 and "a rank was killed by SIGKILL" in output


def test_preemption(start):
    job = start(code=75, record=75, trains=True, saves=True, helper=True)
    job.ranks()
    job.process.send_signal(signal.SIGTERM)
    code, output = job.ended()
    assert code == 75 and "telling 2 ranks to save and stop" in output and "the same command goes on" in output
    assert [(job.folder / f"told{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert not list(job.folder.glob("helper-told?"))
    assert not any(alive(int((job.folder / f"helper{rank}").read_text())) for rank in range(2))


def test_the_second_signal_kills(start):
    job = start(code=75, record=75, deaf=True)
    job.ranks()
    job.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert job.process.poll() is None
    before = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    code, output = job.ended()
    assert code == 137 and "killed by a second signal" in output and time.monotonic() - before < 45


def test_ranks_whose_launcher_was_killed(start):
    job = start(grace_s=1, code=0, record=0, deaf=True)
    os.kill(job.ranks()[0][1], signal.SIGKILL)
    code, output = job.ended()
    assert code == 1 and "deepspeed ended without its ranks" in output and "left no record" in output


def test_a_signal_before_there_are_ranks(start):
    job = start(code=0, record=0)
    job.wait_for(lambda: bool(psutil.Process(job.process.pid).children()))
    job.process.send_signal(signal.SIGTERM)
    assert job.ended()[0] == 143
    assert not list(job.folder.glob("up?"))


def test_a_signal_after_the_ranks_have_left_changes_nothing(start):
    job = start(code=0, record=0)
    ranks = job.ranks()
    job.wait_for(lambda: not any(alive(rank) for rank, _ in ranks))
    job.process.send_signal(signal.SIGTERM)
    assert job.ended()[0] == 0


# ---- what the ranks are told


def test_a_lease_is_renewed_until_it_is_given_back(tmp_path):
    path = tmp_path / "lease-0"
    with Lease(path, "j") as lease:
        before = path.read_text()
        deadline = time.monotonic() + 30
        while path.read_text() == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lease.stop()
        assert path.read_text() == f"j {STOP}"
        time.sleep(1.5)
        assert path.read_text() == f"j {STOP}"
    assert list(path.parent.iterdir()) == []


def test_a_lost_connection_is_no_signal():
    assert exit_code(255, None, remote=True) == (1, "the connection to a host failed, or ended")
