"""Two jobs on one run folder, as users start them: the one that trains is not disturbed, the other is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.processes import Job
from common.processes import kill
from pretrain.config import load
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, run_to_end, tiny_tree

DIRECT = [sys.executable, "-m", "pretrain"]
LAUNCHED = [sys.executable, "-m", "launch", "run", "--num-gpus", "1"]
HELD = "another job trains in this folder"
ENDLESS = {"train__steps": 10**6, "optim__lr": 1e-4, "optim__schedule": "constant", "checkpoint__every": 2}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(command: list[str], *more: str) -> Training:
        made.append(Training(tmp_path, command, *more))
        return made[-1]

    yield make
    for job in made:
        job.kill()


def config(folder: Path, **changes: Any) -> Path:
    if not (folder / "data").exists():
        make_data(folder / "data")
        make_data(folder / "other", train_tokens=3000)
    plain = {"run": str(folder / "run"), "data__path": str(folder / "data"), "logging__every": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(**{**plain, **changes})))
    return path


class Training(Job):
    """A command on `config.yaml`."""

    def __init__(self, folder: Path, command: list[str], *more: str) -> None:
        self.run = folder / "run"
        words = [*command, str(folder / "config.yaml"), *more]
        super().__init__(words, folder / f"output-{time.monotonic_ns()}")

    def steps(self) -> int:
        return len(losses(self.run))

    def wait_for_steps(self, count: int) -> None:
        already = self.steps()
        self.wait_for(lambda: self.steps() >= already + count)


def losses(run: Path) -> list[float]:
    records = read_records(run) if (run / "metrics.jsonl").exists() else []
    return [record["loss"] for record in records if record["kind"] == "train"]


def belongings(run: Path) -> dict[str, bytes | None]:
    """What is in a run folder and does not change while a job trains, by name; its contents."""
    changing = ("metrics.jsonl", "checkpoints", "lease-0", "draft-lease-0")
    return {
        path.name: path.read_bytes() if path.is_file() else None
        for path in run.iterdir()
        if not path.name.startswith(changing)
    }


def assert_unharmed(job: Training, folder: Path) -> None:
    """It trains on, ends as it is told to, and its losses are those of the same job alone."""
    job.wait_for_steps(3)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.said()
    trained = losses(job.run)
    assert json.loads((job.run / "exit.json").read_text())["step"] == len(trained)
    changes = [f"run={folder / 'alone'}", f"train.steps={min(len(trained), 40)}"]
    alone = run_ranks(run_to_end, 1, folder, cfg=load(folder / "config.yaml", changes))[0]
    assert trained[: len(alone)] == alone
    assert not (job.run / "failures").exists()


A_LAYOUT_THAT_CANNOT_BE = (DIRECT, ["train.micro_batch=5"], "must be a multiple of")
SECONDS = [
    (DIRECT, [], HELD),
    A_LAYOUT_THAT_CANNOT_BE,
    (DIRECT, ["optim.lr=0.5"], HELD),
    (DIRECT, ["data.path={folder}/other"], HELD),
    (LAUNCHED, [], HELD),
    (LAUNCHED, ["optim.lr=0.5"], HELD),
    (LAUNCHED, ["data.path={folder}/nowhere"], "nowhere"),
    ([*LAUNCHED, "--max-restarts", "2"], [], HELD),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [DIRECT, LAUNCHED], ids=["over a direct one", "over a launched one"])
def test_whatever_is_started_in_a_folder_that_is_trained_in_is_refused(
    tmp_path: Path, start: Callable[..., Training], monkeypatch: pytest.MonkeyPatch, first: list[str]
) -> None:
    config(tmp_path, **ENDLESS)
    job = start(first)
    job.wait_for_steps(2)
    before = belongings(job.run)

    def check_refused(second: list[str], words: list[str], told: str) -> None:
        refused = start(second, *(word.format(folder=tmp_path) for word in words))
        assert refused.end() == 2, refused.said()
        assert told in refused.said() and "Traceback" not in refused.said(), refused.said()
        if told == HELD:
            assert f"process {job.process.pid} on " in refused.said() and "config.yaml" in refused.said()
        assert belongings(job.run) == before, refused.said()
        assert job.process.poll() is None, job.said()

    for second, words, told in SECONDS:
        check_refused(second, words, told)
    monkeypatch.setenv("OVERTONE_JOB", json.loads((job.run / "lock").read_text().splitlines()[0])["job"])
    check_refused(*A_LAYOUT_THAT_CANNOT_BE)  # though its environment says that it is of that job
    check_refused(DIRECT, [], HELD)
    time.sleep(2)  # for a launcher to look at what ranks leave
    assert_unharmed(job, tmp_path)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [DIRECT, LAUNCHED], ids=["direct", "launched"])
def test_a_job_that_is_still_loaded_is_not_disturbed(
    tmp_path: Path, start: Callable[..., Training], first: list[str]
) -> None:
    config(tmp_path, train__steps=8)
    job = start(first)
    job.wait_for(lambda: (job.run / "lock").exists() and bool((job.run / "lock").read_text()))
    seconds = [start(DIRECT), start(LAUNCHED, "optim.lr=0.5")]
    assert not losses(job.run)
    assert [second.end() for second in seconds] == [2, 2]
    assert all(HELD in second.said() for second in seconds)
    assert job.end() == 0, job.said()
    alone = run_ranks(run_to_end, 1, tmp_path, cfg=load(tmp_path / "config.yaml", [f"run={tmp_path / 'alone'}"]))[0]
    assert losses(job.run) == alone and len(alone) == 8
    assert json.loads((job.run / "exit.json").read_text())["code"] == 0
    assert {path.name for path in job.run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "exit.json",
        "lock",
        "metrics.jsonl",
    }


def test_what_an_earlier_job_left_is_not_taken_for_this_ones(tmp_path: Path, start: Callable[..., Training]) -> None:
    """With an id of its own, and as it was written when there were no ids."""
    config(tmp_path, train__steps=3)
    run = tmp_path / "run"
    failure = {"rank": 0, "host": "h", "time": 1.0, "kind": "error", "phase": "start", "error": "e", "traceback": ""}
    for name, more in (("rank-0", {"job": "earlier"}), ("rank-1", {})):
        (run / "failures").mkdir(parents=True, exist_ok=True)
        (run / "failures" / f"{name}.json").write_text(json.dumps({**failure, "code": 2, "suspects": [], **more}))
    (run / "exit.json").write_text('{"code": 4, "reason": "of an earlier job", "step": 2}')
    (run / "lock").touch()
    job = start(LAUNCHED)
    assert job.end() == 0, job.said()
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert {path.name for path in (run / "failures-1").iterdir()} == {"rank-0.json", "rank-1.json"}


def test_a_refused_job_leaves_the_record_of_the_one_before(tmp_path: Path, start: Callable[..., Training]) -> None:
    config(tmp_path, train__steps=3)
    assert start(DIRECT).end() == 0
    before = (tmp_path / "run" / "exit.json").read_bytes(), (tmp_path / "run" / "config.yaml").read_bytes()
    for command in (DIRECT, LAUNCHED):
        refused = start(command, "optim.lr=0.5")
        assert refused.end() == 2 and "optim.lr was 0.01 and is 0.5" in refused.said(), refused.said()
        assert (
            (tmp_path / "run" / "exit.json").read_bytes(),
            (tmp_path / "run" / "config.yaml").read_bytes(),
        ) == before


@pytest.mark.timeout(600)
def test_ranks_whose_launcher_was_killed_save_and_leave_before_the_next_job_begins(
    tmp_path: Path, start: Callable[..., Training]
) -> None:
    config(tmp_path, **ENDLESS)
    killed = start(LAUNCHED)
    killed.wait_for_steps(2)
    left = killed.processes()[1:]
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    after = start(LAUNCHED)
    try:
        after.wait_for(lambda: "resumed from" in after.said())
        assert "its launcher is gone; waiting until its ranks have left" in after.said()
    finally:
        kill(left)
    after.process.send_signal(signal.SIGTERM)
    assert after.end() == 75, after.said()


@pytest.mark.timeout(600)
def test_ranks_without_a_launcher_agree_on_one_job(tmp_path: Path, start: Callable[..., Training]) -> None:
    """Under torchrun: a second one is refused, and a rank that fails leaves a record with the id of the job."""
    config(tmp_path, **ENDLESS, timeouts__heartbeat_s=5)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    job = start([*words, "20611", "-m", "pretrain"])
    job.wait_for_steps(2)
    before = belongings(job.run)
    refused = start([*words, "20612", "-m", "pretrain"])
    assert refused.end() != 0 and HELD in refused.said(), refused.said()
    assert belongings(job.run) == before
    job.wait_for_steps(2)
    ranks = [process for process in job.processes() if process.environ().get("RANK") == "1"]
    ranks[0].kill()
    assert job.end() != 0
    left = json.loads((job.run / "failures" / "rank-0.json").read_text())
    assert left["job"] == json.loads((job.run / "lock").read_text().splitlines()[0])["job"]
