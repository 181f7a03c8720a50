"""`train.deterministic`: what is set for a run, and that it changes nothing where bits repeat anyway."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import deterministic as memory

from pretrain import replay as verification
from pretrain import verify
from pretrain.checkpoints import resume
from pretrain.config import load
from pretrain.evaluate import main as evaluate
from pretrain.run_folder import settings_if_any
from pretrain.runtime import ranks as process
from pretrain.runtime.deterministic import CUBLAS, set_deterministic
from pretrain.runtime.ranks import Ranks
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, run_to_end, tiny_config


@pytest.fixture
def as_before() -> Iterator[None]:
    before = dict(os.environ)
    yield
    set_deterministic(False)
    memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(before)


def test_what_is_set_is_set_for_runs_that_ask_for_it(as_before: None) -> None:
    torch.backends.cudnn.benchmark = True
    set_deterministic(False)
    assert torch.backends.cudnn.benchmark and CUBLAS not in os.environ
    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ[CUBLAS] == ":4096:8"
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "what cannot repeat is an error"
    assert not torch.backends.cudnn.benchmark and not memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def check_runs(base: Path) -> list[Any]:
    """A tied decoder on documents, with the setting and without; then what evaluation and verification run under."""
    make_data(base / "data")
    usual = {"data__path": str(base / "data"), "model__tied": True, "model__document_mask": True, "logging__every": 1}
    losses, found = [], []
    for wanted in (False, True):
        cfg = tiny_config(
            run=str(base / str(wanted)), checkpoint__every=3, parallel__zero=1, train__deterministic=wanted, **usual
        )
        losses.append(run_to_end(cfg))
        found.append(torch.are_deterministic_algorithms_enabled())
    assert losses[0] == losses[1]
    process.stop = lambda: None  # a second group in one process is beyond DeepSpeed
    for command in (evaluate, lambda words: verify.main([*words, "--exact"])):
        for wanted in (False, True):
            assert command([str(base / str(wanted))]) == 0
            found.append(torch.are_deterministic_algorithms_enabled())
    return found


def test_runs_evaluation_and_verification_follow_the_setting(tmp_path: Path) -> None:
    assert run_ranks(check_runs, 1, tmp_path, base=tmp_path) == [[False, True] * 3]


def test_exact_says_whose_bits_are_promised() -> None:
    gpu, cpu = (Ranks(0, 1, 0, 1, torch.device(device)) for device in ("cuda", "cpu"))
    for train, told in (({}, True), ({"deterministic": False}, True), ({"deterministic": True}, False)):
        said = verification._unpromised({"config": {"train": train}}, gpu)
        assert ("bits are only promised to a run with train.deterministic=true" in said) == told
        assert verification._unpromised({"config": {"train": train}}, cpu) == ""


def test_neither_setting_keeps_a_run_from_going_on() -> None:
    changed = tiny_config(train__deterministic=True, parallel__backend="gloo")
    assert resume.identity(changed, "", "") == resume.identity(tiny_config(), "", "")


def test_the_settings_of_a_run_are_known_before_ranks_meet(tmp_path: Path) -> None:
    assert settings_if_any(tmp_path) is None
    from pretrain.config import dump

    (tmp_path / "config.yaml").write_text(dump(tiny_config()))
    assert settings_if_any(tmp_path) == load(tmp_path / "config.yaml")
    found = settings_if_any(tmp_path, ["train.deterministic=true"])
    assert found is not None and found.train.deterministic
