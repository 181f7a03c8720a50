"""The most probable prototype: exact for every distance, chunk and sharding, and in one pass with the true loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.harmonic import harmonic_loss, harmonic_predictions
from model.head import HarmonicHead
from model.kernels import eager_elementwise
from model.reference import scores_reference
from model.vocab_parallel import rows_of, shard_of
from tests.support.checks import Largest
from tests.support.ranks import run_ranks
from tests.support.variants import VARIANTS, distance_of, params_of

N, V, D = 12, 37, 8


def draw(v: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(v)
    x, w = torch.randn(N, D, generator=stream), torch.randn(v, D, generator=stream)
    y = torch.randint(0, v, (N,), generator=stream)
    y[::5] = -100
    return x, w, y


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_argmax_and_the_loss_for_every_distance(variant: str, dtype: torch.dtype) -> None:
    x, w, y = draw()
    x = x.to(dtype)
    given = params_of(variant, D) | {"distance": distance_of(variant), "exponent": 3.0}
    losses, predictions = harmonic_predictions(x, w, y, **given)
    assert torch.equal(losses, harmonic_loss(x, w, y, reduction="none", **given)) and not losses.requires_grad
    scores = scores_reference(x, w.to(dtype), given.pop("distance"), given.pop("exponent"), **given)
    short = scores.max(1).values - scores.gather(1, predictions[:, None])[:, 0]
    assert (
        short <= 1e-5 if dtype == torch.float32 else short <= 1e-12 if dtype == torch.float64 else short < 0.2
    ).all()
    if dtype != torch.bfloat16:
        assert torch.equal(predictions, scores.argmax(1)), "these draws have no near ties"


@pytest.mark.parametrize("variant", ["euclidean", "manhattan", "dot"])
def test_chunks_change_nothing(variant: str) -> None:
    x, w, y = draw()
    given = {**params_of(variant, D), "distance": distance_of(variant), "exponent": 3.0}
    whole = harmonic_predictions(x, w, y, **given)[1]
    assert torch.equal(harmonic_predictions(x, w, y, chunk_bytes=1, **given)[1], whole)


@pytest.mark.parametrize("variant", ["euclidean", "manhattan", "braycurtis abs", "dot"])
def test_memory_is_bounded_by_the_budget(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of any operation is larger than the budget, however many tokens there are."""
    monkeypatch.setattr(eager_elementwise, "PAIR_VALUES", 2**12)
    v, budget = 400, 64_000
    for n in (50, 800):
        x, w = torch.randn(n, D), torch.randn(v, D)
        given = {**params_of(variant, D), "distance": distance_of(variant), "exponent": 3.0}
        with Largest() as largest:
            harmonic_predictions(x, w, torch.zeros(n, dtype=torch.int64), chunk_bytes=budget, **given)
        assert largest.values <= max(budget // 4, v * D, n * D) < n * v, (n, largest.values)


def check_sharded() -> None:
    """Every rank's predictions are those of the whole vocabulary, of equal prototypes the first."""
    for v in (1, 2, V):
        check_vocabulary(v)


def check_vocabulary(v: int) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    shard = shard_of(v, dist.group.WORLD)
    x, w, y = draw(v)
    if v > 1:
        w[-1] = w[0]
        x[:4] = w[0]
    mine = slice(rank * N // world, (rank + 1) * N // world)
    rows = torch.full((rows_of(v, world), D), torch.nan)  # padding must not count
    rows[: shard.real] = w[shard.start : shard.stop]
    for variant in ("euclidean", "cosine", "canberra", "braycurtis abs", "dot"):
        given = {**params_of(variant, D), "distance": distance_of(variant), "exponent": 3.0}
        losses, predictions = harmonic_predictions(x, w, y, **given)
        found = harmonic_predictions(x[mine], rows, y[mine], shard=shard, chunk_bytes=4000, **given)
        torch.testing.assert_close(found[0], losses[mine], rtol=2e-5, atol=2e-6)
        if variant == "dot":  # products of other shapes round apart, so that which of two equal ones wins is open
            assert torch.equal(w[found[1]], w[predictions[mine]]), v
        else:
            assert torch.equal(found[1], predictions[mine]), (v, variant)
        if v > 1 and variant != "dot":
            assert (predictions[:4] == 0).all(), "the first of equal ones"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.slow
def test_sharded_equals_whole(world: int, tmp_path: Path) -> None:
    run_ranks(check_sharded, world, tmp_path)


def test_the_head_predicts_and_scores() -> None:
    head = HarmonicHead(V, D, seed=1).eval()
    x = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(3))
    expected = head.log_probs(x).argmax(-1)
    assert torch.equal(head.predict(x), expected)
    losses, predictions = head.score(x, expected)
    assert torch.equal(predictions, expected.view(-1)) and torch.equal(losses, head(x, expected, reduction="none"))
    assert head.predict(x[:, :0]).shape == (2, 0)
