"""Harmonic loss against the float64 reference: losses, all gradients, edges, memory."""

from __future__ import annotations

import math

import pytest
import scipy.spatial.distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.distances import DISTANCES
from model.harmonic import harmonic_log_probs, harmonic_loss
from model.reference import distances_reference, harmonic_loss_reference

HEADS = ("euclidean", "cosine", "dot")


def draw(n: int, v: int, d: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, d, generator=stream) * scale for rows in (n, v))
    return x, w, torch.randint(0, v, (n,), generator=stream)


def loss_and_gradients(loss_of, x: Tensor, w: Tensor, exponent: float, upstream: Tensor | None = None) -> list[Tensor]:
    """[losses, d/dx, d/dw, d/dn] in float64; `upstream` weighs per-token losses."""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    n = torch.tensor(exponent, dtype=torch.float64, requires_grad=True)
    losses = loss_of(x, w, n)
    (losses.sum() if upstream is None else losses.double() @ upstream).backward()
    gradients = (t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, w, n))
    return [t.detach().double() for t in (losses, *gradients)]


def plain_loss(x: Tensor, w: Tensor, y: Tensor, distance: str, n: Tensor) -> Tensor:
    """What a user would write in PyTorch, in the dtype of x: the rounding budget of the fast path."""
    w = w.to(x.dtype)
    if distance == "dot":
        scores = x @ w.t()
    elif distance == "cosine":
        scores = -n.to(x.dtype) * (1 - F.normalize(x) @ F.normalize(w).t()).log()
    else:
        squared = (x * x).sum(1, keepdim=True) + (w * w).sum(1) - 2 * x @ w.t()
        scores = -n.to(x.dtype) / 2 * squared.log()
    return F.cross_entropy(scores.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype), y, reduction="none")


def assert_no_worse(fast: Tensor, plain: Tensor, truth: Tensor, slack: float = 1e-5) -> None:
    """The fast path may be as far from float64 as plain torch is, plus `slack` of the largest value."""
    excess = ((fast - truth).abs().max() - (plain - truth).abs().max()) / truth.abs().max().clamp_min(1e-30)
    assert excess <= slack, f"{excess:.2e} further from float64 than plain torch"


