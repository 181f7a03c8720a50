"""Harmonic loss against the float64 reference, for every distance: losses, all gradients, edges, memory."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import scipy.spatial.distance
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import distances
from model.distance_settings import settings_of
from model.distances import DISTANCES, Distance, make
from model.harmonic import harmonic_log_probs, harmonic_loss
from model.head import HarmonicHead
from model.kernels import choose, eager, eager_elementwise
from model.reference import distances_reference, harmonic_loss_reference
from tests.support.checks import Largest, assert_no_worse
from tests.support.variants import (
    HARMONIC,
    PRODUCTS,
    VARIANTS,
    distance_of,
    loss_and_gradients,
    params_of,
)

WIDE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


def draw(n: int, v: int, d: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, d, generator=stream) * scale for rows in (n, v))
    return x, w, torch.randint(0, v, (n,), generator=stream)


def fast(y: Tensor, **options: Any) -> Any:
    return lambda x, w, **params: harmonic_loss(x, w, y, **options, **params)


def truth(y: Tensor) -> Any:
    return lambda x, w, **params: harmonic_loss_reference(x, w, y, **params)


def plain(y: Tensor) -> Any:
    """What a user would write in PyTorch, in the dtype of x: the rounding budget of the fast path."""

    def loss(x: Tensor, w: Tensor, *, distance: str, exponent: Tensor, **params: Any) -> Tensor:
        w, n = w.to(x.dtype), exponent.to(x.dtype)
        if distance == "dot":
            scores = x @ w.t()
        elif distance == "cosine":
            scores = -n * (1 - F.normalize(x) @ F.normalize(w).t()).log()
        elif distance == "euclidean":
            squared = (x * x).sum(1, keepdim=True) + (w * w).sum(1) - 2 * x @ w.t()
            scores = -n / 2 * squared.log()
        else:
            entry = make(DISTANCES[distance], params)
            x = entry.perturb(x, -1 - torch.arange(len(x)))
            w = entry.perturb(w, torch.arange(len(w)))
            scores = -n * entry.between(x[:, None], w[None]).log()
        return F.cross_entropy(scores.to(WIDE[x.dtype]), y, reduction="none")

    return loss


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_reference(variant: str, scale: float, dtype: torch.dtype, path: str) -> None:
    x, w, y = draw(37, 101, 24, scale if DISTANCES[distance_of(variant)].scaled or variant == "cosine" else 1.0)
    x = x.to(dtype)
    w = w.to(dtype).to(WIDE[dtype])
    upstream = torch.rand(37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n = math.sqrt(24)
    expected = loss_and_gradients(truth(y), x.double(), w.double(), variant, n, upstream)
    budget = loss_and_gradients(plain(y), x, w, variant, n, upstream)
    found = loss_and_gradients(fast(y, reduction="none", chunk_bytes=20_000), x, w, variant, n, upstream)
    rounded = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for f, p, t in zip(found, budget, expected, strict=True):
        if f.numel() == 1 and dtype == torch.bfloat16:  # one number: plain torch may be near by chance
            assert_no_worse(f, t, t, slack=5e-3)
        elif p.isfinite().all():
            assert_no_worse(f, p, t, slack=1e-12 if dtype == torch.float64 else 1e-5)
        else:  # powers over- or underflow in the plain formula
            assert_no_worse(f, t, t, slack=rounded)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_ignored_targets_and_chunking_agree(variant: str, reduction: str) -> None:
    x, w, y = (t.double() if t.is_floating_point() else t for t in draw(29, 13, 7))
    y[[0, 5, 28]] = -100
    count = {"mean": 26, "sum": 1, "none": 1}[reduction]
    expected = loss_and_gradients(lambda *a, **k: truth(y)(*a, **k).sum() / count, x, w, variant, 3.0)
    for chunk_bytes in (1, 3_000, 2**30):
        found = loss_and_gradients(
            lambda *a, size=chunk_bytes, **k: fast(y, reduction=reduction, chunk_bytes=size)(*a, **k).sum(),
            x, w, variant, 3.0,
        )  # fmt: skip
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "hamming hard"])  # straight through, on purpose
def test_finite_differences(variant: str) -> None:
    x, w, y = draw(5, 6, 4)
    y[1] = -100
    n = torch.tensor(2.5, dtype=torch.float64, requires_grad=variant != "dot")
    params = params_of(variant, 4)
    tensors = {name: value for name, value in params.items() if isinstance(value, Tensor)}

    def loss(x: Tensor, w: Tensor, n: Tensor, *factors: Tensor) -> Tensor:
        given = params | dict(zip(tensors, factors, strict=True))
        return harmonic_loss(x, w, y, distance=distance_of(variant), exponent=n, reduction="none", **given)

    arguments = (x.double().requires_grad_(), w.double().requires_grad_(), n, *tensors.values())
    assert torch.autograd.gradcheck(loss, arguments)


@pytest.mark.parametrize("exponent", [0.5, 4.0, 28.0, 1536.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", HARMONIC)
def test_at_a_match_the_floor_holds(variant: str, dtype: torch.dtype, exponent: float, path: str) -> None:
    """x == w_y: finite, p_y about 1 for a large exponent, and no gradient from the constant distance of the match."""
    x, w, y = draw(8, 11, 16)
    w = w.to(dtype).to(WIDE[dtype])
    w[7] = w[3]  # two prototypes in one place
    x = w[y].to(dtype)
    found = loss_and_gradients(fast(y, reduction="none"), x, w, variant, exponent)
    expected = loss_and_gradients(truth(y), x.double(), w.double(), variant, exponent)
    assert all(t.isfinite().all() for t in found)
    if dtype == torch.bfloat16 and distance_of(variant) in ("cosine", "mahalanobis"):
        return  # rounding the transformed rows to bfloat16 moves x off w: they are rounded alike, but differ from truth
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for f, e in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance * 5, atol=tolerance * (e.abs().max().item() + 1e-30))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e-6, 1e6, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("variant", HARMONIC)
def test_finite_for_every_finite_input(variant: str, scale: float, path: str) -> None:
    x, w, y = draw(6, 9, 8)
    x, w = (t.clamp(-1, 1) * scale for t in (x, w))
    x[0] = w[y[0]]
    x[1] = -w[y[1]]
    w[3] = w[4]
    x[2] = 0
    w[5] = 0
    x[3, :4] = 0
    found = loss_and_gradients(fast(y, reduction="mean"), x, w, variant, 28.0)
    assert all(t.isfinite().all() for t in found), [t.isfinite().all() for t in found]


SCALE_FREE = [v for v in HARMONIC if not v.startswith("hamming") or v == "hamming hard"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCALE_FREE), st.integers(0, 10_000), st.integers(-40, 40), st.floats(0.5, 64))
def test_scale_invariance(variant: str, seed: int, power: int, exponent: float) -> None:
    x, w, _ = draw(5, 7, 6, seed=seed)
    given = params_of(variant, 6) | {"distance": distance_of(variant), "exponent": exponent}
    once = harmonic_log_probs(x, w, **given)
    scaled = harmonic_log_probs(x * 2.0**power, w * 2.0**power, **given)
    assert torch.equal(once, scaled), "a power of two changes no bit"
    other = harmonic_log_probs(x * 3.7, w * 3.7, **given)
    torch.testing.assert_close(once, other, rtol=1e-5, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(list(VARIANTS)),
    st.integers(1, 9),
    st.integers(2, 40),
    st.integers(3, 33),
    st.floats(0.5, 40),
    st.integers(0, 10_000),
)
@example("minkowski p=0.5", 1, 2, 11, 24.0, 1)
def test_any_size(variant: str, n: int, v: int, d: int, exponent: float, seed: int) -> None:
    """Loss and gradients in float32 against float64, for any shape."""
    x, w, y = draw(n, v, d, seed=seed)
    found = loss_and_gradients(fast(y, reduction="sum"), x, w, variant, exponent)
    expected = loss_and_gradients(lambda *a, **k: truth(y)(*a, **k).sum(), x.double(), w.double(), variant, exponent)
    budget = loss_and_gradients(lambda *a, **k: plain(y)(*a, **k).sum(), x, w, variant, exponent)
    point = x.double().requires_grad_()
    far = distances_reference(point, w.double(), distance_of(variant), **params_of(variant, d)).abs().clamp_min(1e-3)
    nearest = far.min().item()
    columns = far.log().sum(0)  # with minkowski p < 1 the slope of a distance is not bounded by 1
    steepest = max(torch.autograd.grad(column, point, retain_graph=True)[0].abs().max().item() for column in columns)
    size = exponent * max(1 / nearest, steepest)  # of a gradient before p - onehot cancels
    lost = 2.0**-21 * max(x.norm(dim=1).max().item() / nearest, 1) ** 2 if variant in PRODUCTS else 0  # by |x|^2 - ...
    for f, p, e in zip(found, budget, expected, strict=True):
        assert_no_worse(f, p if p.isfinite().all() else e, e, slack=1e-4 + lost, least=size)


@pytest.mark.parametrize(
    ("variant", "name", "options"),
    [
        ("euclidean", "euclidean", {}),
        ("manhattan", "cityblock", {}),
        ("chebyshev", "chebyshev", {}),
        ("minkowski p=0.5", "minkowski", {"p": 0.5}),
        ("minkowski p=2", "minkowski", {"p": 2}),
        ("minkowski p=7.5", "minkowski", {"p": 7.5}),
        ("cosine", "cosine", {}),
        ("canberra", "canberra", {}),
        ("braycurtis sum", "braycurtis", {}),
    ],
)
def test_reference_distances_are_scipys(variant: str, name: str, options: dict[str, Any]) -> None:
    x, w, _ = draw(9, 14, 5)
    x[0, 0] = w[0, 0] = 0
    found = distances_reference(x, w, distance_of(variant), **VARIANTS[variant])
    expected = torch.from_numpy(scipy.spatial.distance.cdist(x.double(), w.double(), name, **options))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_reference_mahalanobis_and_hamming_are_scipys() -> None:
    x, w, _ = draw(9, 14, 5)
    diagonal, full = (params_of(f"mahalanobis {kind}", 5)["factor"].detach() for kind in ("diagonal", "full"))
    for factor, matrix in ((diagonal, diagonal.exp().diag()), (full, full.tril() @ full.tril().t())):
        found = distances_reference(x, w, "mahalanobis", factor=factor)
        expected = torch.from_numpy(scipy.spatial.distance.cdist(x.double(), w.double(), "mahalanobis", VI=matrix))
        ratio = found / expected  # M is taken up to a factor, which changes no probability
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-9, atol=0)
    found = distances_reference(x, w, "hamming", kind="hard")
    expected = torch.from_numpy(scipy.spatial.distance.cdist(x > 0, w > 0, "hamming"))
    torch.testing.assert_close(found, expected * 5, rtol=1e-12, atol=0)


def test_bray_curtis_with_absolute_values() -> None:
    x, w, _ = draw(9, 14, 5)
    found = distances_reference(x, w, "braycurtis", denominator="abs")
    expected = torch.cdist(x.double(), w.double(), p=1) / (x.abs().sum(1)[:, None] + w.abs().sum(1)).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found.max() <= 1


def test_chebyshev_ties_share_the_gradient() -> None:
    x, w = torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    _, over_x, over_w, *_ = loss_and_gradients(fast(torch.tensor([0]), reduction="sum"), x, w, "chebyshev", 1.0)
    p = 1 / 3 / (1 / 3 + 1)  # of the second, at distance 3; the first, at 1, is the target
    torch.testing.assert_close(over_x, torch.tensor([[p / 2 + p / 3, -p / 2, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(over_w[0], torch.tensor([-p / 2, p / 2, 0.0], dtype=torch.float64))


def test_gumbel_noise() -> None:
    """Logistic, drawn anew in every call from torch's generator, the same for any chunks; off out of training."""
    index = torch.arange(2000)
    drawn = distances.uniforms(3, index, 50)
    assert (drawn > 0).all() and (drawn < 1).all() and not torch.equal(drawn, distances.uniforms(4, index, 50))
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * drawn.numel()))
    assert torch.corrcoef(drawn[:, :8].t()).fill_diagonal_(0).abs().max() < 0.1
    assert drawn.flatten().unique().numel() > 0.9999 * drawn.numel()
    x, w, y = draw(9, 14, 5)
    loss = functools.partial(harmonic_loss, x, w, y, distance="hamming", kind="gumbel", exponent=2.0, reduction="none")
    torch.manual_seed(1)
    once, other = loss(), loss()
    torch.manual_seed(1)
    torch.testing.assert_close(loss(chunk_bytes=1), once)
    assert not torch.equal(once, other)
    head = HarmonicHead(14, 5, distance="hamming", kind="gumbel", seed=1).eval()
    soft = HarmonicHead(14, 5, distance="hamming", kind="soft", seed=1)
    assert torch.equal(head(x, y), soft(x, y)) and not torch.equal(head.train()(x, y), soft(x, y))


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probs_sum_to_one_and_are_the_loss(variant: str) -> None:
    x, w, y = draw(10, 23, 8)
    given = params_of(variant, 8) | {"distance": distance_of(variant), "exponent": 3.0}
    log_probs = harmonic_log_probs(x, w, **given)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(10))
    losses = harmonic_loss(x, w, y, reduction="none", **given)
    torch.testing.assert_close(-log_probs.gather(1, y[:, None])[:, 0], losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edges(variant: str) -> None:
    x, w, y = draw(4, 1, 3)
    alone = loss_and_gradients(fast(y), x, w, variant, 2.0)
    assert all(t.abs().max() < 1e-6 for t in alone), "with one prototype p is 1"
    x, w, y = draw(4, 5, 3)
    y[:] = -100
    ignored = loss_and_gradients(fast(y), x, w, variant, 2.0)
    assert all((t == 0).all() for t in ignored)
    for reduction in ("mean", "none"):
        empty = loss_and_gradients(fast(y[:0], reduction=reduction), x[:0], w, variant, 2.0)
        assert all((t == 0).all() for t in empty)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_chunks_same_bits_per_token(variant: str, dtype: torch.dtype) -> None:
    """The order of sums over prototypes does not depend on the chunks; that over tokens does, and rounds apart.

    (Where plain PyTorch has a part, in a sigmoid or a separable sum, its last bits change with the shape.)
    """
    x, w, y = draw(70, 301, 40)
    found = [
        loss_and_gradients(fast(y, reduction="none", chunk_bytes=size), x.to(dtype), w, variant, 6.0)
        for size in (2**30, 2**30, 60_000)
    ]
    assert all(torch.equal(one, same) for one, same in zip(found[0], found[1], strict=True)), "same inputs, same bits"
    ours = choose.kernels_for(x.to(dtype)) is not eager and (dtype == torch.bfloat16 or variant not in PRODUCTS)
    if ours and variant not in ("hamming soft", "hamming gumbel", "braycurtis abs"):
        assert torch.equal(found[0][0], found[2][0]) and torch.equal(found[0][1], found[2][1])
    for one, other in zip(found[0], found[2], strict=True):
        assert (one - other).abs().max() <= 2.0**-18 * one.abs().max()


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    x, w, y = draw(4, 5, 3)
    with torch.no_grad():
        assert not harmonic_loss(x, w.requires_grad_(), y, exponent=2.0).requires_grad


def test_second_backward_is_an_error() -> None:
    x, w, y = draw(4, 5, 3)
    loss = harmonic_loss(x.requires_grad_(), w, y, exponent=2.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_every_distance_says_what_it_is() -> None:
    for entry in DISTANCES.values():
        assert entry.formula and entry.__doc__ and entry.between is not Distance.between


@dataclass(frozen=True)
class Lorentzian(Distance):
    """d = sum_k log(1 + a |x_k - w_k|): a distance that the house does not have."""

    formula = "sum log(1 + a |x - w|)"
    scaled = False
    a: float = 2.0

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return (self.a * (x - w).abs()).log1p().sum(-1)


def test_a_new_distance_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered in DISTANCES, it has loss, gradients, log-probabilities and a head, and is known to configs."""
    from model.config import HeadConfig

    monkeypatch.setitem(DISTANCES, "lorentzian", Lorentzian)
    monkeypatch.setitem(VARIANTS, "lorentzian", {"a": 3.0})
    x, w, y = draw(19, 33, 6)
    x[0] = w[y[0]]
    expected = loss_and_gradients(truth(y), x.double(), w.double(), "lorentzian", 4.0)
    found = loss_and_gradients(fast(y, reduction="none", chunk_bytes=2000), x, w, "lorentzian", 4.0)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    head = HarmonicHead(33, 6, distance="lorentzian", a=3.0, seed=1)
    torch.testing.assert_close(head.log_probs(x).exp().sum(1), torch.ones(19))
    assert HeadConfig(distance="lorentzian", params={"a": 1.0}).arguments()["a"] == 1.0
    with pytest.raises(ValueError, match="b=1.0: lorentzian takes a"):
        HeadConfig(distance="lorentzian", params={"b": 1.0})


def test_a_head_takes_a_distance_as_it_is() -> None:
    """Its parameters are kept, none are taken beside it, and tensors, which would not be trained, are refused."""
    x, w, y = draw(19, 33, 6)
    head = HarmonicHead(33, 6, distance=Lorentzian(a=3.0), seed=1)
    expected = harmonic_loss(x, head.prototypes, y, distance=Lorentzian(a=3.0), exponent=6**0.5)
    other = harmonic_loss(x, head.prototypes, y, distance=Lorentzian(), exponent=6**0.5)
    assert head(x, y) == expected != other and "distance=lorentzian" in repr(head)
    for entry, params in (
        (distances.Minkowski(p=1.5), {"p": 1.5}),
        (distances.Hamming(kind="hard"), {"kind": "hard"}),
    ):
        named = HarmonicHead(33, 6, distance=type(entry).__name__.lower(), **params, seed=1)
        assert HarmonicHead(33, 6, distance=entry, seed=1)(x, y) == named(x, y)
    with pytest.raises(ValueError, match="a: Lorentzian.* has its parameters already"):
        HarmonicHead(33, 6, distance=Lorentzian(), a=3.0)
    with pytest.raises(ValueError, match="factor of Mahalanobis.* would not be trained; give the distance by name"):
        HarmonicHead(33, 6, distance=distances.Mahalanobis(factor=torch.zeros(6)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_know_which_distances_are_a_product(variant: str) -> None:
    name = distance_of(variant)
    params = {parameter: value for parameter, value in VARIANTS[variant].items() if parameter != "seed"}
    entry = HarmonicHead(3, 4, distance=name, **params).score_function
    assert settings_of(name, params).by_product == entry.by_product == (variant in PRODUCTS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_nothing_of_size_tokens_by_vocabulary(variant: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of any operation stays within the budget, however many tokens there are."""
    monkeypatch.setattr(eager_elementwise, "PAIR_VALUES", 2**16)
    v, d, budget = 2048, 16, 2**20
    for n in (256, 1024):
        x, w, y = draw(n, v, d)
        with Largest() as largest:
            loss_and_gradients(fast(y, reduction=reduction, chunk_bytes=budget), x, w, variant, 4.0)
        assert v * d <= largest.values <= max(budget // 4, v * d, n * d), (n, largest.values)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", ["euclidean", "mahalanobis full", "manhattan", "dot"])
def test_autocast_does_not_reach_in(variant: str, reduction: str, path: str) -> None:
    x, w, y = draw(6, 11, 8)
    given = {"distance": distance_of(variant), "exponent": 3.0}
    expected = loss_and_gradients(fast(y, reduction=reduction), x, w, variant, 3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(fast(y, reduction=reduction), x, w, variant, 3.0)
        log_probs = harmonic_log_probs(x, w, **given, **params_of(variant, 8))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert torch.equal(log_probs, harmonic_log_probs(x, w, **given, **params_of(variant, 8)))


def test_compiled_around() -> None:
    """A model that torch compiles may hold a head: the head itself runs as it is."""
    head = HarmonicHead(11, 8, seed=1)
    x, _, y = draw(6, 11, 8)
    step = torch.compile(lambda x: head(x * 2, y) * 3, backend="eager")
    a, b = (x.clone().requires_grad_() for _ in range(2))
    loss, expected = step(a), head(b * 2, y) * 3
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(a.grad, b.grad)


def test_gradients_of_the_tiniest_rows_stay_in_the_range_of_their_dtype() -> None:
    """bfloat16's largest number is below float32's, which rounds to infinity."""
    x, w = torch.randn(4, 8, dtype=torch.bfloat16), (torch.randn(7, 8) * 2.0**-124).bfloat16()
    x, w = (x * 2.0**-124).requires_grad_(), w.requires_grad_()
    harmonic_loss(x, w, torch.tensor([1, 2, 3, 4]), exponent=1000.0, reduction="sum").backward()
    for grad in (x.grad, w.grad):
        assert grad.isfinite().all() and grad.abs().max() > 1e38


def test_rows_may_lie_in_memory_as_they_like() -> None:
    """Transposed, strided, expanded."""
    x, w, y = torch.randn(6, 8), torch.randn(7, 8), torch.randint(0, 7, (6,))
    for distance in ("euclidean", "cosine", "manhattan", "dot"):
        for reduction in ("mean", "none"):
            expected = None
            for hidden, rows in ((x, w), (x.t().contiguous().t(), w.t().contiguous().t())):
                leaves = hidden.detach().requires_grad_(), rows.detach().requires_grad_()
                loss = harmonic_loss(*leaves, y, distance=distance, exponent=3.0, reduction=reduction).sum()
                found = (loss, *torch.autograd.grad(loss, leaves))
                expected = expected or found
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b)
