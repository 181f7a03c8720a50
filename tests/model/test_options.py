"""Label smoothing, z-loss and soft caps: exact for every distance that takes them, on every path.

Legend: N tokens, V prototypes, D width, n the exponent, lse the log-sum-exp of the scores.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from model.config import HeadConfig
from model.distances import DISTANCES
from model.harmonic import harmonic_log_probs, harmonic_loss, harmonic_predictions
from model.head import HarmonicHead
from model.kernels import choose, cpu, eager
from model.kernels.eager import Given
from model.reference import harmonic_loss_reference, scores_reference
from model.vocab_parallel import rows_of, shard_of
from tests.support.checks import Largest, needed
from tests.support.ranks import run_ranks
from tests.support.variants import (
    LENGTHS,
    OPTIONS,
    PRODUCTS,
    SOFTMAX,
    VARIANTS,
    distance_of,
    loss_and_gradients,
    params_of,
    with_options,
)

N, V, D, EXPONENT = 13, 37, 8, 3.3
COMBINED = with_options(VARIANTS, ["all", "smoothing and z-loss"])
CASES = [(torch.float32, *case) for case in with_options(VARIANTS)]
CASES += [(dtype, *case) for dtype in (torch.float64, torch.bfloat16) for case in COMBINED]


def draw(v: int = V, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """With a token on its prototype, one on another's, and ignored ones."""
    stream = torch.Generator().manual_seed(v)
    x, w = torch.randn(n, D, generator=stream), torch.randn(v, D, generator=stream)
    y = torch.randint(0, v, (n,), generator=stream)
    x[0], x[1] = w[y[0]], w[(y[1] + 1) % v]
    y[[2, 7]] = -100
    return x, w, y


def fast(y: Tensor, **options: Any) -> Any:
    return lambda x, w, **params: harmonic_loss(x, w, y, **options, **params)


def truth(y: Tensor, **options: Any) -> Any:
    return lambda x, w, **params: harmonic_loss_reference(x, w, y, **options, **params)


