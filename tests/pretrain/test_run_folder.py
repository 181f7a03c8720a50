"""A run folder as an object: what it holds, what it refuses, and the model that it opens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from pretrain.records import KINDS, Counters, Eval, Phase, Record, Save, Train, from_plain
from pretrain.run_folder import RunFolder, settings_if_any
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, run_to_end, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("run-folder")
    make_data(base / "data")
    cfg = tiny_config(
        run=str(base / "run"), data__path=str(base / "data"), train__steps=4, checkpoint__every=2, logging__every=2
    )
    run_ranks(run_to_end, 1, base, cfg=cfg)
    return base / "run"


def test_names_in_it_are_those_that_users_and_older_runs_know(trained: Path) -> None:
    run = RunFolder(trained)
    written = [run.config, run.metrics, run.checkpoints_folder]
    later = [run.exit_record, run.interpreted, run.measured, run.documents("test", Path("step-00000004"))]
    assert [path.relative_to(trained).as_posix() for path in written] == ["config.yaml", "metrics.jsonl", "checkpoints"]
    assert [path.name for path in later] == [
        "exit.json",
        "interpret.json",
        "measured.json",
        "documents-test-step-00000004.npz",
    ]
    assert all(path.exists() for path in written) and {path.parent for path in later} == {trained}


def test_records_are_read_as_they_were_written(trained: Path) -> None:
    run = RunFolder(trained)
    records = run.records(Record)
    assert [type(record).kind for record in records].count("train") == 2
    assert [record.line() for record in records] == run.metrics.read_text().splitlines()
    assert {type(record) for record in records} == {Train, Eval, Save, Counters}
    assert run.records(Phase) == [record for record in records if not isinstance(record, Counters)]
    assert [record.step for record in run.records(Train)] == [2, 4]


def test_fields_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.records(Record) == [], "it left none"
    run.metrics.write_text('{"kind": "train", "step": 2, "seconds": 1.0, "loss": 2.0, "of a later version": 1}\n')
    assert [record.loss for record in run.records(Train)] == [2.0]


def test_every_kind_of_record_survives_its_line() -> None:
    for record in (
        Train(step=1, seconds=0.5, loss=2.0, tokens_by_source={"a": 3}, losses=[2.0, None], gpu_j=1.5),
        Eval(step=1, seconds=0.5, loss=None, bits_per_byte=1.0, text_sha256="a"),
        Save(step=1, seconds=0.5, bytes=3, stall_s=0.1),
        Counters(step=0, measured=["gpu"], missing={"cpu": "none"}),
    ):
        line = json.loads(record.line())
        assert list(line)[:2] == ["kind", "step"] and from_plain(line) == record
    assert {model.kind for model in KINDS.values()} == {"train", "eval", "save", "counters"}


def test_a_run_is_found_by_its_folder_or_a_checkpoint_of_it(trained: Path, tmp_path: Path) -> None:
    run = RunFolder.containing(trained)
    older, newest = run.checkpoints()
    assert run.path == trained.resolve() and RunFolder.containing(older) == run
    assert run.checkpoint() == newest and run.checkpoint(older) == older and run.checkpoint(trained) == newest
    assert run.settings(["train.steps=9"]).train.steps == 9
    assert settings_if_any(tmp_path) is None
    with pytest.raises(ConfigError, match="neither a run folder nor a checkpoint of one"):
        RunFolder.containing(tmp_path)
    for name in ("config.yaml", "metrics.jsonl"):  # neither alone is enough
        with pytest.raises(ConfigError, match="not a run folder"):
            RunFolder.trained(tmp_path)
        (tmp_path / name).touch()
    assert RunFolder.trained(tmp_path) == RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="there is no checkpoint in it yet"):
        RunFolder(tmp_path).checkpoint()


def test_the_model_that_a_run_opens_scores_as_its_last_evaluation(trained: Path) -> None:
    model = RunFolder(trained).open_model()
    assert model.step == 4 and model.decoder.training is False
    older = RunFolder(trained).open_model(RunFolder(trained).checkpoints()[0], precision="float32")
    assert older.step == 2 and not torch.equal(older.head.prototypes, model.head.prototypes)


def test_how_a_job_ended_is_none_until_it_tells(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.exit() is None
    run.exit_record.write_text('{"code": "0"}')
    assert run.exit() is None, "no record"
    run.exit_record.write_text('{"job": "j", "code": 75, "reason": "stopped", "step": 3}')
    ended = run.exit()
    assert ended is not None and (ended.code, ended.step) == (75, 3)


def test_looking_at_a_folder_needs_no_torch() -> None:
    code = "import sys; from pretrain.run_folder import RunFolder; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
