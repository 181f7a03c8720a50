"""Where tests of the Triton kernels run: on a GPU as they are, or without one in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from model.distances import RELATIVE_FLOOR
from model.kernels import eager
from model.kernels.eager import Squares
from tests.support.checks import assert_no_worse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")

runs = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a GPU; test_gpu_kernels.py runs it without")
on_gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def draw(size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and the targets' columns: near and exact matches, entries that agree, targets that are elsewhere."""
    m, v, d = size
    x, w = torch.randn(m, d), torch.randn(v, d)
    local = torch.randint(-1, v, (m,))
    x[::3] = w[local.clamp_min(0)][::3] + 0.02 * x[::3]
    x[1::5] = w[local.clamp_min(0)][1::5]
    x[:, :: max(2, d // 3)] = w[v // 2, :: max(2, d // 3)]
    x[-1, -1] = w[0, -1] = 0
    return x.to(DEVICE), w.to(DEVICE), local.to(DEVICE)


def wide(*tensors: Any) -> Any:
    """In float64, with memory of their own."""
    return [t.double() if t.is_floating_point() else t for t in tensors]


def squares_of(x: Tensor, w: Tensor, local: Tensor) -> tuple[Tensor, Squares]:
    """Dot products, and what makes squared distances of them."""
    norms = eager.square_norms(x)
    target = eager.square_norms(x - w[local.clamp_min(0)])
    return x @ w.t(), Squares(norms, eager.square_norms(w), target, RELATIVE_FLOOR * norms + 2.0**-80)


def readable(top: Tensor, total: Tensor, moment: Tensor, *target: Tensor) -> tuple[Tensor, ...]:
    """What does not depend on which number near the max was taken for it."""
    return top + total.log(), moment / total, *target


def check_sums(fast: Any, plain: Any, truth: Any) -> None:
    assert_no_worse(fast[0], plain[0], truth[0])
    for triple in zip(*(readable(*sums) for sums in (fast, plain, truth)), strict=True):
        assert_no_worse(*triple)