@pytest.mark.parametrize(("dtype", "variant", "options"), CASES, ids=str)
def test_equals_reference(dtype: torch.dtype, variant: str, options: str, path: str) -> None:
    """Losses and every gradient, in several chunks; the budget is that of the same loss without options."""
    if dtype == torch.float64 and path == "kernels":
        return  # which it has none of
    x, w, y = draw()
    x = x.to(dtype)
    w = w.to(dtype).to(eager.accumulator(dtype))
    upstream = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = []
    for given in ({}, OPTIONS[options]):
        expected = loss_and_gradients(truth(y, **given), x.double(), w.double(), variant, EXPONENT, upstream)
        call = fast(y, reduction="none", chunk_bytes=4000, **given)
        found = loss_and_gradients(call, x, w, variant, EXPONENT, upstream)
        sizes = [e.abs().max().clamp_min(0.05) for e in expected]
        errors.append([((f - e).abs().max() / s).item() for f, e, s in zip(found, expected, sizes, strict=True)])
    last_digits = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for plain, shaped in zip(*errors, strict=True):
        assert shaped <= 4 * plain + last_digits


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("variant", "options"), COMBINED)
def test_reductions_ignored_targets_and_chunking_agree(variant: str, options: str, reduction: str) -> None:
    x, w, y = (t.double() if t.is_floating_point() else t for t in draw())
    given, count = OPTIONS[options], N - 2 if reduction == "mean" else 1
    expected = loss_and_gradients(lambda *a, **k: truth(y, **given)(*a, **k).sum() / count, x, w, variant, EXPONENT)
    for chunk_bytes in (1, 2**30):
        call = fast(y, reduction=reduction, chunk_bytes=chunk_bytes, **given)
        found = loss_and_gradients(lambda *a, call=call, **k: call(*a, **k).sum(), x, w, variant, EXPONENT)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("variant", "options"),
    with_options(("euclidean", "cosine", "canberra", "mahalanobis full", *SOFTMAX), ["all", "smoothing and z-loss"]),
)
def test_finite_differences(variant: str, options: str) -> None:
    """Of float64."""
    x, w, y = (t[3:6] if len(t) == 8 else t for t in draw(6, 8))
    n = torch.tensor(2.5, dtype=torch.float64, requires_grad=variant != "dot")
    params = params_of(variant, D)
    tensors = {name: value for name, value in params.items() if isinstance(value, Tensor)}

    def loss(x: Tensor, w: Tensor, n: Tensor, *factors: Tensor) -> Tensor:
        given = params | dict(zip(tensors, factors, strict=True)) | OPTIONS[options]
        return harmonic_loss(x, w, y, distance=distance_of(variant), exponent=n, reduction="none", **given)

    arguments = (x.double().requires_grad_(), w.double().requires_grad_(), n, *tensors.values())
    assert torch.autograd.gradcheck(loss, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smoothed_products_are_torchs_cross_entropy(reduction: str, path: str) -> None:
    x, w, y = draw()
    sides = [(x.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    found = harmonic_loss(*sides[0], y, distance="dot", reduction=reduction, label_smoothing=0.3)
    expected = F.cross_entropy(sides[1][0] @ sides[1][1].t(), y, reduction=reduction, label_smoothing=0.3)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_softmax_heads_are_what_they_say(path: str) -> None:
    x, w, y = draw()
    cosines = F.normalize(x) @ F.normalize(w).t()
    squares = (x[:, None] - w).square().sum(-1)
    for distance, scores in (("cosine_softmax", 5 * cosines), ("squared_euclidean_softmax", -5 * squares)):
        found = harmonic_loss(x, w, y, distance=distance, exponent=5.0)
        torch.testing.assert_close(found, F.cross_entropy(scores, y), rtol=1e-5, atol=1e-5)
        capped = harmonic_log_probs(x, w, distance=distance, exponent=5.0, soft_cap=2.0)
        torch.testing.assert_close(capped, (2 * (scores / 2).tanh()).log_softmax(1), rtol=1e-5, atol=2e-5)
    rows = torch.stack((torch.zeros(D), w[0])).requires_grad_()
    harmonic_loss(rows, w, torch.tensor([0, 1]), distance="cosine_softmax", exponent=5.0).backward()
    assert rows.grad is not None and not rows.grad[0].any() and rows.grad[1].any(), "zeros have no direction"


@pytest.mark.parametrize("dim", [16, 256])
def test_first_exponents_spread_scores_alike(dim: int) -> None:
    """For features and prototypes of the length that a head asks for."""
    spreads = {}
    for distance in ("euclidean", "squared_euclidean_softmax", "cosine_softmax"):
        head = HarmonicHead(400, dim, distance=distance, seed=0)
        x = torch.randn(100, dim, generator=torch.Generator().manual_seed(1)) / dim**0.5 * head.feature_length
        scores = scores_reference(x, head.prototypes, head.score_function, torch.as_tensor(head.exponent).detach())
        spreads[distance] = scores.std(1).mean().item()
    assert HarmonicHead(3, dim, distance="squared_euclidean_softmax").exponent == dim**0.5 / 4
    expected = math.sqrt(6) / 4  # of every pair; over the prototypes of one token |x| is the same
    assert all(abs(spread / expected - 1) < 0.15 for name, spread in spreads.items() if name != "cosine_softmax")
    assert abs(spreads["cosine_softmax"] - 1) < 0.1


@pytest.mark.parametrize("scale", [1e-18, 0.3, 1e18])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if distance_of(v) in LENGTHS])
def test_a_z_loss_is_in_the_units_given(variant: str, scale: float, path: str) -> None:
    """lse of x and w times a number is lse less n times its logarithm: a long token has its own unit within."""
    x, w, y = draw()
    x[5] *= 1e13
    given = {"distance": distance_of(variant), "exponent": EXPONENT, "reduction": "none"} | params_of(variant, D)
    scaled = (x * scale).requires_grad_(), (w * scale).requires_grad_()
    plain, shaped = (harmonic_loss(*scaled, y, z_loss=z, **given) for z in (0.0, 0.5))
    squares = (shaped - plain).detach().double() / 0.5
    distances = DISTANCES[distance_of(variant)](**params_of(variant, D)).between(x.double()[:, None], w.double()[None])
    lse = (-EXPONENT * distances.log()).logsumexp(1) - EXPONENT * math.log(scale)
    rest = torch.tensor([i for i in range(3, N) if i != 7])  # the others are at the floor, or ignored
    torch.testing.assert_close(squares[rest], lse.detach().square()[rest], rtol=2e-4, atol=1e-3)
    shaped.sum().backward()
    assert all(side.grad is not None and side.grad.isfinite().all() for side in scaled)


def test_a_z_loss_pins_the_scale() -> None:
    """It pulls at a common factor of x and w, which the plain loss does not know: by -2 z n lse for each token."""
    x, w, y = (t[3:7] if len(t) == N else t for t in draw())  # of no token at a floor
    lse = (-EXPONENT * torch.cdist(x.double(), w.double()).log()).logsumexp(1)
    for z in (0.0, 0.1):
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        sides = x.double() * factor, w.double() * factor
        harmonic_loss(*sides, y, exponent=EXPONENT, z_loss=z, reduction="sum").backward()
        assert factor.grad is not None
        assert factor.grad.item() == pytest.approx(-2 * z * EXPONENT * lse.sum().item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("variant", "options"), COMBINED)
def test_edges(variant: str, options: str, path: str) -> None:
    given = OPTIONS[options]
    x, w, _ = draw(1, 8)
    y = torch.zeros(8, dtype=torch.int64)
    alone = loss_and_gradients(fast(y, **(given | {"z_loss": 0.0})), x, w, variant, 2.0)
    assert all(t.abs().max() < 1e-6 for t in alone), "with one prototype p is 1, smoothed or not"
    x, w, y = draw()
    ignored = loss_and_gradients(fast(torch.full_like(y, -100), **given), x, w, variant, 2.0)
    empty = loss_and_gradients(fast(y[:0], **given), x[:0], w, variant, 2.0)
    assert all((t == 0).all() for t in ignored + empty)
    if distance_of(variant) not in ("dot", "squared_euclidean_softmax"):  # whose scores overflow
        for scale in (1e-30, 1e30):
            found = loss_and_gradients(fast(y, **given), x * scale, w * scale, variant, 28.0)
            assert all(t.isfinite().all() for t in found)


def test_a_cap_of_a_cpus_kernels_is_within_two_digits() -> None:
    needed(torch.float32)
    values = torch.cat([torch.linspace(-60, 60, 5000), torch.logspace(-30, 0, 3000), torch.linspace(-4, 4, 3000)])
    none = torch.full(values.shape, -1)
    top, *_, every, _, shares = cpu.statistics(values[:, None].clone(), Given(none, cap=4.0, smooth=True))
    exact = values.double()
    bent = (exact / 4).tanh()
    assert torch.equal(top, every) and ((top - 4 * bent).abs() <= 2.0**-22 * (4 * bent).abs()).all()
    slopes = exact / (exact / 4).cosh().square()
    assert ((shares - slopes).abs() <= 2.0**-18 * slopes.abs() + 1e-37).all()


def check_shards(v: int) -> None:
    """Losses and all gradients of every rank are the whole's; rows of padding, which are no numbers, do not count."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shard, n = shard_of(v, dist.group.WORLD), 4
    x, w, y = draw(v, world * n)
    mine = slice(rank * n, (rank + 1) * n)
    stored = torch.full((rows_of(v, world), D), torch.nan)
    stored[: shard.real] = w[shard.start : shard.stop]
    for variant, name in with_options(
        ("euclidean", "cosine", "canberra", "mahalanobis full", "dot", "cosine_softmax", "squared_euclidean_softmax"),
        ("all", "smoothing and z-loss"),
    ):
        for reduction in ("mean", "none"):
            given = OPTIONS[name] | {"reduction": reduction}
            whole = loss_and_gradients(fast(y, **given), x, w, variant, EXPONENT)
            call = fast(y[mine], shard=shard, chunk_bytes=3000, **given)
            part = loss_and_gradients(call, x[mine], stored, variant, EXPONENT)
            close = {"rtol": 2e-4, "atol": 2e-5}
            torch.testing.assert_close(part[0], whole[0][mine] if reduction == "none" else whole[0], **close)
            factor = world if reduction == "mean" else 1
            torch.testing.assert_close(part[1], whole[1][mine] * factor, **close)
            torch.testing.assert_close(part[2][: shard.real], whole[2][shard.start : shard.stop], **close)
            assert not part[2][shard.real :].any()
            for one, other in zip(part[3:], whole[3:], strict=True):  # of the exponent and the factor
                torch.testing.assert_close(one, other, **close)


def check_all_shards() -> None:
    for v in (V, 1):  # over 3 ranks: some padding, and two of padding alone
        check_shards(v)


def test_sharded_equals_whole(tmp_path: Path) -> None:
    run_ranks(check_all_shards, 3, tmp_path)


@pytest.mark.parametrize("variant", ["euclidean", "canberra", "cosine_softmax"])
def test_nothing_of_size_tokens_by_vocabulary(variant: str, path: str) -> None:
    given = OPTIONS["all" if distance_of(variant) not in LENGTHS else "smoothing and z-loss"]
    v, budget = 700, 2**17
    x, w = torch.randn(600, D), torch.randn(v, D)
    with Largest() as largest:
        loss_and_gradients(fast(torch.zeros(600).long(), chunk_bytes=budget, **given), x, w, variant, 4.0)
    assert (
        largest.values <= max(budget // 4, v * D, 600 * D) or variant == "canberra"
    )  # whose pairs have a size of theirs


def test_options_are_of_training_and_a_cap_of_the_model() -> None:
    x, _, y = draw()
    head = HarmonicHead(V, D, distance="cosine_softmax", exponent=9.0, seed=1, **OPTIONS["all"])
    w, given = head.prototypes, {"distance": "cosine_softmax", "exponent": 9.0}
    trained = harmonic_loss_reference(x, w, y, **given, **OPTIONS["all"])
    likelihood = harmonic_loss_reference(x, w, y, **given, soft_cap=4.0)
    torch.testing.assert_close(head(x, y, reduction="none").double(), trained, rtol=1e-4, atol=1e-5)
    losses, _ = head.score(x, y)
    head.eval()
    for found in (losses, head(x, y, reduction="none")):
        torch.testing.assert_close(found.double(), likelihood, rtol=1e-4, atol=1e-5)
    scores = scores_reference(x, w, "cosine_softmax", 9.0, soft_cap=4.0)
    torch.testing.assert_close(head.log_probs(x).double(), scores.log_softmax(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(head.predict(x), scores.argmax(1))
    assert "label_smoothing=0.1, z_loss=0.05, soft_cap=4" in repr(head)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if distance_of(v) not in LENGTHS])
def test_predictions_with_a_cap(variant: str) -> None:
    x, w, y = draw()
    given = params_of(variant, D) | {"distance": distance_of(variant), "exponent": 1.5, "soft_cap": 4.0}
    losses, predicted = harmonic_predictions(x, w, y, **given)
    assert torch.equal(losses, harmonic_loss(x, w, y, reduction="none", **given))
    scores = scores_reference(x, w, given.pop("distance"), given.pop("exponent"), **given)
    assert (scores.max(1).values - scores.gather(1, predicted[:, None])[:, 0] < 1e-5).all()


@pytest.mark.parametrize("variant", PRODUCTS)
def test_fused_serves_a_z_loss(variant: str) -> None:
    x, w, y = draw()
    one, other = (
        loss_and_gradients(fast(y, z_loss=0.05, fused=fused, reduction="none"), x, w, variant, EXPONENT)
        for fused in (True, False)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


def test_what_the_fused_kernels_cannot_serve_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w, y = draw()
    choose._say_apart.cache_clear()
    for _ in range(2):
        found = harmonic_loss(x, w, y, distance="dot", fused=True, label_smoothing=0.2)
    assert torch.equal(found, harmonic_loss(x, w, y, distance="dot", fused=False, label_smoothing=0.2))
    assert caplog.text.count("apart: with label_smoothing every score counts by itself") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: expected a number from 0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1: expected"),
        ({"label_smoothing": math.nan}, "label_smoothing=nan: expected"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001: expected a number from 0 to 1,000,000"),
        ({"z_loss": math.inf}, "z_loss=inf: expected"),
        ({"soft_cap": 0.0, "distance": "dot"}, "soft_cap=0.0: expected a number from 1e-06 to 1,000,000, or none"),
        ({"soft_cap": math.nan, "distance": "dot"}, "soft_cap=nan: expected"),
        *(
            ({"soft_cap": 30.0, "distance": name}, "soft_cap=30: the distance is a length.*leave soft_cap out, pin the")
            for name in LENGTHS
        ),
    ],
    ids=str,
)
def test_bad_options_are_told_everywhere(given: dict[str, Any], message: str) -> None:
    x, w, y = draw()
    name = next(key for key in given if key != "distance")
    with pytest.raises(ValueError, match=message if "length" in message else name):  # ranges are told by their fields
        HeadConfig(**given)
    with pytest.raises(ValueError, match=message):
        HarmonicHead(V, D, **given)
    params = {"factor": torch.zeros(D)} if given.get("distance") == "mahalanobis" else {}
    for function in (harmonic_loss, harmonic_loss_reference):
        with pytest.raises(ValueError, match=message):
            function(x, w, y, exponent=2.0, **given, **params)
    if "soft_cap" in given:
        with pytest.raises(ValueError, match=message):
            harmonic_predictions(x, w, y, **given, **params)
        with pytest.raises(ValueError, match=message):
            harmonic_log_probs(x, w, **given, **params)
