"""The fused design of the head, scores kept as rounded E, in its plain form: what holds of it holds of the kernels,
which are compared with this form in test_gpu_kernels.py.

Legend: N tokens, V prototypes, D width, n the exponent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.harmonic import harmonic_loss
from model.head import HarmonicHead
from model.kernels import eager
from model.reference import harmonic_loss_reference
from model.vocab_parallel import shard_of
from tests.support.ranks import run_ranks
from tests.support.variants import PRODUCTS, loss_and_gradients

N, V, D = 24, 601, 32  # more prototypes than share a largest score


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """With targets that are matched, nearly matched and ignored, and rivals that are matched."""
    stream = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, D, generator=stream) for rows in (N, V))
    y = torch.randint(0, V, (N,), generator=stream)
    x[0], x[1], x[2] = w[y[0]], w[y[1]] * (1 + 2**-7), w[(y[2] + 1) % V]
    y[3] = -100
    return x, w, y


def both(variant: str, exponent: float, x: Tensor, w: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    return loss_and_gradients(lambda x, w, **k: harmonic_loss(x, w, y, **options, **k), x, w, variant, exponent)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """E of every chunk that the fused design kept."""
    kept: list[Tensor] = []
    statistics = eager.fused_statistics

    def noted(*given: Any) -> Any:
        sums, scored = statistics(*given)
        kept.extend([scored.kept] if scored else [])
        return sums, scored

    monkeypatch.setattr(eager, "fused_statistics", noted)
    return kept


@pytest.mark.parametrize("exponent", [1.0, 28.0, 300.0, 1536.0])
@pytest.mark.parametrize("variant", PRODUCTS)
def test_against_float64(variant: str, exponent: float, used: list[Tensor]) -> None:
    """About as near as float32 scores are, whatever the exponent; nothing kept overflows or is wider than the
    operands.
    """
    x, w, y = draw()
    exponent = exponent / (2 if variant == "cosine" else 1)
    fast = both(variant, exponent, x, w, y, reduction="sum", fused=True, chunk_bytes=60_000)
    assert len(used) > 1 and all(kept.dtype == x.dtype and kept.max() <= 1 for kept in used)
    plain = both(variant, exponent, x, w, y, reduction="sum", fused=False, chunk_bytes=60_000)
    truth = loss_and_gradients(
        lambda x, w, **k: harmonic_loss_reference(x, w, y, **k).sum(), x.double(), w.double(), variant, exponent
    )
    for near, far, exact in zip(fast, plain, truth, strict=True):
        size = exact.abs().max().clamp_min(1e-30)
        errors = [((one - exact).abs().max() / size).item() for one in (near, far)]
        assert errors[0] <= 1.5 * errors[1] + 2.0**-15 + 2.0**-19 * exponent  # both have the rounding of q


@pytest.mark.parametrize("variant", PRODUCTS)
def test_two_roundings_in_bfloat16(variant: str, used: list[Tensor]) -> None:
    """E is rounded, and G: gradients are within half as much again of those that round G alone."""
    x, w, y = draw()
    x, w = x.bfloat16(), w.bfloat16().float()
    fast = both(variant, 12.0, x, w, y, reduction="sum", fused=True)
    assert used and all(kept.dtype == torch.bfloat16 for kept in used)
    plain = both(variant, 12.0, x, w, y, reduction="sum", fused=False)
    truth = loss_and_gradients(
        lambda x, w, **k: harmonic_loss_reference(x, w, y, **k).sum(), x.double(), w.double(), variant, 12.0
    )
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-4)
    for near, far, exact in zip(fast[1:], plain[1:], truth[1:], strict=True):
        allowed = 1.5 * (far - exact).norm() + 2.0**-8 * exact.norm()
        assert (near - exact).norm() <= allowed


@pytest.mark.parametrize("exponent", [28.0, 1536.0])
def test_rivals_far_likelier_than_the_target(exponent: float, used: list[Tensor]) -> None:
    """By more than bfloat16 and float32 can say: 2^127, 2^500."""
    x, w, _ = draw()
    y = torch.arange(N) + 300
    x[:8] = w[:8] + 0.3 * x[:8]  # beside a rival in one tile, the target in another
    w[300:308] = -40 * w[:8]
    found = both("euclidean", exponent, x, w, y, reduction="none", fused=True)
    truth = loss_and_gradients(
        lambda x, w, **k: harmonic_loss_reference(x, w, y, **k), x.double(), w.double(), "euclidean", exponent
    )
    assert truth[0][:8].min() > 127 * 0.69, "the case that it is about"
    assert all(part.isfinite().all() for part in found)
    torch.testing.assert_close(found[0], truth[0], rtol=2e-5, atol=1e-3)
    for near, exact in zip(found[1:3], truth[1:3], strict=True):
        assert (near - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("variant", ["euclidean", "cosine", "dot"])
def test_ignored_tokens(variant: str, reduction: str) -> None:
    """Whatever they hold, they touch nobody."""
    x, w, y = draw()
    y[[5, 9]] = -100
    x[5] = 0.5
    harmless = both(variant, 5.5, x, w, y, reduction=reduction, fused=True)
    x[5], x[9, 0] = torch.nan, torch.inf
    found = both(variant, 5.5, x, w, y, reduction=reduction, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(harmless, found, strict=True))
    assert not found[1][[5, 9]].any()


def test_a_learned_exponent_gets_its_gradient() -> None:
    x, w, y = draw()
    grads = []
    for fused in (True, False):
        head = HarmonicHead(V, D, exponent="learned", seed=0, fused=fused)
        head(x, y).backward()
        grads.append(head.log_exponent.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_nan_is_told() -> None:
    x, w, y = draw()
    x[6, 1] = torch.nan
    losses = harmonic_loss(x, w, y, exponent=5.5, reduction="none", fused=True)
    assert losses.isnan().nonzero().flatten().tolist() == [6]


def check_shards(prototypes: int) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x, w, y = draw()
    w, y = w[:prototypes], y.clamp(-100, prototypes - 1)
    whole = both("euclidean", 5.5, x, w, y, reduction="sum", fused=True)
    shard = shard_of(prototypes, torch.distributed.group.WORLD)
    stored = -(-prototypes // world)
    rows = torch.nn.functional.pad(w, (0, 0, 0, world * stored - prototypes))[rank * stored : (rank + 1) * stored]
    own = slice(rank * N // world, (rank + 1) * N // world)
    part = both("euclidean", 5.5, x[own], rows, y[own], reduction="sum", fused=True, shard=shard, chunk_bytes=40_000)
    torch.testing.assert_close(part[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part[1], whole[1][own], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part[2][: shard.real], whole[2][shard.start : shard.stop], rtol=1e-4, atol=1e-5)
    padding = part[2][shard.real :]
    assert len(padding) == stored - shard.real and not padding.any(), "padding gets no gradient"
    assert rank < world - 1 or len(padding), "the last rank has some"


@pytest.mark.parametrize(("world", "prototypes"), [(2, V), (4, V), (4, 9)])  # the last rank of the last has no real one
@pytest.mark.slow
def test_shards_with_padding(world: int, prototypes: int, tmp_path: Path) -> None:
    run_ranks(check_shards, world, tmp_path, prototypes=prototypes)
