"""Commands that read a checkpoint beside the run that trains, which deletes what is not the newest."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.files import publish, replace_file, sha256_of
from pretrain.checkpoints import contents, folder, reading, resume
from pretrain.checkpoints.folder import step_of
from pretrain.checkpoints.reading import Vanished, agreed, held, unread
from pretrain.evaluate import main as evaluate
from pretrain.export import main as export
from pretrain.replay import check_files, verify
from pretrain.report import main as report
from pretrain.run_folder import RunFolder
from pretrain.runtime.ranks import alone
from pretrain.sample import main as sample
from tests.support.ranks import run_ranks
from tests.support.tiny import make_text, run_to_end, text_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("reading")
    make_text(base / "data")
    cfg = text_config(base, train__steps=6, checkpoint__every=2, checkpoint__keep=9, logging__every=1)
    run_ranks(run_to_end, 1, base, cfg=cfg)
    return base


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """Its checkpoints are of step 2 and 4; that of step 6 is yet to come."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000006").rename(tmp_path / "next")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000004\n")
    return RunFolder(tmp_path / "run")


def step_on(run: RunFolder) -> None:
    """What a save does with `checkpoint.keep: 1`, as if nobody could lock anything."""
    aside = run.path.parent / "next"
    if aside.exists():
        aside.rename(run.checkpoints_folder / "step-00000006")
        (run.checkpoints_folder / "latest").write_text("step-00000006\n")
        for step in (2, 4):
            shutil.rmtree(run.checkpoints_folder / f"step-{step:08d}")


def between(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, happens: Callable[[], None]) -> None:
    """Something happens before a function is called."""
    work = getattr(module, name)

    def first(*given: Any, **settings: Any) -> Any:
        happens()
        return work(*given, **settings)

    monkeypatch.setattr(module, name, first)


def stages() -> dict[str, tuple[Any, str]]:
    from pretrain import inference
    from pretrain.checkpoints import loading, weights

    return {
        "before it is looked at": (resume, "looked_at"),
        "before its hashes": (contents, "_check_hash"),
        "before it is read": (reading, "held_by_all"),
        "before its state": (inference, "read_state"),
        "before its tensors": (loading, "_fill"),
        "before a file of them": (weights, "load_alone"),
    }


