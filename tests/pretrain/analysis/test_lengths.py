"""Lengths of prototypes and hidden states over training: the same for every layout, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.head import HarmonicHead
from pretrain.analysis import lengths
from pretrain.analysis.summary import summarise
from pretrain.analysis.tables import table_of
from pretrain.records import Lengths
from pretrain.report import main
from pretrain.run_folder import RunFolder
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, run_to_end, tiny_config

EVERY: dict[str, Any] = {"train__steps": 6, "evaluation__every": 2, "logging__every": 2, "train__tokens_per_step": 72}


def records(*values: tuple[int, float | None]) -> list[Lengths]:
    return [Lengths(step=step, prototypes_median=length, prototypes_p95=length) for step, length in values]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_slope_is_the_power_of_growth(power: float) -> None:
    found = lengths.growth(records(*((step, 3.0 * max(step, 1) ** power) for step in range(0, 101, 10))))
    assert found["prototypes"]["slope"] == pytest.approx(power)
    assert list(found["prototypes"]["median"]) == [str(step) for step in range(0, 101, 10)]
    assert found["hidden"] == {"median": {}, "p95": {}, "slope": None}


def test_growth_that_stops_is_seen_in_the_last_half_alone() -> None:
    stopped = records(*((step, min(step, 50) / 50) for step in range(5, 101, 5)))
    assert lengths.growth(stopped)["prototypes"]["slope"] == pytest.approx(0.0)
    few = records((0, 1.0), (40, 2.0), (90, 3.0), (100, 4.0))
    assert lengths.growth(few)["prototypes"]["slope"] is None, "two points are no slope"
    again = lengths.growth(records((0, 1.0), (2, None), (4, 5.0), (4, 6.0)))["prototypes"]
    assert again == {"median": {"0": 1.0, "4": 6.0}, "p95": {"0": 1.0, "4": 6.0}, "slope": None}
    assert lengths.growth([])["prototypes"] == {"median": {}, "p95": {}, "slope": None}


def test_what_is_not_finite_is_none() -> None:
    head = HarmonicHead(5, 3, seed=0)
    expected = np.quantile(head.prototypes.detach().double().norm(dim=1).numpy(), [0.5, 0.95])
    assert list(lengths.of_prototypes(head).values()) == pytest.approx(expected.tolist(), rel=1e-6)
    with torch.no_grad():
        head.prototypes[2] = torch.nan
    assert lengths.of_prototypes(head) == {"prototypes_median": None, "prototypes_p95": None}


def train(base: Path, name: str, **changes: Any) -> None:
    run_to_end(tiny_config(run=str(base / name), data__path=str(base / "data"), **EVERY, **changes))


def check_both(base: Path) -> None:
    train(base, "whole", parallel__vocab=1, train__micro_batch=3, logging__tensorboard=True)
    train(base, "sharded", parallel__vocab=3, parallel__zero=3, train__micro_batch=1)


def test_a_run_records_them_whatever_its_layout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_both, 3, tmp_path, base=tmp_path)
    found = {name: RunFolder(tmp_path / name).records(Lengths) for name in ("whole", "sharded")}
    assert all([record.step for record in one] == [0, 2, 4, 6] for one in found.values())
    assert found["sharded"][0].prototypes_median == pytest.approx(found["whole"][0].prototypes_median, rel=1e-6)
    for a, b in zip(found["sharded"][1:], found["whole"][1:], strict=True):
        assert a.values() == pytest.approx(b.values(), rel=1e-4)
    cfg = RunFolder(tmp_path / "whole").settings()
    model = RunFolder(tmp_path / "whole").open_model()
    last = np.quantile(model.head.prototypes.detach().double().norm(dim=1).numpy(), [0.5, 0.95])
    record = found["whole"][-1]
    assert [record.prototypes_median, record.prototypes_p95] == pytest.approx(last.tolist(), rel=1e-6)
    assert found["whole"][0].prototypes_median == pytest.approx(1.0, rel=0.1) and found["whole"][0].hidden_p95 is None
    from data.shards import open_split
    from pretrain.analysis.interpretation import hidden_states

    states, _ = hidden_states(model, open_split(cfg.data.path, "val"), None)
    expected = np.quantile(states.double().norm(dim=1).numpy(), [0.5, 0.95])
    assert [record.hidden_median, record.hidden_p95] == pytest.approx(expected.tolist(), rel=1e-5)

    summary = summarise(tmp_path / "whole")
    assert list(summary["lengths"]["prototypes"]["median"]) == ["0", "2", "4", "6"]
    assert summary["lengths"]["prototypes"]["slope"] is None, "steps 4 and 6 alone"
    assert main([str(tmp_path / "whole")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{record.prototypes_median:.3g} (step 6)" in told and "final states: median length" in told
    older = {"run": {**summary, "lengths": lengths.growth([])}}
    assert not any("median length" in str(cell) for cell in table_of(older).columns[0].cells)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "whole")).Reload()
    assert [event.step for event in events.Scalars("lengths/prototypes_median")] == [0, 2, 4, 6]
    assert events.Scalars("lengths/hidden_p95")[-1].value == pytest.approx(record.hidden_p95, rel=1e-6)
