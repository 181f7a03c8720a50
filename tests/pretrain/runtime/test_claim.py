"""Who has a run folder: one job, by its launcher and its first rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from pretrain.runtime.claim import (
    Held,
    Holder,
    hold,
    holder,
    job_of,
    may_write,
)


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


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run: cannot be written .* make room, or give a folder"):
        hold(tmp_path / "file" / "run", rank("a"))


def test_the_job_of_the_environment_is_checked() -> None:
    assert job_of({}) is None and job_of({"OVERTONE_JOB": "0af-1"}) == "0af-1"
    for name in ("", "a b", "a\n"):
        with pytest.raises(ConfigError, match="OVERTONE_JOB=.*expected letters, digits and dashes"):
            job_of({"OVERTONE_JOB": name})