@pytest.mark.parametrize("stage", list(stages()))
def test_the_newest_checkpoint_may_vanish_at_any_moment(
    stage: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    between(monkeypatch, *stages()[stage], lambda: step_on(run))
    if stage == "before a file of them":
        out = run.path.parent / "out"
        assert export([str(run.path), "--out", str(out)]) == 0
        assert "step-00000006" in capsys.readouterr().out and sorted(p.name for p in out.iterdir())[0] == "config.yaml"
    else:
        assert RunFolder(run.path).read(RunFolder(run.path).open_model).step == 6
    assert not [path for path in run.path.parent.iterdir() if path.name.startswith("draft-")]


@pytest.mark.parametrize("stage", list(stages())[1:-1])
def test_one_that_was_asked_for_by_name_and_vanishes_is_bad_input(
    stage: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    between(monkeypatch, *stages()[stage], lambda: step_on(run))
    asked = str(run.checkpoints_folder / "step-00000004")
    assert sample([asked, "--tokens", "1"]) == 2
    assert "step-00000004: it was deleted while it was read" in capsys.readouterr().err
    assert sample([asked, "--tokens", "1"]) == 2 and "neither a run folder" in capsys.readouterr().err


def test_a_checkpoint_that_is_read_is_left_alone_until_it_is_not(run: RunFolder) -> None:
    older, newest = run.checkpoints()
    with held(older):
        with held(older):
            folder.remove(older)
        folder.remove(older)
        assert run.checkpoints() == [older, newest]
        with unread(older) as free:
            assert not free
    folder.remove(older)
    assert run.checkpoints() == [newest]
    with unread(newest) as free:
        assert free
        with pytest.raises(Vanished), held(newest):
            pytest.fail("it is about to go")
    with pytest.raises(Vanished), held(newest):
        newest.rename(newest.with_name("aside"))
        shutil.copytree(newest.with_name("aside"), newest)  # another one of this name


def test_readers_hold_what_they_read(run: RunFolder) -> None:
    """So that the run's own deletion does not touch it."""
    newest = run.checkpoints()[-1]

    def read(checkpoint: Path) -> str:
        folder.remove(checkpoint)
        return checkpoint.name

    assert run.read(read) == newest.name and newest.exists()


def test_verify_skips_what_a_run_deletes_and_waits_for_latest(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain import replay

    between(monkeypatch, replay, "looked_at", lambda: step_on(run))
    ranks = alone()
    with pytest.raises(Vanished):
        check_files(run, ranks)
    assert [path.name for path in check_files(run, ranks)] == ["step-00000006"]
    (run.checkpoints_folder / "latest").write_text("step-00000004\n")
    settling = threading.Timer(0.2, (run.checkpoints_folder / "latest").write_text, ["step-00000006\n"])
    settling.start()
    assert len(check_files(run, ranks)) == 1
    settling.join()
    shutil.rmtree(run.checkpoints()[-1])
    with pytest.raises(replay.Differs, match="there is no checkpoint"):
        verify(run.path, [], 1, ranks)


def failing_on(rank: int) -> list[str]:
    from pretrain.runtime import ranks as process

    ranks = process.start()

    def work() -> None:
        if ranks.rank == rank:
            raise Vanished("gone")

    try:
        agreed(ranks, work)
    except Vanished as gone:
        return [str(gone)]
    return []


def read_by_all(run: Path) -> int:
    """The second rank finds the newest checkpoint gone, which the first one still held."""
    from pretrain.runtime import ranks as process

    ranks = process.start()
    look = reading.held
    lost: list[Path] = []

    def losing(checkpoint: Path) -> Any:
        if ranks.rank == 1 and not lost:
            lost.append(checkpoint)
            raise reading._vanished(checkpoint)
        return look(checkpoint)

    reading.held = losing
    return RunFolder(run).read(lambda path: RunFolder(run).open_model(path, ranks=ranks), ranks=ranks).step


def test_ranks_lose_a_checkpoint_together(run: RunFolder, tmp_path: Path) -> None:
    assert run_ranks(failing_on, 2, tmp_path, rank=1) == [["gone"], ["gone"]]
    assert run_ranks(read_by_all, 2, tmp_path, run=run.path) == [4, 4]


def save(run: RunFolder, source: Path, step: int) -> None:
    """As the saver does with `checkpoint.keep: 1`: another step's checkpoint, with its weights."""
    draft = run.checkpoints_folder / f"draft-step-{step:08d}"
    shutil.copytree(source, draft)
    state = json.loads((draft / "state.json").read_text())
    state |= {"step": step, "updates": step}
    state["config"]["train"]["steps"] = state["identity"]["train.steps"] = 10**8
    (draft / "state.json").write_text(json.dumps(state))
    manifest = json.loads((draft / "manifest.json").read_text())
    size, sha256 = (draft / "state.json").stat().st_size, sha256_of(draft / "state.json")
    manifest["files"]["state.json"] = {"size": size, "sha256": sha256}
    (draft / "manifest.json").write_text(json.dumps(manifest))
    publish(draft, draft.with_name(f"step-{step:08d}"))
    replace_file(run.checkpoints_folder / "latest", f"step-{step:08d}\n")
    for old in run.checkpoints()[:-1]:
        folder.remove(old)


@pytest.mark.slow
def test_every_reader_beside_a_run_that_saves_without_end(
    run: RunFolder, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """keep: 1, every: 1, as fast as it goes, until twenty were saved; metrics.jsonl grows and is replaced."""
    over = threading.Event()
    text, before = run.metrics.read_text(), step_of(run.checkpoints()[-1])
    enough = before + 20

    def train() -> None:
        for step in range(before + 1, 10**7):
            save(run, trained / "run" / "checkpoints" / "step-00000006", step)
            replace_file(run.metrics, text + text[: step % 50])
            if over.is_set() and step >= enough:
                return

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for turn in range(2):
            told = []
            for work, *words in (
                (evaluate, "--json"),
                (sample, "--tokens", "1"),
                (export, "--out", str(tmp_path / f"out-{turn}")),
                (report, "--interpret", "--json"),
            ):
                code = work([str(run.path), *words])
                told.append((work.__module__, code, capsys.readouterr().err[-600:]))
            assert [code for _, code, _ in told] == [0] * 4, told
            check_files(run, alone())
    finally:
        over.set()
        thread.join()
    assert step_of(run.checkpoints()[-1]) >= enough
    assert len(run.checkpoints()) <= 2 and not list(run.checkpoints_folder.glob("draft-*"))
