"""What fast paths are held to, whether this machine has them, what they allocate; and damage."""

from __future__ import annotations

from pathlib import Path

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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most values that any one result of a torch operation has had."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result
