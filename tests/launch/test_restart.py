"""When a failed job is started again, where, and when no more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ConfigError
from launch import restart
from launch.hosts import Placement, place
from launch.job import End
from launch.reap import holders
from launch.restart import fitting, keep_running
from pretrain.config import RunConfig
from tests.support.tiny import tiny_config

ONE = Placement({"localhost": 1})


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return tiny_config(run=str(tmp_path / "run"))


def ending(cfg: RunConfig, *ends: tuple[int, int | None]) -> tuple[Callable[[Placement], End], list[Placement]]:
    """A start that ends with the next (code, step of the checkpoint that it wrote) each time; and where it was made."""
    left, made = list(ends), []

    def start(placement: Placement) -> End:
        made.append(placement)
        code, step = left.pop(0)
        if step is not None:
            (cfg.run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        return End(code, f"ended with {code}", told=False)

    return start, made


def test_a_failed_job_is_started_again_until_it_is_done(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    start, made = ending(cfg, (1, 5), (137, None), (1, 10), (0, 15))
    assert keep_running(start, cfg, ONE, restarts=9, back_off_s=0) == 0
    assert made == [ONE] * 4
    assert "restart 2 of 9 in 0 s, from step-00000005" in capsys.readouterr().err


def test_no_more_often_than_asked(cfg: RunConfig) -> None:
    start, made = ending(cfg, (1, 5), (1, 6), (1, 7), (0, 8))
    assert keep_running(start, cfg, ONE, restarts=2, back_off_s=0) == 1 and len(made) == 3


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75])
def test_what_is_no_failure_or_would_end_so_again_is_final(cfg: RunConfig, code: int) -> None:
    start, made = ending(cfg, (code, 5))
    assert keep_running(start, cfg, ONE, restarts=9, back_off_s=0) == code and len(made) == 1


def test_a_connection_that_ended_is_no_wish_to_stop(cfg: RunConfig) -> None:
    ends = [End(75, "cut off", told=False, cut_off=True), End(0, "done", told=False)]
    assert keep_running(lambda _: ends.pop(0), cfg, ONE, restarts=9, back_off_s=0) == 0 and not ends


def test_a_launcher_that_was_told_to_stop_stops(cfg: RunConfig) -> None:
    assert keep_running(lambda _: End(143, "killed", told=True), cfg, ONE, restarts=9, back_off_s=0) == 143


def test_a_job_that_gets_nowhere_is_given_up(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    start, made = ending(cfg, *[(1, None)] * 9)
    assert keep_running(start, cfg, ONE, restarts=8, back_off_s=0) == 1 and len(made) == 3
    assert (
        "3 starts in a row brought no new checkpoint, so there is no other; the last: ended" in capsys.readouterr().err
    )


def test_it_waits_longer_while_nothing_comes_of_it(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(restart.time, "sleep", waits.append)
    start, _ = ending(cfg, (1, 5), (1, None), (1, 6), (0, None))
    keep_running(start, cfg, ONE, restarts=9, back_off_s=2)
    assert waits == [2, 4, 2]


@pytest.fixture
def three(tmp_path: Path) -> Placement:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\nc slots=1\n")
    return place(tmp_path / "hosts")


def test_hosts_that_do_not_answer_are_left_out(
    cfg: RunConfig, three: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "check", lambda cfg, placement: None)
    monkeypatch.setattr(restart, "ask", lambda hosts: {host: "b: no" if host == "b" else {} for host in hosts})
    start, made = ending(cfg, (1, 5), (0, 10))
    assert keep_running(start, cfg, three, restarts=1, elastic=True, back_off_s=0) == 0
    assert [list(placement.ranks) for placement in made] == [["a", "b", "c"], ["a", "c"]]


def test_the_layout_decides_how_many_hosts_are_of_use(
    cfg: RunConfig, three: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(cfg: RunConfig, placement: Placement) -> None:
        if placement.world == 2:
            raise ConfigError("two do not divide")

    monkeypatch.setattr(restart, "check", check)
    assert list(fitting(cfg, three, {"b"}).ranks) == ["a"]
    with pytest.raises(ConfigError, match="no host answers"):
        fitting(cfg, three, {"a", "b", "c"})


def test_a_restart_that_cannot_be_made_is_not_the_last(cfg: RunConfig) -> None:
    calls = []

    def start(placement: Placement) -> End:
        calls.append(placement)
        if len(calls) == 2:
            raise ConfigError("a host is away")
        return End(0 if len(calls) == 3 else 1, "", told=False)

    assert keep_running(start, cfg, ONE, restarts=3, back_off_s=0) == 0 and len(calls) == 3


def test_what_is_left_of_a_job_is_found_by_its_id() -> None:
    words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    environments = [{"OVERTONE_JOB": name} for name in ("ours", "another")]
    jobs = [subprocess.Popen(words, env=one, stdout=subprocess.PIPE) for one in environments]
    try:
        for job in jobs:
            assert job.stdout is not None and job.stdout.readline()
        assert holders(b"OVERTONE_JOB=ours") == [jobs[0].pid]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
