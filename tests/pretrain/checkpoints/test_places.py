"""Where a run lies: lost checkpoints, links, folders that cannot be written. Nothing begins anew by itself, nothing is
wedged, and what cannot be done is refused before anything is touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.files import check_writable, discard
from launch.hosts import Placement
from launch.invocation import check
from pretrain.checkpoints import folder, resume
from pretrain.checkpoints.traces import traces
from pretrain.config import RunConfig
from pretrain.evaluate import main as evaluate
from pretrain.records import Save, Train
from pretrain.run_folder import RunFolder
from tests.pretrain.checkpoints.test_full_disk import disk  # noqa: F401  # a fixture
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, outcome_of, tiny_config

SAVED = Save(step=3, seconds=1.0).line()
TRAINED = Train(step=3, seconds=1.0, loss=2.0).line()


def config(base: Path, **changes: Any) -> RunConfig:
    usual = {"train__steps": 6, "checkpoint__every": 1, "checkpoint__keep": 2, "logging__every": 1}
    return tiny_config(**{"run": str(base / "run"), "data__path": str(base / "data"), **usual, **changes})


def train(cfg: RunConfig) -> tuple[int, int] | str:
    """How it ends: its code and step, or why it is refused."""
    try:
        outcome = outcome_of(cfg)
    except ConfigError as error:
        return str(error)
    return outcome.code, outcome.step


def trains(base: Path, **changes: Any) -> tuple[int, int] | str:
    return run_ranks(train, 1, base, cfg=config(base, **changes))[0]


def steps(run: Path) -> list[int]:
    return [folder.step_of(path) for path in folder.checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("places")
    make_data(base / "data")
    assert trains(base, checkpoint__keep=9) == (0, 6)
    for step in (1, 2, 5, 6):
        shutil.rmtree(base / "run" / "checkpoints" / f"step-{step:08d}")
    return base


@pytest.fixture  # a run that was killed after its fourth step
def base(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("store-*"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "tells"),
    [
        ("metrics.jsonl", f"{TRAINED}\n{SAVED}\n", True),
        ("metrics.jsonl", f"null\n{SAVED}\n", True),
        ("metrics.jsonl", f"{TRAINED}\n", False),  # it died before its first checkpoint
        ("exit.json", '{"code": 75, "step": 3}', True),
        ("exit.json", '{"code": 0, "step": 5}', True),
        ("exit.json", '{"code": 1, "reason": "killed", "step": null}', False),
        ("exit.json", '{"code": 3, "step": 3}', False),
        ("exit.json", "[" * 100_000, False),
        ("events.out.tfevents.1.host", "...\x05save/seconds...", True),
        ("events.out.tfevents.1.host", "...train/loss...", False),
        ("checkpoints/latest", "step-00000003\n", True),
    ],
)
def test_what_tells_of_lost_checkpoints(name: str, text: str, tells: bool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / name).write_text(text)
    if not tells:
        assert traces(tmp_path / "checkpoints") == [] and resume.find(tmp_path / "checkpoints", "auto") is None
        return
    with pytest.raises(ConfigError, match=f"no checkpoint, but there were some, as .*{name} tells. Put them back"):
        resume.find(tmp_path / "checkpoints", "auto")
    assert resume.find(tmp_path / "checkpoints", "never") is None
    if name == "metrics.jsonl":
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(ConfigError, match="there were some"):
            resume.find(tmp_path / "checkpoints", "auto")


def test_lost_checkpoints_are_no_fresh_start_and_never_keeps_the_old_records(base: Path) -> None:
    shutil.rmtree(base / "run" / "checkpoints")
    before = {path.name: path.read_bytes() for path in (base / "run").iterdir()}
    told = trains(base)
    assert isinstance(told, str) and "but there were some, as" in told and "resume=never" in told
    assert {path.name: path.read_bytes() for path in (base / "run").iterdir()} == before
    assert trains(base, resume="never") == (0, 6)
    assert (base / "run" / "earlier-1" / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]
    assert [record.step for record in RunFolder(base / "run").records(Train)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["link to nowhere", "file", "pipe"])
def test_what_stands_for_the_checkpoints_is_refused_before_anything_is_touched(what: str, base: Path) -> None:
    place = base / "run" / "checkpoints"
    shutil.rmtree(place)
    if what == "file":
        place.touch()
    elif what == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(base / "disk")
    (base / "run" / "metrics.jsonl").unlink()
    before = sorted(path.name for path in (base / "run").iterdir())
    for asked in ("auto", "never"):
        told = trains(base, resume=asked)
        assert isinstance(told, str) and str(place) in told and ("not there" in told or "no folder" in told)
    assert sorted(path.name for path in (base / "run").iterdir()) == before
    assert evaluate([str(base / "run")]) == 2


def test_a_run_goes_on_through_links(base: Path) -> None:
    """Of its folder, of `checkpoints` and of checkpoints in it; of these, deletion removes the link alone."""
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (base / "run" / "checkpoints" / "step-00000004").rename(elsewhere / "four")
    (base / "run" / "checkpoints").rename(elsewhere / "checkpoints")
    (base / "run" / "checkpoints").symlink_to("../elsewhere/checkpoints")
    (elsewhere / "checkpoints" / "step-00000004").symlink_to(elsewhere / "four")
    (base / "run").rename(base / "real")
    (base / "run").symlink_to("real")
    run = RunFolder(base / "run")
    assert run.checkpoint().name == "step-00000004"
    assert RunFolder.containing(run.checkpoints()[-1]).read(run.open_model, run.checkpoints()[-1]).step == 4
    assert run.read(run.open_model).step == 4
    assert trains(base) == (0, 6) and steps(base / "run") == [5, 6]
    assert (elsewhere / "four" / "manifest.json").exists(), "what a link leads to is not deleted"
    assert not [path for path in (elsewhere / "checkpoints").iterdir() if path.name.startswith("draft-")]


@pytest.mark.parametrize("what", ["link to nowhere", "file", "empty folder", "link to a file"])
def test_what_is_no_checkpoint_under_the_name_of_the_next_one_is_set_aside(
    what: str, base: Path, capfd: pytest.CaptureFixture
) -> None:
    strange = base / "run" / "checkpoints" / "step-00000005"
    if what == "file":
        strange.write_text("mine")
    elif what == "empty folder":
        strange.mkdir()
    else:
        strange.symlink_to(base / ("nowhere" if what == "link to nowhere" else "data/manifest.json"))
    assert trains(base) == (0, 6)
    assert steps(base / "run") == [5, 6] and os.path.lexists(strange.with_name(f"abandoned-{strange.name}"))
    assert "step-00000005" in capfd.readouterr().err
    assert (base / "data" / "manifest.json").exists()


def test_whatever_is_called_a_draft_goes_and_what_it_leads_to_stays(base: Path) -> None:
    place, mine = base / "run" / "checkpoints", base / "mine"
    mine.mkdir()
    (mine / "thing").touch()
    (place / "draft-step-00000005").symlink_to(mine)
    (place / "draft-step-00000006").write_text("a file")
    (place / "draft-nowhere").symlink_to("nowhere")
    os.mkfifo(place / "draft-pipe")
    (place / "draft-locked" / "inner").mkdir(parents=True)
    (place / "draft-locked" / "inner" / "file").touch()
    for locked in (place / "draft-locked" / "inner", place / "draft-locked"):
        locked.chmod(0)
    (place / f"{folder.DRAFT}old-step-00000003").symlink_to(mine)
    assert trains(base) == (0, 6)
    assert not [path.name for path in place.iterdir() if path.name.startswith("draft-")] and (mine / "thing").exists()


def test_a_folder_that_may_not_be_written_in_is_removed_all_the_same(tmp_path: Path, monkeypatch) -> None:
    """As another user than root sees it."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    for locked in (tmp_path / "a" / "b", tmp_path / "a"):
        locked.chmod(0o500)
    remove = shutil.rmtree

    def refused_once(path: Path, *rest: Any, **more: Any) -> None:
        if path.stat().st_mode & 0o700 != 0o700:
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", refused_once)
    discard(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


UNWRITABLE: dict[str, Callable[[Path], Path]] = {
    "a file": lambda base: base / "file",
    "a file in the way": lambda base: base / "file" / "deeper" / "run",
    "a long name": lambda base: base / "new" / ("x" * 300) / "run",
    "a long path": lambda base: base / "/".join(["x" * 100] * 50),
    "a link to nowhere": lambda base: base / "nowhere" / "run",
    "a system's folder": lambda base: Path("/proc/run"),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_a_run_folder_that_cannot_be_is_found_by_a_dry_run(what: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "not there")
    run = UNWRITABLE[what](tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be written \(.*make room, or give a folder you may write|expected "):
        check(config(trained, run=str(run)), Placement({"localhost": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"], "nothing was made"


def look(base: Path) -> dict[str, bytes | None]:
    """Everything in a run folder but its lock."""
    run = base / "run"
    found = {str(path.relative_to(run)): path.read_bytes() if path.is_file() else None for path in run.rglob("*")}
    found.pop("lock", None)
    return found


@pytest.mark.parametrize("free", [0, 8192])
def test_a_disk_that_is_full_at_resume_is_refused(free: int, base: Path, disk: Path) -> None:  # noqa: F811
    shutil.copytree(base / "run", disk / "run")
    ballast = shutil.disk_usage(disk).free - free
    (disk / "ballast").write_bytes(b"x" * ballast)
    before = look(disk)
    (disk.parent / "data").exists() or make_data(disk.parent / "data")
    told = run_ranks(train, 1, base, cfg=config(base, run=str(disk / "run")))[0]
    assert isinstance(told, str) and "cannot be written" in told and "No space left" in told and "make room" in told
    assert look(disk) == before
    with pytest.raises(ConfigError, match="No space left"):
        check_writable(disk / "run")
    (disk / "ballast").unlink()
    assert run_ranks(train, 1, base, cfg=config(base, run=str(disk / "run")))[0] == (0, 6)


def full_late(base: Path) -> tuple[Any, bool]:
    """The disk fills between the look at it and the trimming of metrics.jsonl."""
    from pretrain import recorder

    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    whole, recorder.replacing = recorder.replacing, full  # type: ignore[assignment]
    before = look(base)
    told = train(config(base))
    recorder.replacing = whole
    return told, look(base) == before


def test_a_start_that_fails_late_leaves_the_folder_as_it_was(base: Path) -> None:
    ((told, same),) = run_ranks(full_late, 1, base, base=base)
    assert same and "cannot be written" in told and "No space left" in told
    assert json.loads((base / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())["step"] == 4