@pytest.mark.parametrize("distance", HEADS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_reference(distance: str, scale: float, dtype: torch.dtype) -> None:
    x, w, y = draw(37, 101, 24, 1.0 if distance == "dot" else scale)
    x = x.to(dtype)
    w = w.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.rand(37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n = math.sqrt(24)
    truth = loss_and_gradients(
        lambda x, w, n: harmonic_loss_reference(x, w, y, distance=distance, exponent=n),
        x.double(),
        w.double(),
        n,
        upstream,
    )
    plain = loss_and_gradients(lambda x, w, n: plain_loss(x, w, y, distance, n), x, w, n, upstream)
    fast = loss_and_gradients(
        lambda x, w, n: harmonic_loss(x, w, y, distance=distance, exponent=n, reduction="none", chunk_bytes=20_000),
        x, w, n, upstream,
    )  # fmt: skip
    for f, p, t in zip(fast, plain, truth, strict=True):
        assert_no_worse(f, p, t, slack=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("distance", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_ignored_targets_and_chunking_agree(distance: str, reduction: str) -> None:
    x, w, y = (t.double() if t.is_floating_point() else t for t in draw(29, 13, 7))
    y[[0, 5, 28]] = -100
    count = {"mean": 26, "sum": 1, "none": 1}[reduction]
    expected = loss_and_gradients(
        lambda x, w, n: harmonic_loss_reference(x, w, y, distance=distance, exponent=n).sum() / count, x, w, 3.0
    )
    for chunk_bytes in (1, 3_000, 2**30):
        found = loss_and_gradients(
            lambda x, w, n, size=chunk_bytes: harmonic_loss(
                x, w, y, distance=distance, exponent=n, reduction=reduction, chunk_bytes=size
            ).sum(),
            x, w, 3.0,
        )  # fmt: skip
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", HEADS)
def test_finite_differences(distance: str) -> None:
    x, w, y = draw(5, 6, 4)
    y[1] = -100
    n = torch.tensor(2.5, dtype=torch.float64, requires_grad=distance != "dot")
    arguments = (x.double().requires_grad_(), w.double().requires_grad_(), n)
    assert torch.autograd.gradcheck(
        lambda x, w, n: harmonic_loss(x, w, y, distance=distance, exponent=n, reduction="none"), arguments
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_at_a_match_the_floor_holds(distance: str, dtype: torch.dtype) -> None:
    """x == w_y: finite, p_y about 1 for a large exponent, and no gradient from the constant distance of the match."""
    x, w, y = draw(8, 11, 16)
    w = w.to(dtype).float()
    x = w[y].to(dtype)
    for exponent in (0.5, 4.0, 28.0, 1536.0):
        found = loss_and_gradients(
            lambda x, w, n: harmonic_loss(x, w, y, distance=distance, exponent=n, reduction="none"), x, w, exponent
        )
        truth = loss_and_gradients(
            lambda x, w, n: harmonic_loss_reference(x, w, y, distance=distance, exponent=n),
            x.double(), w.double(), exponent,
        )  # fmt: skip
        assert all(t.isfinite().all() for t in found)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        if distance == "euclidean" or dtype != torch.bfloat16:  # rounding unit rows to bf16 moves x off w
            torch.testing.assert_close(found[0], truth[0], rtol=tolerance, atol=tolerance)
            largest = truth[2].abs().max().item() + 1e-30
            torch.testing.assert_close(found[1], truth[1], rtol=tolerance * 5, atol=tolerance * largest)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e-6, 1e6, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_finite_for_every_finite_input(distance: str, scale: float) -> None:
    x, w, y = draw(6, 9, 8)
    x, w = (t.clamp(-1, 1) * scale for t in (x, w))
    x[0] = w[y[0]]
    w[3] = w[4]
    x[2] = 0
    found = loss_and_gradients(
        lambda x, w, n: harmonic_loss(x, w, y, distance=distance, exponent=n, reduction="mean"), x, w, 28.0
    )
    assert all(t.isfinite().all() for t in found), [t.isfinite().all() for t in found]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(-40, 40), st.floats(0.5, 64))
def test_scale_invariance(seed: int, power: int, exponent: float) -> None:
    x, w, _ = draw(5, 7, 6, seed=seed)
    once = harmonic_log_probs(x, w, exponent=exponent)
    scaled = harmonic_log_probs(x * 2.0**power, w * 2.0**power, exponent=exponent)
    assert torch.equal(once, scaled), "a power of two changes no bit"
    other = harmonic_log_probs(x * 3.7, w * 3.7, exponent=exponent)
    torch.testing.assert_close(once, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_reference_distances_are_scipys(distance: str) -> None:
    x, w, _ = draw(9, 14, 5)
    expected = torch.from_numpy(scipy.spatial.distance.cdist(x.double(), w.double(), distance))
    torch.testing.assert_close(distances_reference(x, w, distance), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", HEADS)
def test_log_probs_sum_to_one_and_are_the_loss(distance: str) -> None:
    x, w, y = draw(10, 23, 8)
    log_probs = harmonic_log_probs(x, w, distance=distance, exponent=3.0)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(10))
    losses = harmonic_loss(x, w, y, distance=distance, exponent=3.0, reduction="none")
    torch.testing.assert_close(-log_probs.gather(1, y[:, None])[:, 0], losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", HEADS)
def test_edges(distance: str) -> None:
    x, w, y = draw(4, 1, 3)
    alone = loss_and_gradients(lambda x, w, n: harmonic_loss(x, w, y, distance=distance, exponent=n), x, w, 2.0)
    assert all((t == 0).all() for t in alone), "with one prototype p is 1"
    x, w, y = draw(4, 5, 3)
    y[:] = -100
    ignored = loss_and_gradients(lambda x, w, n: harmonic_loss(x, w, y, distance=distance, exponent=n), x, w, 2.0)
    assert all((t == 0).all() for t in ignored)
    empty = harmonic_loss(x[:0].requires_grad_(), w.requires_grad_(), y[:0], distance=distance, exponent=2.0)
    empty.backward()
    assert empty == 0 and (w.grad == 0).all()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "euclidian"}, "expected one of euclidean"),
        ({"reduction": "average"}, "expected mean, sum or none"),
        ({"exponent": 0.0}, "expected a positive number"),
        ({"exponent": float("nan")}, "expected a positive number"),
        ({"targets": torch.tensor([0, 5])}, "targets reach from 0 to 5: expected 0 to 4"),
        ({"targets": torch.tensor([0, -1])}, "targets reach from -1"),
        ({"targets": torch.tensor([0])}, "expected targets"),
        ({"prototypes": torch.ones(5, 4)}, "expected hidden"),
        ({"hidden": torch.ones(2, 3, dtype=torch.int64)}, "expected bfloat16"),
    ],
)
def test_bad_input_is_told(change: dict, message: str) -> None:
    given = {
        "hidden": torch.ones(2, 3),
        "prototypes": torch.rand(5, 3),
        "targets": torch.tensor([0, 1]),
        "exponent": 2.0,
    }
    given.update(change)
    positional = [given.pop(name) for name in ("hidden", "prototypes", "targets")]
    with pytest.raises(ValueError, match=message):
        harmonic_loss(*positional, **given)


def test_every_distance_names_its_formula() -> None:
    assert all(entry.formula for entry in DISTANCES.values())


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most values that any one result of a torch operation has had."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_size_tokens_by_vocabulary(reduction: str) -> None:
    """The largest tensor of any operation stays within the budget, however many tokens there are."""
    v, d, budget = 2048, 16, 2**20
    for n in (256, 2048):
        x, w, y = draw(n, v, d)
        with _Largest() as largest:
            loss = harmonic_loss(
                x.requires_grad_(), w.requires_grad_(), y, exponent=4.0, reduction=reduction, chunk_bytes=budget
            )
            loss.sum().backward()
        assert v * d <= largest.values <= max(budget // 4, v * d, n * d), (n, largest.values)
