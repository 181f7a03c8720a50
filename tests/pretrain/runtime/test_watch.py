"""A rank's watch over the others, in processes that it may end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.invocation import free_port
from pretrain.runtime.watch import phase_of
from tests.support.commands import Command
from tests.support.tiny import tiny_tree

ROOT = Path(__file__).parents[3]
RANK = """
import json, os, sys, threading, time
from pathlib import Path
from pretrain.config import from_tree
from pretrain.runtime.watch import Watch

plan = json.loads(sys.argv[1])
with Watch(from_tree(plan["config"]), os.environ) as watch:
    if watch.world > 1:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", plan["port"], watch.world, watch.rank == 0)
        watch.join("127.0.0.1", plan["port"])
    watch.pulse(plan["limit_s"])
    print("up", flush=True)
    if plan["rank_raises"] == watch.rank:
        raise ValueError("so planned")
    while not plan["ends"]:
        time.sleep(0.05)
        if plan["pulses"] != "not":
            watch.pulse()
    watch.leave()
    if watch.world > 1:  # as in training, all leave before rank 0 goes, and the store with it
        store.set(f"leaves/{watch.rank}", "")
        if watch.rank == 0:
            store.wait([f"leaves/{rank}" for rank in range(watch.world)])
"""


class Ranks:
    """`world` processes that watch each other."""

    def __init__(self, folder: Path, world: int, environment: dict[str, str], **plan: Any) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        port = free_port()
        tree = tiny_tree(run=str(self.run), timeouts__heartbeat_s=5, checkpoint__grace_s=1)
        whole = {
            "config": tree,
            "port": port,
            "limit_s": 600,
            "rank_raises": None,
            "ends": False,
            "pulses": "yes",
            **plan,
        }
        self.processes = []
        for rank in range(world):
            own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "OVERTONE_JOB": "a"}
            self.processes.append(
                Command("-c", RANK, json.dumps(whole), environment={**os.environ, **environment, **own})
            )

    def up(self) -> None:
        for process in self.processes:
            process.wait_for("up\n")

    def end(self) -> list[int]:
        return [process.wait(180) for process in self.processes]

    def left(self, rank: int) -> dict[str, Any]:
        return json.loads((self.run / "failures" / f"rank-{rank}.json").read_text())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(world: int, environment: dict[str, str] | None = None, **plan: Any) -> Ranks:
        made.append(Ranks(tmp_path, world, environment or {}, **plan))
        return made[-1]

    yield make
    for ranks in made:
        for process in ranks.processes:
            process.kill()


def test_a_good_end_leaves_nothing(start: Callable[..., Ranks]) -> None:
    ranks = start(2, ends=True)
    assert ranks.end() == [0, 0]
    assert not (ranks.run / "failures").exists()


def test_the_others_end_with_the_one_that_failed(start: Callable[..., Ranks]) -> None:
    ranks = start(3, rank_raises=1)
    assert ranks.end() == [1, 1, 1]
    own = ranks.left(1)
    assert (
        own["job"] == "a"
        and own["kind"] == "error"
        and own["error"] == "ValueError: so planned"
        and "so planned" in own["traceback"]
    )
    for rank in (0, 2):
        told = ranks.left(rank)
        assert told["kind"] == "told" and told["suspects"] == [1] and "ValueError: so planned" in told["error"]
        assert "in <module>" in told["traceback"]
        assert (ranks.run / "failures" / f"rank-{rank}.stacks").read_text().count("Thread 0x") >= 2
    ended = json.loads((ranks.run / "exit.json").read_text())
    assert ended["code"] == 1 and ended["job"] == "a"


@pytest.mark.parametrize(("victim", "other"), [(1, 0), (0, 1)])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.slow
def test_a_rank_that_is_gone_is_missed(
    start: Callable[..., Ranks], victim: int, other: int, how: signal.Signals
) -> None:
    ranks = start(2)
    ranks.up()
    ranks.processes[victim].send_signal(how)
    assert ranks.processes[other].wait(60) == 1
    assert ranks.left(other)["kind"] == "lost" and ranks.left(other)["suspects"] == [victim]
    if victim == 1:
        assert ranks.processes[victim].wait(60) == -signal.SIGKILL, "by its guardian"


@pytest.mark.slow
def test_a_main_thread_that_does_not_get_on(start: Callable[..., Ranks]) -> None:
    ranks = start(2, limit_s=2, pulses="not")
    assert ranks.end() == [1, 1]
    kinds = {ranks.left(rank)["kind"] for rank in range(2)}
    assert "stuck" in kinds and kinds <= {"stuck", "told"}


@pytest.mark.slow
def test_a_launcher_that_is_gone_asks_for_a_save_then_ends_the_rank(
    start: Callable[..., Ranks], tmp_path: Path
) -> None:
    """The lease is not renewed; this rank is deaf to the SIGTERM that it sends itself, as if its save took too long."""
    lease = tmp_path / "lease"
    lease.write_text("a 1")
    ranks = start(1, {"OVERTONE_LEASE": str(lease)})
    ranks.up()
    assert ranks.end() == [-signal.SIGTERM]
    assert "no sign of life from the launcher" in ranks.processes[0].stderr


def test_a_lease_that_says_stop_or_is_taken_away(start: Callable[..., Ranks], tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    lease.write_text("a 1")
    ranks = start(1, {"OVERTONE_LEASE": str(lease)})
    ranks.up()
    lease.unlink()
    assert ranks.end() == [1]
    assert ranks.left(0)["error"] == "the launcher ended the job"


def test_a_stop_by_lease_is_a_signal(start: Callable[..., Ranks], tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    lease.write_text("a 1")
    ranks = start(1, {"OVERTONE_LEASE": str(lease)})
    ranks.up()
    lease.write_text("a stop")
    assert ranks.end() == [-signal.SIGTERM]


def test_another_launchers_lease_is_not_this_ranks(start: Callable[..., Ranks], tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    lease.write_text("a 1")
    ranks = start(1, {"OVERTONE_LEASE": str(lease)})
    ranks.up()
    lease.write_text("b 1")
    assert ranks.end() == [-signal.SIGTERM]
    assert "another one has begun" in ranks.processes[0].stderr


@pytest.mark.parametrize(
    ("stack", "phase"),
    [
        ([("/x/pretrain/runtime/ranks.py", "start"), ("/y/torch/distributed/rendezvous.py", "next")], "rendezvous"),
        ([("/x/pretrain/loop.py", "train"), ("/x/pretrain/batches.py", "of")], "data"),
        ([("/x/pretrain/engine.py", "train_step"), ("/x/model/attention.py", "forward")], "forward"),
        ([("/x/model/head.py", "forward"), ("/y/torch/distributed/distributed_c10d.py", "all_reduce")], "collective"),
        ([("/y/deepspeed/runtime/engine.py", "backward"), ("/y/torch/autograd/graph.py", "f")], "backward"),
        ([("/x/pretrain/checkpoints/saver.py", "_write"), ("/y/torch/distributed/checkpoint/x.py", "save")], "save"),
        ([("/y/torch/distributed/__init__.py", "<module>")], "start"),
        ([("/x/pretrain/loop.py", "train"), ("/x/pretrain/analysis/scoring.py", "evaluate")], "evaluation"),
    ],
)
def test_a_stack_tells_the_phase(stack: list[tuple[str, str]], phase: str) -> None:
    assert phase_of(stack) == phase


def test_the_watch_is_quick_to_come() -> None:
    code = "import sys, pretrain.runtime.watch; print({'torch', 'deepspeed', 'numpy'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told == "set()\n"
