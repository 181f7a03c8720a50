"""Options of loss and scores, and scores that are linear, by the Triton kernels: against float64 and the plain form.

How these tests run without a GPU: test_gpu_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.harmonic import harmonic_loss
from model.kernels import choose, eager
from model.reference import harmonic_loss_reference
from tests.support.checks import assert_no_worse
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, runs
from tests.support.variants import OPTIONS, SOFTMAX, loss_and_gradients, params_of, with_options

if CUDA or INTERPRETED:
    from model.kernels import gpu, triton_fused

    SMALL_TILE = triton_fused.Tile(16, 32, 16, 4, 2)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy, of 0 / 0 and log 0

APART = [(*case, False) for case in with_options(("euclidean", "cosine", "canberra", *SOFTMAX), ["all"])]
APART += [(*case, False) for case in with_options(("euclidean", "mahalanobis diagonal"), ["smoothing and z-loss"])]
FUSED = [(variant, "z-loss", True) for variant in ("euclidean", *SOFTMAX)]


@runs
@pytest.mark.parametrize(("variant", "options", "fused"), APART + FUSED)
def test_options(variant: str, options: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(choose, "_for_cpu", lambda dtype: gpu)
    monkeypatch.setattr(gpu, "fused_unavailable", lambda x: None if triton_fused.serves(x) else "the width")
    for name, value in (("TILES", [SMALL_TILE]), ("WITH_MOMENT", SMALL_TILE)):
        monkeypatch.setattr(triton_fused, name, value)
    n, v, d = (6, 37, 8) if INTERPRETED else (200, 501, 64)
    stream = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, d, generator=stream).to(DEVICE) for rows in (n, v))
    y = torch.randint(0, v, (n,), generator=stream).to(DEVICE)
    x[0], y[2] = w[y[0]], -100

    def run(loss: Any, x: Tensor, w: Tensor, **given: Any) -> list[Tensor]:
        tensors = {name: value for name, value in params_of(variant, d).items() if isinstance(value, Tensor)}
        on_device = {name: value.detach().to(DEVICE).requires_grad_() for name, value in tensors.items()}
        given = given | OPTIONS[options]
        return loss_and_gradients(lambda x, w, **p: loss(x, w, y, **given, **p), x, w, variant, 2.5, **on_device)

    given: dict[str, Any] = {"reduction": "none", "chunk_bytes": 50_000, "fused": fused}
    fast, truth = run(harmonic_loss, x, w, **given), run(harmonic_loss_reference, x.double(), w.double())
    monkeypatch.setattr(choose, "_for_cpu", lambda dtype: eager)
    monkeypatch.setattr(choose, "_for_gpu", lambda device: eager)
    for triple in zip(fast, run(harmonic_loss, x, w, **given), truth, strict=True):
        assert_no_worse(*triple, slack=1e-5)
