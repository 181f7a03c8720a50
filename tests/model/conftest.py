"""Fixtures that several files of this folder ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.tokenizer import train
from model.kernels import choose, eager
from tests.support.checks import needed


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["kernels", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With this CPU's kernels, and in plain PyTorch as where there are none."""
    if request.param == "kernels":
        needed(torch.float32)
    else:
        monkeypatch.setattr(choose, "_for_cpu", lambda dtype: eager)
    yield request.param


@pytest.fixture(scope="session")
def modules_place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("modules"))  # one for all: a package has one place in a process


@pytest.fixture
def own_modules(modules_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of folders is copied to a place of its own, not to the user's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules_place)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train(["the café is 42 naïve blanks   apart\n\tand aaaa aaa aa", "a harmonic loss, one prototype"], 310, path)
    return path
