"""What fast paths are held to, and whether this machine has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels import cpu


def assert_no_worse(fast: Tensor, plain: Tensor, truth: Tensor, slack: float = 1e-6, least: float = 1e-30) -> None:
    """Not further from float64 than plain PyTorch, but for `slack` of the largest entry (or of `least`)."""
    assert fast.shape == truth.shape and fast.isfinite().all()
    scale = truth.abs().max().clamp_min(least)
    worst = [((near.double() - truth).abs().max() / scale).item() for near in (fast, plain)]
    assert worst[0] <= worst[1] + slack, f"{worst[0]:.2e} from float64, plain PyTorch {worst[1]:.2e}"


def needed(dtype: torch.dtype) -> None:
    """Skips the test where the CPU's kernels cannot serve tensors of `dtype`."""
    try:
        cpu.require(dtype)
    except cpu.Unavailable as error:
        pytest.skip(str(error))
