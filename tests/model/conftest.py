"""Fixtures that several files of this folder ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.kernels import choose, eager
from tests.model.checks import needed


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
