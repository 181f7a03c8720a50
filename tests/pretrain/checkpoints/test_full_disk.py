"""Folders that fill up, turn read-only or vanish under a run: it says so, and the checkpoints before stay whole."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.exits import EXIT_NOT_SAVED
from pretrain.checkpoints import contents, saver
from pretrain.checkpoints import folder as checkpoint
from pretrain.recorder import Recorder
from pretrain.records import Train
from pretrain.run_folder import RunFolder
from tests.pretrain.checkpoints.test_saver import config, kept
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, outcome_of

MIB = 1 << 20


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={16 * MIB}", "none", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk is a mount, which needs root: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def check_full(base: Path, policy: str) -> None:
    """Room for three checkpoints of six, then room for all."""
    assert outcome_of(config(base, run=str(base / "one"), train__steps=1)).code == 0
    size = sum(path.stat().st_blocks * 512 for path in (base / "one").rglob("*") if path.is_file())
    shutil.rmtree(base / "one")
    (base / "ballast").write_bytes(b"x" * (shutil.disk_usage(base).free - int(3.5 * size)))
    cfg = config(base, checkpoint__on_failure=policy, checkpoint__keep=9, logging__tensorboard=True)
    outcome = outcome_of(cfg)
    assert outcome.code == EXIT_NOT_SAVED and (outcome.step == 6) == (policy == "go on"), outcome
    assert "No space left on device" in outcome.reason
    folder = base / "run" / "checkpoints"
    found = checkpoint.checkpoints(folder)
    assert 1 <= len(found) <= 4 and not list(folder.glob("draft-*"))
    assert all(contents.damage(path) is None for path in found)
    assert (folder / "latest").read_text().strip() == found[-1].name
    (base / "ballast").unlink()
    assert outcome_of(cfg).code == 0


@pytest.mark.parametrize("policy", ["stop", "go on"])
def test_a_disk_that_fills_up_ends_the_run_with_whole_checkpoints(disk: Path, policy: str) -> None:
    make_data(disk / "data")
    run_ranks(check_full, 1, disk.parent, base=disk, policy=policy)
    assert kept(disk)[-1] == 6
    steps = [record["step"] for record in read_records(disk / "run") if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def check_readonly_or_gone(base: Path, harm: str) -> list[int]:
    """From the save of step 3 until that of step 5 the folder cannot be written, or is not there."""
    folder, aside = base / "run" / "checkpoints", base / "aside"
    make = saver.Saver._make

    def harming(self: saver.Saver, draft: Path) -> None:
        step = checkpoint.step_of(draft)
        if step == 3 and harm == "read-only":
            mount("--bind", str(folder), str(folder))
            mount("-o", "remount,bind,ro", str(folder))
        elif step == 3:
            folder.rename(aside)
        elif step == 5 and harm == "read-only":
            subprocess.run(["umount", "-l", str(folder)], check=True)
        elif step == 5:
            aside.rename(folder)
        make(self, draft)

    saver.Saver._make = harming  # type: ignore[method-assign]
    outcome = outcome_of(config(base, checkpoint__on_failure="go on", checkpoint__keep=9))
    return [outcome.code, outcome.step]


@pytest.mark.parametrize("harm", ["read-only", "gone"])
def test_a_folder_that_cannot_be_written_costs_those_saves_alone(
    disk: Path, harm: str, capfd: pytest.CaptureFixture
) -> None:
    make_data(disk / "data")
    assert run_ranks(check_readonly_or_gone, 1, disk.parent, base=disk, harm=harm) == [[0, 6]]
    assert kept(disk) == [1, 2, 5, 6]
    told = capfd.readouterr().err
    assert ("Read-only file system" if harm == "read-only" else "No such file or directory") in told
    assert "the checkpoints before it are untouched" in told


def test_records_wait_for_room(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(RunFolder(disk), 0, 10, tensorboard=False)
    recorder.record(Train(step=1, seconds=1.0, loss=1.0))
    (disk / "ballast").write_bytes(b"x" * shutil.disk_usage(disk).free)
    with caplog.at_level(logging.ERROR):
        for step in (2, 3):
            recorder.record(Train(step=step, seconds=1.0, loss=1.0, batch="x" * 5000))
    assert len(caplog.records) == 1 and "records wait in memory" in caplog.text
    (disk / "ballast").unlink()
    recorder.record(Train(step=4, seconds=1.0, loss=4.0))
    recorder.close()
    assert [record["step"] for record in read_records(disk)] == [1, 2, 3, 4]
