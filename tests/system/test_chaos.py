"""The benchmark that kills runs, with few kills; and that its judge sees what it is there to see."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import damage
from benchmarks.chaos.__main__ import chaos
from benchmarks.chaos.judge import Fault, Watchdog, check_end, compare
from benchmarks.chaos.mutations import mutate_run
from pretrain.checkpoints.folder import LATEST, STATE, name_of
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny import tiny_config


def test_a_killed_run_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """A rank in a checkpoint's draft, one of deepspeed's launchers at a publication, our launcher in a deletion."""
    report = chaos(tmp_path, kills=3, seed=41, damage=True)
    assert report.fault is None, report.fault
    told = {(kill.victim, kill.moment) for kill in report.kills}
    assert told == {("one rank", "draft"), ("deepspeed", "publication"), ("launch", "deletion")}
    assert report.worst == 0.0


def save(folder: Path, step: int) -> Path:
    return write_checkpoint(folder, tiny_config(model__layers=1, model__dim=8), step)


@pytest.mark.parametrize("seed", range(12))
def test_harm_spares_the_last_whole_checkpoint(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    old, new = save(tmp_path, 2), save(tmp_path, 4)
    guard = Watchdog(tmp_path)
    assert guard.whole() == [old, new]
    assert guard.harm(rng) is not None
    assert guard.whole() == [old] and guard.harm(rng) is None
    shutil.rmtree(new)
    new = save(tmp_path, 4)
    assert guard.whole() == [old, new], "saved again, it is judged again"


def test_watchdog_tells_damage_and_loss(tmp_path: Path) -> None:
    old, new = save(tmp_path, 2), save(tmp_path, 4)
    guard = Watchdog(tmp_path)
    guard.whole()
    (old / STATE).write_text("another")
    with pytest.raises(Fault, match="not whole: .*state.json"):
        guard.whole()
    shutil.rmtree(old)
    shutil.rmtree(new)
    save(tmp_path, 2)
    with pytest.raises(Fault, match="was step 4 and is step 2"):
        guard.whole()


def test_the_end_is_checked(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / LATEST).write_text(name_of(2) + "\n")
    check_end(tmp_path, 2)
    with pytest.raises(Fault, match="no checkpoint of the last step 4"):
        check_end(tmp_path, 4)
    save(tmp_path, 4)
    with pytest.raises(Fault, match="`latest` names step-00000002"):
        check_end(tmp_path, 4)
    (tmp_path / LATEST).write_text(name_of(4) + "\n")
    (tmp_path / "draft-old-step-00000000").mkdir()
    with pytest.raises(Fault, match="left over after the end: draft-old-step"):
        check_end(tmp_path, 4)


def run_of(folder: Path, losses: dict[int, float], **first: Any) -> Path:
    """A run folder with train records; `first` changes the first one."""
    folder.mkdir()
    usual = {"kind": "train", "seconds": 1.0, "batch": "a", "lr": 1.0}
    records = [{**usual, "step": step, "loss": loss, "tokens": step} for step, loss in losses.items()]
    records[0] |= first
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize(
    ("losses", "first", "told"),
    [
        ({1: 3.0, 2: 2.1, 3: 1.0}, {}, "step 2: loss is 2.1, undisturbed 2.0"),
        ({1: 3.0, 3: 1.0}, {}, "1, 3"),
        ({1: 3.0, 2: 2.0, 3: 1.0}, {"batch": "b"}, "step 1: batch"),
        ({1: 3.0, 2: 2.0, 3: 1.0}, {"lr": 1.000001}, "step 1: lr"),
    ],
)
def test_comparison_names_the_first_difference(
    tmp_path: Path, losses: dict[int, float], first: dict[str, Any], told: str
) -> None:
    whole = run_of(tmp_path / "whole", {1: 3.0, 2: 2.0, 3: 1.0})
    near = run_of(tmp_path / "near", {1: 3.0, 2: 2.0 + 1e-5, 3: 1.0})
    assert compare(whole, near, 3, tolerance=2e-5) == pytest.approx(1e-5)
    with pytest.raises(Fault, match="step 2: loss"):
        compare(whole, near, 3, tolerance=0.0)
    with pytest.raises(Fault, match=told):
        compare(whole, run_of(tmp_path / "other", losses, **first), 3, tolerance=2e-5)


def ended(code: int, out: str = "", error: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(["x"], code, out, error)


def test_what_a_mutated_copy_led_to_is_judged(tmp_path: Path) -> None:
    judge = damage.Damage.__new__(damage.Damage)
    judge.truths = {"sample": {damage.NEWER: "new", damage.OLDER: "old"}, "verify": {damage.NEWER: "PASS: 2"}}
    warned = f"not going on from {name_of(damage.NEWER)}: why"
    cases = [
        ("sample", ended(0, "new"), damage.RIGHT),
        ("sample", ended(0, "old", warned), damage.OLD),
        ("sample", ended(0, "old"), damage.SILENT),
        ("sample", ended(2, error="error: why"), damage.REFUSED),
        ("sample", ended(2), damage.TRACEBACK),
        ("sample", ended(1, error="Traceback (most recent call last):\n..."), damage.TRACEBACK),
        ("sample", ended(-11), damage.TRACEBACK),
        ("sample", None, damage.HANG),
        ("verify", ended(1, "FAIL: why"), damage.REFUSED),
        ("verify", ended(0, "PASS: 1"), damage.SILENT),
    ]
    for command, done, expected in cases:
        assert judge._judge(command, done, tmp_path, believed=False) == expected, done
    assert judge._judge("sample", ended(0, "other"), tmp_path, believed=True) == damage.TAKEN
    left_out = ended(0, "other", "metrics.jsonl, line 2: no record")
    assert judge._judge("sample", left_out, tmp_path, believed=False) == damage.TAKEN


def test_everything_in_a_run_folder_can_be_mutated(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", 2)
    (tmp_path / "run" / "checkpoints" / LATEST).write_text(name_of(2))
    (tmp_path / "run" / "config.yaml").write_text("run: run\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "losses": [1.0]}\n' * 3)
    told = set()
    for seed in range(120):
        run = shutil.copytree(tmp_path / "run", tmp_path / str(seed))
        told.add(mutate_run(run, random.Random(seed)).split()[1].rstrip(":"))
    assert told == {"config.yaml", "metrics.jsonl", "exit.json", "checkpoints", f"checkpoints/{LATEST}"}
