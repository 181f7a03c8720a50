"""Saves behind the training loop: one at a time, told when they fail, kept by rule; what a reader must not trust."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.exits import EXIT_NOT_SAVED
from pretrain.checkpoints import contents, loading, resume, saver
from pretrain.checkpoints import folder as checkpoint
from pretrain.checkpoints.folder import Progress
from pretrain.checkpoints.fragments import Fragment
from pretrain.config import CheckpointConfig, RunConfig
from tests.support.checkpoints import seal
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, outcome_of, tiny_config


def config(base: Path, **changes: Any) -> RunConfig:
    usual = {"run": str(base / "run"), "data__path": str(base / "data"), "train__steps": 6, "logging__every": 1}
    return tiny_config(**{**usual, "checkpoint__every": 1, "train__micro_batch": 2, **changes})


def kept(base: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(base / "run" / "checkpoints")]


def test_the_newest_every_nth_and_the_best_stay() -> None:
    found = [Path(checkpoint.name_of(step)) for step in (2, 4, 6, 8, 10)]

    def stays(best: int | None = None, **settings: Any) -> list[int]:
        gone = saver.superfluous(found, CheckpointConfig(**settings), best)
        return [checkpoint.step_of(path) for path in found if path not in gone]

    assert stays(keep=2) == [8, 10]
    assert stays(keep=1, keep_every=4) == [4, 8, 10]
    assert stays(keep=1, keep_best=True, best=6) == [6, 10]
    assert stays(keep=1, keep_best=True) == stays(keep=1, best=6) == [10]
    assert stays(keep=9) == [2, 4, 6, 8, 10]


def check_retention(base: Path) -> None:
    changes = {
        "checkpoint__every": 2,
        "checkpoint__keep": 1,
        "checkpoint__keep_every": 4,
        "checkpoint__keep_best": True,
    }
    assert outcome_of(config(base, evaluation__every=1, **changes)).code == 0


@pytest.fixture(scope="module")
def retained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("retained")
    make_data(base / "data")
    run_ranks(check_retention, 2, base, base=base)
    return base


def test_a_run_keeps_the_last_every_fourth_and_the_best(retained: Path) -> None:
    losses = {r["step"]: r["loss"] for r in read_records(retained / "run") if r["kind"] == "eval"}
    best = min(losses, key=lambda step: losses[step])
    assert kept(retained) == sorted({4, 6, best})
    folder = retained / "run" / "checkpoints"
    assert (folder / checkpoint.LATEST).read_text() == "step-00000006\n"
    state = contents.read_state(folder / "step-00000006")
    assert (state["best_step"], state["layout"]["world"]) == (best, 2)
    assert set(state["versions"]) == {"python", "torch", "deepspeed", "revision"}
    assert state["config"]["optim"]["lr"] == 0.01
    sizes = [path.stat().st_size for path in (folder / "step-00000006").glob("*.safetensors")]
    assert len(sizes) == 2 and min(sizes) > 0.8 * max(sizes), "at stage 0 every rank writes its share"
    saves = [record for record in read_records(retained / "run") if record["kind"] == "save"]
    assert saves and all(record["stall_s"] > 0 and record["seconds"] > 0 for record in saves)


def check_failure(base: Path, policy: str) -> list[int]:
    """The save of step 3 finds the disk full on the last rank; the others succeed."""
    from torch.distributed import get_rank, get_world_size

    write = saver.Saver._write

    def full(self: saver.Saver, fragments: dict[str, Fragment], draft: Path) -> list[str]:
        names = write(self, fragments, draft)
        if draft.name.endswith("00000003") and get_rank() == get_world_size() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return names

    saver.Saver._write = full  # type: ignore[method-assign]
    cfg = config(base, checkpoint__on_failure=policy, checkpoint__keep=9)
    outcome = outcome_of(cfg)
    return [outcome.code, outcome.step]


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_stops_the_run_as_configured(world: int, tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    for code, step in run_ranks(check_failure, world, tmp_path, base=tmp_path, policy="stop"):
        assert code == EXIT_NOT_SAVED and step in (4, 5)
    assert kept(tmp_path)[:2] == [1, 2] and 3 not in kept(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    assert contents.damage(folder / "step-00000002") is None
    assert not list(folder.glob("draft-*")), "what was written before the disk was full"


def test_a_full_disk_and_the_run_goes_on(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    assert run_ranks(check_failure, 2, tmp_path, base=tmp_path, policy="go on") == [[0, 6]] * 2
    assert kept(tmp_path) == [1, 2, 4, 5, 6]


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    """Else `auto` would later find them, and retention would count them."""
    make_data(tmp_path / "data")
    run_ranks(check_earlier, 1, tmp_path, base=tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    assert kept(tmp_path) == [3, 4]
    aside = {path.name for path in folder.glob("abandoned-*")}
    assert aside == {f"abandoned-step-0000000{step}" for step in (3, 4, 5, 6)}
    assert (folder / "latest").read_text() == "step-00000004\n"


def check_earlier(base: Path) -> None:
    """Six steps; then back to the second, and on to the fourth."""
    from pretrain.opening import open_run
    from pretrain.runtime import ranks as process

    assert outcome_of(config(base, checkpoint__keep=9)).code == 0
    back = str(base / "run" / "checkpoints" / "step-00000002")
    run = open_run(config(base, checkpoint__keep=2, resume=back), process.start())
    for step in (2, 3):
        run._advance(run.step(step))
        run.save()
    run.finish_save()
    run.close()
    run.trainer.engine.destroy()


def check_apart(base: Path) -> str:
    from pretrain.runtime import agreement
    from pretrain.runtime import ranks as process

    agreement.SEEN_S = 0.3
    ranks = process.start()
    behind = saver.Saver(base / f"host{ranks.rank}", ranks, CheckpointConfig())
    (base / f"host{ranks.rank}").mkdir(exist_ok=True)
    behind.start({f"w{ranks.rank}": Fragment(torch.zeros(5), 0, 5)}, Progress(step=1), {})
    with pytest.raises(saver.SaveError) as told:
        behind.wait()
    behind.close()
    return str(told.value)


def test_ranks_that_do_not_share_the_folder_publish_nothing(tmp_path: Path) -> None:
    """As where each host has a run folder of its own: a manifest without every rank's part is never written."""
    for told in run_ranks(check_apart, 2, tmp_path, base=tmp_path):
        assert "shard-00002" in told and "all hosts share" in told
    assert not list(tmp_path.glob("*/step-*")) and not list(tmp_path.rglob(checkpoint.MANIFEST))


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was there when the save began; buffers are reused."""
    from pretrain.runtime import ranks as process

    gate, write = threading.Event(), saver.Saver._write

    def slow(self: saver.Saver, fragments: dict[str, Fragment], draft: Path) -> list[str]:
        gate.wait(20)
        return write(self, fragments, draft)

    monkeypatch.setattr(saver.Saver, "_write", slow)
    ranks = process.start()
    behind = saver.Saver(tmp_path, ranks, CheckpointConfig())
    weights = torch.zeros(5)
    behind.start({"w": Fragment(weights, 0, 5)}, Progress(step=1), {})
    weights += 1
    assert not behind.done() and not checkpoint.checkpoints(tmp_path)
    gate.set()
    first = behind.wait()
    assert first is not None and first.step == 1
    behind.start({"w": Fragment(weights, 0, 5)}, Progress(step=2), {})
    buffer = behind._snapshot._buffers["w"]
    assert behind.wait() is not None and behind.wait() is None
    behind.start({"w": Fragment(weights, 0, 5)}, Progress(step=3), {})
    assert behind._snapshot._buffers["w"] is buffer
    behind.wait()
    behind.close()
    for step, value in ((2, 1.0), (3, 1.0)):  # the first is gone: two are kept
        found = torch.empty(5)
        path = tmp_path / checkpoint.name_of(step)
        loading.load_alone(path, {"w": Fragment(found, 0, 5)})
        assert (found == value).all()
    process.stop()


class _Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch bombed",))


def check_loads(base: Path) -> None:
    outcome = outcome_of(config(base, train__steps=2, resume="auto"))
    assert outcome.code == 0


def test_no_pickle_is_ever_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile pickles under every name that torch, DeepSpeed or the Hub's loaders would open."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    run_ranks(check_loads, 1, tmp_path, base=tmp_path)
    newest = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    names = (".metadata", "latest", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
             "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "__0_0.distcp", "extra.pkl")  # fmt: skip
    for name in names:
        (newest / name).write_bytes(pickle.dumps(_Bomb()))
    run_ranks(check_loads, 1, tmp_path, base=tmp_path)
    assert not list(tmp_path.rglob("bombed"))
    (newest / "more.safetensors").write_bytes(b"x")
    assert "more.safetensors: the manifest does not list it" in str(contents.damage(newest))
    (newest / "more.safetensors").unlink()
    (newest.parent / f"{newest.name}-copy").mkdir()
    assert checkpoint.checkpoints(newest.parent)[-1] == newest, "a folder of the user's is none"
    (newest / "state.json").write_bytes(pickle.dumps(_Bomb()))
    wrong = contents.damage(newest)
    assert wrong is not None and "state.json" in wrong


def check_find(folder: Path, how: Any) -> str | None:
    from pretrain.runtime import ranks as process

    try:
        found = resume.find(folder, "auto", process.start(), how)
    except ConfigError as error:
        return str(error)
    return found.name if found else None


def test_ranks_share_the_verification_and_agree(retained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(retained / "run" / "checkpoints", tmp_path / "checkpoints")
    newest, before = checkpoint.checkpoints(folder)[::-1][:2]
    for victim in sorted(newest.glob("*.safetensors")):  # whichever rank looks at it
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        arguments = {"folder": folder, "how": "full"}
        assert run_ranks(check_find, 2, tmp_path, **arguments) == [before.name] * 2
        assert run_ranks(check_find, 2, tmp_path, folder=folder, how="size") == [newest.name] * 2, "sizes alone"
        victim.write_bytes(content[:-1])
        assert run_ranks(check_find, 2, tmp_path, folder=folder, how="size") == [before.name] * 2
        victim.unlink()
        seal(newest)  # one host's part alone, and the manifest agrees
        assert run_ranks(check_find, 2, tmp_path, folder=folder, how="size") == [before.name] * 2
        victim.write_bytes(content)
        seal(newest)
    for path in checkpoint.checkpoints(folder):
        (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    told = run_ranks(check_find, 2, tmp_path, folder=folder, how="full")
    assert all("can be used" in one and "does not list state.json" in one for one in told)


def check_listing(base: Path) -> str:
    """What a rank finds whose file system does not show it the newest checkpoint yet."""
    from pretrain.runtime import ranks as process

    assert outcome_of(config(base, train__steps=2)).code == 0
    folder = base / "run" / "checkpoints"
    ranks = process.start()
    seen = checkpoint.checkpoints(folder)
    checkpoint.checkpoints = lambda _: seen if ranks.first else seen[:1]  # type: ignore[assignment]
    found = resume.find(folder, "auto", ranks)
    process.stop()
    return str(found and found.name)


def test_ranks_go_on_from_the_first_ones_listing(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    found = run_ranks(check_listing, 2, tmp_path, base=tmp_path)
    assert found == ["step-00000002"] * 2


def check_grace(base: Path) -> list[str]:
    from pretrain import loop

    told: list[str] = []
    loop.log.warning = lambda text, *values: told.append(text % values)  # type: ignore[assignment]
    assert outcome_of(config(base, train__steps=2, checkpoint__grace_s=1e-6, checkpoint__every=9)).code == 0
    return told


def test_what_a_preempted_job_has_no_time_for_is_told(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    ((evaluation, save),) = run_ranks(check_grace, 1, tmp_path, base=tmp_path)
    assert re.match(r"an evaluation takes \d+ s, in which a preempted job does not save, and it has 0 s", evaluation)
    assert re.match(r"a save takes \d+ s, but a preempted job has 0 s \(checkpoint\.grace_s\)", save)


def check_tidying(base: Path) -> int:
    def fails(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    saver.remove = fails  # type: ignore[assignment]
    return outcome_of(config(base, train__steps=3, checkpoint__keep=1)).code


def test_a_save_is_one_even_if_the_old_ones_stay(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    assert run_ranks(check_tidying, 1, tmp_path, base=tmp_path) == [0]
    assert kept(tmp_path) == [1, 2, 3]
    saves = [record["step"] for record in read_records(tmp_path / "run") if record["kind"] == "save"]
    assert saves == [1, 2, 3]


def test_what_differs_is_told_and_refused_or_allowed(caplog: pytest.LogCaptureFixture) -> None:
    state = {
        "identity": {"optim.lr": 0.1, "model.dim": 8, "the data's fingerprint": "a"},
        "config": {"optim": {"lr": 0.1}, "parallel": {"zero": 1}},
        "layout": {"world": 2},
        "versions": {"torch": "2.13"},
    }
    now = {
        "identity": {"optim.lr": 0.2, "model.dim": 8, "the data's fingerprint": "b"},
        "config": {"optim": {"lr": 0.2}, "parallel": {"zero": 3}},
        "layout": {"world": 4},
        "versions": {"torch": "2.14"},
    }
    found = {one.key: one.verdict for one in resume.audit(state, now, ["optim"])}
    assert found == {
        "the data's fingerprint": "refused", "optim.lr": "allowed", "parallel.zero": "harmless",
        "layout: world": "harmless", "versions: torch": "harmless",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"fingerprint was 'a' and is 'b'.*resume_allow: \[the data's fingerprint\]"):
        resume.check_audit(Path("step-1"), resume.audit(state, now, ["optim"]))
    assert resume.audit(state, state, []) == []
    with caplog.at_level("INFO"):
        resume.check_audit(Path("step-1"), resume.audit(state, now, ["optim", "the data's fingerprint"]))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in caplog.text.splitlines() if "│" in line]
    assert ["optim.lr", "0.1", "0.2", "allowed"] in rows and ["layout: world", "2", "4", "harmless"] in rows
