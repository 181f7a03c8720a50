"""The head on a GPU: its loss and gradients by the Triton kernels, and what the log says where they cannot serve.

How these tests run without a GPU: test_gpu_kernels.py.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from model.harmonic import harmonic_log_probs, harmonic_loss
from model.kernels import choose, eager
from model.reference import harmonic_loss_reference
from tests.support.checks import assert_no_worse
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, needs_gpu, on_gpu, runs
from tests.support.variants import PRODUCTS, VARIANTS, loss_and_gradients, params_of

if CUDA or INTERPRETED:
    from model.kernels import gpu, triton_fused

    SMALL_TILE = triton_fused.Tile(16, 32, 16, 4, 2)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy, of 0 / 0 and log 0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of this test's device run through gpu.py, wherever they ask for their kernels."""
    if INTERPRETED:
        monkeypatch.setattr(choose, "_for_cpu", lambda dtype: gpu)


@runs
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_harmonic_loss(variant: str, fused: bool, served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gumbel" in variant and CUDA:
        pytest.skip("the reference draws its noise on the CPU")
    n, v, d = (6, 37, 9) if INTERPRETED else (200, 501, 65)
    if fused:
        if variant not in PRODUCTS:
            pytest.skip("this distance is no product")
        d = 4 * d
        monkeypatch.setattr(gpu, "fused_unavailable", lambda x: None if triton_fused.serves(x) else "the width")
        for name, value in (("TILES", [SMALL_TILE]), ("WITH_MOMENT", SMALL_TILE)):
            monkeypatch.setattr(triton_fused, name, value)
    scores = triton_fused.scores
    calls = []

    def noted(*given: Any) -> Any:
        calls.append(given)
        return scores(*given)

    monkeypatch.setattr(triton_fused, "scores", noted)
    x, w = torch.randn(n, d, device=DEVICE), torch.randn(v, d, device=DEVICE)
    y = torch.randint(0, v, (n,), device=DEVICE)
    y[2] = -100

    def run(loss: Any, x: Tensor, w: Tensor) -> list[Tensor]:
        tensors = {name: value for name, value in params_of(variant, d).items() if isinstance(value, Tensor)}
        on_device = {name: value.detach().to(DEVICE).requires_grad_() for name, value in tensors.items()}
        return loss_and_gradients(lambda x, w, **p: loss(x, w, y, **p), x, w, variant, 6.0, **on_device)

    def fast_loss(*given: Any, **params: Any) -> Tensor:
        return harmonic_loss(*given, reduction="none", chunk_bytes=50_000, fused=fused, **params)

    fast = run(fast_loss, x, w)
    assert (len(calls) > 1) == fused
    truth = run(harmonic_loss_reference, x.double(), w.double())
    monkeypatch.setattr(choose, "_for_cpu", lambda dtype: eager)
    monkeypatch.setattr(choose, "_for_gpu", lambda device: eager)
    plain = run(fast_loss, x, w)
    for triple in zip(fast, plain, truth, strict=True):
        assert_no_worse(*triple, slack=1e-5)


@runs
def test_edges(served: None) -> None:
    x, w, y = torch.randn(4, 3, device=DEVICE), torch.randn(1, 3, device=DEVICE), torch.zeros(4, device=DEVICE).long()
    for distance in ("euclidean", "manhattan", "dot"):
        hidden, rows = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = harmonic_loss(hidden, rows, y, distance=distance, exponent=2.0)
        loss.backward()
        assert loss == 0 and (hidden.grad == 0).all() and (rows.grad == 0).all(), "with one prototype p is 1"
        empty = harmonic_loss(x[:0].requires_grad_(), rows, y[:0], distance=distance, exponent=2.0)
        empty.backward()
        assert empty == 0
    for distance in ("euclidean", "cosine", "manhattan"):
        expected = None
        for tokens in (x, x.t().contiguous().t()):
            hidden = tokens.detach().requires_grad_()
            harmonic_loss(hidden, torch.ones(7, 3, device=DEVICE), y, distance=distance, exponent=2.0).backward()
            expected = hidden.grad if expected is None else expected
            torch.testing.assert_close(hidden.grad, expected)
    log_probs = harmonic_log_probs(x, torch.randn(7, 3, device=DEVICE), exponent=3.0)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(4, device=DEVICE))


