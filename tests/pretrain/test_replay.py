"""`python -m pretrain.verify`: what passes, on which layouts, and that every kind of tampering is told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain import replay as verification
from pretrain import verify
from pretrain.checkpoints.folder import LATEST
from pretrain.run_folder import RunFolder
from pretrain.runtime import ranks as process
from tests.support.checks import flip
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, run_to_end, tiny_config

ON_TWO_RANKS: dict[str, dict[str, Any]] = {
    "two": {"parallel__zero": 3, "parallel__vocab": 2},
    "dropout": {"model__dropout": 0.1},
}
ALONE = ["parallel.vocab=1", "train.micro_batch=4"]


def check_runs(base: Path, runs: dict[str, dict[str, Any]]) -> None:
    usual = {"data__path": str(base / "data"), "logging__every": 1, "checkpoint__every": 3, "train__micro_batch": 2}
    for name, changes in runs.items():
        run_to_end(tiny_config(run=str(base / name), train__steps=6, **usual, **changes))


@pytest.fixture(scope="module", autouse=True)
def one_process_group() -> Iterator[None]:
    """For all commands of this process: DeepSpeed keeps groups that do not survive a second one."""
    before = dict(os.environ)
    stop, process.stop = process.stop, lambda: None
    yield
    process.stop = stop
    process.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def base(one_process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("verify")
    make_data(base / "data")
    check_runs(base, {"one": {"parallel__zero": 1}})
    run_ranks(check_runs, 2, base, base=base, runs=ON_TWO_RANKS)
    return base


def content(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_same_layout_passes_bit_for_bit_and_the_run_is_only_read(base: Path, capsys) -> None:
    before = content(base / "one")
    assert verify.main([str(base / "one")]) == 0
    assert content(base / "one") == before
    told = capsys.readouterr().out
    assert told == (
        "PASS: 2 checkpoints are whole; steps 4 to 6 again from step-00000003: the logged batches, and the logged "
        "losses bit for bit\n"
    )


def test_another_layout_passes_to_rounding(base: Path, capsys) -> None:
    assert verify.main([str(base / "two"), "--steps", "2", *ALONE, "parallel.zero=0"]) == 0
    told = capsys.readouterr().out
    assert "PASS: 2 checkpoints are whole; steps 4 to 5 again from step-00000003" in told
    assert verify.main([str(base / "two"), "--steps", "1", *ALONE, "parallel.zero=2"]) == 0
    assert "; step 4 again" in capsys.readouterr().out


def fingerprints(base: Path) -> list[str]:
    """Of the batches of the steps 0, 1, 2 and 0 again."""
    from data.loader import Windows
    from data.shards import open_split
    from pretrain.batches import Batches

    cfg = tiny_config(data__path=str(base / "data"), train__micro_batch=2)
    batches = Batches(
        Windows(open_split(base / "data", "train"), cfg.model.seq_len, cfg.train.seed), cfg, process.start()
    )
    found = []
    for step in (0, 1, 2, 0):
        for _ in batches.of(step):
            pass
        found.append(batches.fingerprint())
    return found


def check_two_ranks(base: Path) -> tuple[list[int], list[str]]:
    process.stop = lambda: None  # the tests' own group
    one = [str(base / "one"), "parallel.zero=2", "parallel.vocab=2"]
    codes = [verify.main(arguments) for arguments in ([str(base / "two")], one, [str(base / "dropout")])]
    return codes, fingerprints(base)


@pytest.mark.slow
def test_two_ranks_pass_and_their_batches_have_the_fingerprints_of_one(base: Path) -> None:
    alone = fingerprints(base)
    assert run_ranks(check_two_ranks, 2, base, base=base) == [([0, 0, 0], alone)] * 2
    assert alone[0] == alone[3] and len(set(alone)) == 3


def edit_record(run: Path, step: int = 5, **changes: Any) -> None:
    """In the record of a step of training; without changes it is taken out."""
    records = read_records(run)
    for record in list(records):
        if record["kind"] == "train" and record["step"] == step:
            record.update(changes)
            if not changes:
                records.remove(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def without_latest(run: Path) -> None:
    (run / "checkpoints" / LATEST).unlink()


TAMPERING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "loss": (lambda run: edit_record(run, loss=4.0), "step 5: the loss"),
    "loss that is no number": (lambda run: edit_record(run, loss=float("nan")), "is not the logged nan"),
    "batch": (lambda run: edit_record(run, batch="0" * 16), "step 5: the batch"),
    "file": (lambda run: flip(next((run / "checkpoints/step-00000003").glob("*.safetensors"))), "its SHA-256"),
    "no record": (edit_record, "no record is left of step 5"),
    "no last record": (lambda run: edit_record(run, 6), "no record is left of step 6"),
    "old latest": (lambda run: (run / "checkpoints" / LATEST).write_text("step-00000003\n"), "the newest checkpoint"),
    "no latest": (without_latest, "latest: missing, but the newest checkpoint is step-00000006"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "there is no checkpoint"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_fails(base: Path, tmp_path: Path, kind: str, capsys) -> None:
    tamper, told = TAMPERING[kind]
    shutil.copytree(base / "one", tmp_path / "run")
    tamper(tmp_path / "run")
    assert verify.main([str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL: ") and told in out and out.count("\n") == 1


def test_a_run_without_steps_after_a_checkpoint(base: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(base / "one", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    assert verify.main([str(tmp_path / "run")]) == 0
    assert "PASS: 1 checkpoint is whole; no step was logged after one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "not a run folder"),
        (["two"], "does not divide the world of 1"),
        (["one", "train.micro_batch=3"], "must be a multiple of"),
        (["one", "optim.lr=3.0"], "optim.lr was 0.01 and is 3.0"),
        (["one", "data.path=/nowhere"], "no prepared data here"),
        (["one", "--steps", "0"], "--steps 0: must be 1 or more"),
        (["one", "not-an-override"], "expected key=value"),
        (["dropout", *ALONE], "only on the layout that trained it: 2 ranks, parallel.vocab=1, train.micro_batch=2"),
    ],
)
def test_bad_input_is_refused_by_name(base: Path, arguments: list[str], told: str, capsys) -> None:
    name, *others = arguments
    assert verify.main([str(base / name), *others]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and told in captured.err and not captured.out


def test_the_last_steps_can_be_asked_for(base: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(base / "one", run)
    assert verify.main([str(run), "--steps", "2", "--last", "--exact"]) == 0
    assert "steps 4 to 6 again from step-00000003" in capsys.readouterr().out
    assert verify.main([str(run), "--steps", "4", "--last"]) == 0
    assert "; fewer than 4 steps were logged after one" in capsys.readouterr().out


def test_exact_losses_can_be_asked_for(base: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(base / "one", run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in records if record["kind"] == "train" and record["step"] == 6)
    last["loss"] += 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert verify.main([str(run)]) == 0
    assert "the logged losses to 1.0e-06 nats" in capsys.readouterr().out
    assert verify.main([str(run), "--exact"]) == 1
    assert "FAIL: step 6: the loss" in capsys.readouterr().out


def test_which_steps_are_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones after the newest checkpoint that has enough: not all thousand that may follow it."""
    monkeypatch.setattr(verification, "read_state", lambda checkpoint: {})

    def planned(*checkpoints: int, steps: int, logged: range) -> tuple[str, list[int]] | None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for step in checkpoints:
            (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        records = [{"kind": "train", "step": step, "seconds": 1.0, "loss": 1.0} for step in logged]
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        run = RunFolder(tmp_path / "run")
        found = verification.choose_replay(run, run.checkpoints(), steps)
        return None if found is None else (found.start.name[-4:], [record.step for record in found.records])

    assert planned(1000, 2000, steps=2, logged=range(10, 2001, 10)) == ("1000", [1010, 1020])
    assert planned(1000, 2000, steps=2, logged=range(10, 2101, 10)) == ("2000", [2010, 2020])
    assert planned(10, 20, 30, steps=9, logged=range(1, 33)) == ("0020", list(range(21, 30)))
    assert planned(20, 30, steps=99, logged=range(1, 33)) == ("0020", list(range(21, 33)))
    assert planned(30, steps=1, logged=range(1, 31)) is None
