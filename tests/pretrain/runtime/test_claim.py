"""Who has a run folder: one job, by its launcher and its first rank."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.errors import ConfigError
from launch.lease import Lease, _text_of
from pretrain.runtime.claim import (
    Held,
    Holder,
    hold,
    holder,
    job_of,
    may_write,
)
from pretrain.runtime.endings import read_exit, read_failures, set_aside_failures


def launcher(job: str) -> Holder:
    return Holder(job, launcher=True)


def rank(job: str) -> Holder:
    return Holder(job, launcher=False)


def test_another_job_is_refused_until_launcher_and_first_rank_have_left(tmp_path: Path) -> None:
    first = hold(tmp_path, launcher("a"))
    joined = hold(tmp_path, rank("a"))
    assert joined.joined and not first.joined
    before = (tmp_path / "lock").read_bytes()
    for held in (first, joined):
        for other in (launcher("b"), rank("b"), launcher("a"), rank("a")):
            with pytest.raises(Held, match=f"another job trains in this folder: `.*process {held_by(tmp_path)} on"):
                hold(tmp_path, other)
        held.release()
    assert (tmp_path / "lock").read_bytes() == before
    with hold(tmp_path, rank("b")) as claim:
        assert not claim.joined and may_write(tmp_path, "b") and not may_write(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def held_by(run: Path) -> int:
    found = holder(run)
    assert found is not None
    return found.pid


def test_a_launchers_rank_that_comes_after_its_launcher_takes_the_folder(tmp_path: Path) -> None:
    hold(tmp_path, launcher("a")).release()
    with hold(tmp_path, rank("a")) as claim:
        assert not claim.joined and may_write(tmp_path, "a")


@pytest.mark.parametrize("left", ["", "no JSON\n", "[]\n", '{"job": "a"}\n', '{"job": "a", "hosts": 3}\n'])
def test_what_is_in_a_lock_need_not_be_ours(tmp_path: Path, left: str) -> None:
    (tmp_path / "lock").write_text(left)
    assert holder(tmp_path) is None and not may_write(tmp_path, "a")
    with hold(tmp_path, rank("b")):
        assert json.loads((tmp_path / "lock").read_text())["job"] == "b"


HOSTILE = [
    "[" * 100_000,
    '{"code": "0"}',
    '{"code": 0, "step": "3"}',
    "null",
    "1e999",
    "\xff",
    '{"code": 1, "x": 2}',
    "",
]


@pytest.mark.parametrize("content", [*HOSTILE, "huge", "pipe", "folder", "link"])
def test_records_of_an_end_that_are_none_tell_nothing(content: str, tmp_path: Path) -> None:
    """Nor is one waited for, nor does it keep a job from beginning."""
    (tmp_path / "failures").mkdir()
    for name in ("exit.json", "failures/rank-0.json", "lock", "lease-0"):
        path = tmp_path / name
        if content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content == "link":
            path.symlink_to("nowhere/at all")
        elif content == "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        else:
            path.write_text(content, encoding="latin-1")
    assert read_exit(tmp_path) is None and read_failures(tmp_path, "a") == [] and holder(tmp_path) is None
    assert _text_of(tmp_path / "lease-0") in ("", content)
    if content in ("pipe", "folder", "link"):
        with pytest.raises(ConfigError, match="cannot be written"):
            hold(tmp_path, rank("b"))
    else:
        hold(tmp_path, rank("b")).release()
    set_aside_failures(tmp_path)
    assert not (tmp_path / "failures").exists()
    if content == "folder":
        with pytest.raises(ConfigError, match="cannot be written"), Lease(tmp_path / "lease-0", "b"):
            pytest.fail("a folder is in its way")
    else:
        with Lease(tmp_path / "lease-0", "b"):
            assert _text_of(tmp_path / "lease-0").startswith("b ")


def test_whatever_stands_for_failures_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "failures").symlink_to("nowhere")
    set_aside_failures(tmp_path)
    (tmp_path / "failures").write_text("a file")
    set_aside_failures(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures-1", "failures-2"]


def test_a_refused_hold_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        hold(tmp_path / "new" / ("x" * 300), rank("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run: cannot be written .* make room, or give a folder"):
        hold(tmp_path / "file" / "run", rank("a"))


def test_the_job_of_the_environment_is_checked() -> None:
    assert job_of({}) is None and job_of({"OVERTONE_JOB": "0af-1"}) == "0af-1"
    for name in ("", "a b", "a\n"):
        with pytest.raises(ConfigError, match="OVERTONE_JOB=.*expected letters, digits and dashes"):
            job_of({"OVERTONE_JOB": name})