def test_without_triton_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import model.kernels

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("gpu", "triton_scores", "triton_elementwise"):
        monkeypatch.delitem(sys.modules, f"model.kernels.{name}", raising=False)
        monkeypatch.delattr(model.kernels, name, raising=False)
    choose._say.cache_clear()
    assert choose._for_gpu.__wrapped__(torch.device("cuda", 0)) is eager
    assert "The head runs in plain PyTorch on this GPU" in caplog.text and "triton" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_out_of_memory_does_not_turn_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of them: the next call tries again."""
    from model.kernels import gpu

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "statistics", full)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: torch.ones(1))
    choose._for_gpu.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        choose._for_gpu(torch.device("cuda", 0))
    monkeypatch.setattr(gpu, "statistics", lambda *given: None)
    assert choose._for_gpu(torch.device("cuda", 0)) is gpu
    choose._for_gpu.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_on_an_older_gpu_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choose._say.cache_clear()
    assert choose._for_gpu.__wrapped__(torch.device("cuda", 0)) is eager
    assert "on this GPU, exact but slower: compute capability 7.5; 8.0 or newer would be faster." in caplog.text


@on_gpu
@needs_gpu
def test_the_gpu_is_served_by_these_kernels() -> None:
    assert choose.kernels_for(torch.zeros(1, device=DEVICE)) is gpu
    assert choose.kernels_for(torch.zeros(1, device=DEVICE, dtype=torch.bfloat16)) is gpu
    assert choose.kernels_for(torch.zeros(1, device=DEVICE, dtype=torch.float64)) is eager


@on_gpu
@needs_gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot", "manhattan"])
def test_bfloat16(distance: str, fused: bool) -> None:
    """At the sizes of tiles as they are, with whatever the device serves."""
    if fused and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the fused kernels are Hopper's")
    n, v, d = 300, 5003, 256
    x, w = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16), torch.randn(v, d, device=DEVICE)
    w = w.bfloat16().float()
    y = torch.randint(0, v, (n,), device=DEVICE)

    def run(loss: Any, x: Tensor, w: Tensor) -> list[Tensor]:
        return loss_and_gradients(lambda x, w, **p: loss(x, w, y, **p), x, w, distance, 6.0)

    fast = run(lambda *a, **p: harmonic_loss(*a, reduction="none", fused=fused, **p), x, w)
    truth = run(harmonic_loss_reference, x.double(), w.double())
    for found, expected, bound in zip(fast, truth, (1e-3, 2e-2, 2e-2, 2e-2), strict=True):
        assert (found - expected).norm() <= bound * expected.norm()


@on_gpu
@needs_gpu
def test_side_stream() -> None:
    x, w, y = (t.to(DEVICE) for t in (torch.randn(64, 48), torch.randn(999, 48), torch.randint(0, 999, (64,))))
    for distance in ("euclidean", "manhattan"):
        expected = harmonic_loss(x, w, y, distance=distance, exponent=4.0)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # work on another stream would be done before this
            late = x.zero_().add_(1)
            found = harmonic_loss(late, w, y, distance=distance, exponent=4.0)
        torch.cuda.synchronize()
        ones = harmonic_loss(torch.ones_like(x), w, y, distance=distance, exponent=4.0)
        torch.testing.assert_close(found, ones)
        assert (ones - expected).abs() > 1e-3
        x.normal_()


@on_gpu
@needs_gpu
def test_torch_compile() -> None:
    x, w, y = (t.to(DEVICE) for t in (torch.randn(64, 48), torch.randn(999, 48), torch.randint(0, 999, (64,))))

    def step(x: Tensor, w: Tensor) -> Tensor:
        return harmonic_loss(x * 2, w, y, exponent=4.0) + 1

    results = []
    for function in (step, torch.compile(step)):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
