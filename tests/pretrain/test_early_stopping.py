"""Evaluations that no longer improve end a run, well; the best checkpoint stays, over a resume too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from pretrain.analysis.scoring import Evaluation
from pretrain.checkpoints import folder as checkpoint
from pretrain.config import RunConfig, check_data
from pretrain.decisions import Outcome
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, opened, tiny_config

LOSSES = [9.0, 8.0, 7.0, 7.5, 7.2, 7.1, 7.3, 6.0]  # after each step


def config(base: Path, **changes: Any) -> RunConfig:
    usual = {"run": str(base / "run"), "data__path": str(base / "data"), "train__steps": len(LOSSES)}
    evaluation = {"evaluation__every": 1, "evaluation__patience": 3}
    kept = {"checkpoint__every": 1, "checkpoint__keep": 2, "checkpoint__keep_best": True}
    return tiny_config(**{**usual, **evaluation, **kept, "logging__every": 1, "train__micro_batch": 2, **changes})


def outcome_of(cfg: RunConfig) -> Outcome:
    """Trains with the losses that this file says."""
    from pretrain import loop

    with opened(cfg) as run, pytest.MonkeyPatch.context() as patch:

        def scripted(*_: object) -> Evaluation:
            ones = np.ones(1, dtype=np.int64)
            return Evaluation(np.array([LOSSES[run.progress.step - 1]]), ones, ones, ones)

        patch.setattr(loop, "evaluate", scripted)
        return run.train()


def kept(base: Path, run: str = "run") -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(base / run / "checkpoints")]


def evaluated(base: Path) -> list[int]:
    return [record["step"] for record in read_records(base / "run") if record["kind"] == "eval"]


def check_stop(base: Path) -> None:
    from torch.distributed import barrier, get_rank

    told = "stopped early at step 6: no evaluation was better than that of step 3 since"
    assert outcome_of(config(base)) == Outcome(0, told, 6)
    assert kept(base) == [3, 5, 6] and evaluated(base) == [1, 2, 3, 4, 5, 6]
    again = outcome_of(config(base))
    assert again == Outcome(0, told, 6) and evaluated(base) == [1, 2, 3, 4, 5, 6], "nothing is trained or scored again"

    barrier()
    if get_rank() == 0:  # killed after the checkpoint of step 5 was written
        shutil.rmtree(base / "run" / "checkpoints" / checkpoint.name_of(6))
    barrier()
    assert outcome_of(config(base)) == Outcome(0, told, 6), "what was counted before a resume still counts"
    assert kept(base) == [3, 5, 6], "and the best stays"

    patient = outcome_of(config(base, evaluation__patience=5))
    assert patient == Outcome(0, "done", 8)
    assert kept(base) == [7, 8] and evaluated(base)[-1] == 8, "the best is now the last"

    rarely = config(base, run=str(base / "rarely"), checkpoint__every=100, checkpoint__keep=1)
    assert outcome_of(rarely).step == 6 and kept(base, "rarely") == [3, 6], "the step that ends the run is saved"


@pytest.mark.slow
def test_a_run_stops_early_and_keeps_the_best_over_resumes(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_stop, 2, tmp_path, base=tmp_path)


def test_patience_needs_periodic_evaluations() -> None:
    with pytest.raises(ConfigError, match="evaluation: patience=3 counts periodic evaluations: set every too"):
        tiny_config(evaluation__patience=3)


def test_a_held_out_split_without_a_window_is_refused_before_training(tmp_path: Path) -> None:
    make_data(tmp_path / "data", val_tokens=5)
    with pytest.raises(ConfigError, match="the val split in .* has 6 tokens, fewer than one window"):
        check_data(tiny_config(data__path=str(tmp_path / "data")))
