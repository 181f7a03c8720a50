"""Records, their copy in TensorBoard, the progress line, and the report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from common.errors import ConfigError
from common.units import clock
from pretrain.analysis.summary import summarise
from pretrain.config import dump
from pretrain.recorder import Recorder, peak_flops
from pretrain.records import Eval, Record, Train
from pretrain.report import main
from pretrain.run_folder import RunFolder
from tests.support.records import read_records
from tests.support.tiny import make_data, tiny_config

VALUES: dict[str, Any] = {
    "loss": 2.5, "loss_mean": 2.75, "tokens": 64, "lr": 1e-3, "grad_norm": 3.0, "grad_norm_clipped": 1.0, "skipped": 0,
    "seconds": 2.0, "tokens_per_s": 32.0, "data_wait_s": 0.1, "gpu_j": None, "gpu_j_per_token": None, "mfu": None,
}  # fmt: skip


def train(step: int, **changes: Any) -> Train:
    return Train(step=step, **{**VALUES, **changes})


def test_what_is_recorded_is_read_again_and_told_on_a_line(tmp_path: Path) -> None:
    out = io.StringIO()
    recorder = Recorder(RunFolder(tmp_path), 0, 10, tensorboard=True, console=Console(file=out, width=200))
    recorder.record(train(2))
    recorder.progress(train(2), 75.0)
    recorder.progress(train(4, gpu_j_per_token=0.002, mfu=0.41, skipped=1), 3700.0)
    recorder.close()
    (line,) = read_records(tmp_path)
    assert line == {"kind": "train", "step": 2, **dict.fromkeys(line.keys() - {"kind", "step"}), **VALUES}
    assert RunFolder(tmp_path).records(Record) == [train(2)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["gpu_j"] is None
    plain, measured = out.getvalue().splitlines()
    assert plain == "step 2/10 loss 2.5000 32 tok/s norm 3.000->1.000 lr 1.00e-03 eta 1:15"
    assert "2.00e-03 J/tok MFU 41.0% skipped 1 eta 1:01:40" in measured

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name, value in VALUES.items() if value is not None}
    assert events.Scalars("train/loss")[0].value == 2.5


def test_a_terminal_gets_a_live_line(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    recorder = Recorder(RunFolder(tmp_path), 0, 10, tensorboard=False, console=console)
    recorder.progress(train(4), 10.0)
    recorder.close()
    assert "4/10 loss 2.5000" in out.getvalue()


def test_records_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    first = Recorder(RunFolder(tmp_path), 0, 10, tensorboard=False)
    for step in (2, 4, 6):
        first.record(train(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    Recorder(RunFolder(tmp_path), 4, 10, tensorboard=False).close()
    assert [record["step"] for record in read_records(tmp_path)] == [2, 4]


def test_a_report_adds_up_what_was_recorded(tmp_path: Path, capsys) -> None:
    make_data(tmp_path / "data")
    cfg = tiny_config(run=str(tmp_path / "run"), data__path=str(tmp_path / "data"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(cfg))
    recorder = Recorder(RunFolder(tmp_path / "run"), 0, 5, tensorboard=False)
    recorder.record(train(1, gpu_j=4.0))
    recorder.record(train(2, gpu_j=6.0, tokens=128, skipped=1))
    held_out = Eval(step=2, loss=2.0, perplexity=7.4, bits_per_byte=1.5, tokens=9, text_bytes=20, seconds=1.0)
    recorder.record(held_out)
    recorder.close()
    found = summarise(tmp_path / "run")
    assert found["tokens_per_s"] == 32.0 and found["skipped"] == 1 and found["perplexity"] == 7.4
    assert found["gpu_j"] == {"train": 10.0, "eval": None, "save": None}
    assert found["gpu_j_per_token"] == pytest.approx(10 / 128)
    assert main([str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "1.5000" in told and "not measured: no energy counter" in told and "10 J" in told
    assert main([str(tmp_path)]) == 2 and "not a run folder" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        summarise(tmp_path / "nowhere")


def test_clocks_are_read_as_people_write_them_and_a_cpu_has_no_peak() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
    assert peak_flops(torch.device("cpu")) is None
