"""Rows of any length beside rows of any other: no token reaches another, and HarMax does not know the scale.

Legend: N tokens, V prototypes, D width, n the exponent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.distances import DISTANCES
from model.harmonic import harmonic_log_probs, harmonic_loss
from model.head import HarmonicHead
from model.reference import harmonic_loss_reference
from tests.support.variants import (
    HARMONIC,
    VARIANTS,
    distance_of,
    loss_and_gradients,
    params_of,
)

N, V, D, EXPONENT = 16, 50, 32, 5.5
LONG = 3  # the token that is out of proportion
SCALED = [variant for variant in HARMONIC if DISTANCES[distance_of(variant)].scaled or variant == "cosine"]
LEAST_NORMAL = torch.finfo(torch.float32).tiny


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, D, generator=stream) for rows in (N, V))
    return x, w, torch.randint(0, V, (N,), generator=stream)


def losses(x: Tensor, w: Tensor, y: Tensor, variant: str, **options: Any) -> Tensor:
    given = params_of(variant, D) | {"distance": distance_of(variant), "exponent": EXPONENT}
    return harmonic_loss(x, w, y, reduction="none", **given, **options).detach()


def truth(x: Tensor, w: Tensor, y: Tensor, variant: str) -> Tensor:
    given = params_of(variant, D) | {"distance": distance_of(variant), "exponent": EXPONENT}
    return harmonic_loss_reference(x, w, y, **given).detach()


@pytest.mark.parametrize("length", [1e8, 1e20, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_long_token_changes_no_bit_of_another(variant: str, dtype: torch.dtype, length: float, path: str) -> None:
    x, w, y = draw()
    w = w.to(dtype).float()
    before = losses(x.to(dtype), w, y, variant)
    x[LONG] = x[LONG].sign() * length
    after = losses(x.to(dtype), w, y, variant)
    others = torch.arange(N) != LONG
    assert torch.equal(after[others], before[others])
    if variant in SCALED and dtype == torch.float32:
        torch.testing.assert_close(after.double(), truth(x.to(dtype), w, y, variant), rtol=0, atol=1e-3 * EXPONENT)


@pytest.mark.parametrize("length", [1e4, 1e15])
@pytest.mark.parametrize("variant", SCALED)
def test_tokens_beside_a_long_prototype_keep_their_losses(variant: str, length: float, path: str) -> None:
    """It takes no share, and the others are as precise as without it."""
    x, w, y = draw()
    y[y == 7] = 8
    w[7] = w[7].sign() * length
    found = losses(x, w, y, variant)
    torch.testing.assert_close(found.double(), truth(x, w, y, variant), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [LEAST_NORMAL, 1e-36, 1e-20, 1e8, 1e37])
@pytest.mark.parametrize("variant", SCALED)
def test_the_scale_does_not_matter_down_to_the_least_normal_number(variant: str, scale: float, path: str) -> None:
    """Losses, and gradients in proportion to 1 / scale."""
    x, w, y = draw()
    x, w = ((t.sign() * t.abs().clamp_min(1)).double() for t in (x, w))  # so that all entries are normal numbers
    tiny_x, tiny_w = (x * scale).float(), (w * scale).float()
    found = loss_and_gradients(
        lambda x, w, **k: harmonic_loss(x, w, y, reduction="none", **k), tiny_x, tiny_w, variant, EXPONENT
    )
    expected = loss_and_gradients(
        lambda x, w, **k: harmonic_loss_reference(x, w, y, **k),
        tiny_x.double() / scale, tiny_w.double() / scale, variant, EXPONENT,
    )  # fmt: skip
    assert all(part.isfinite().all() for part in found)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    most = torch.finfo(torch.float32).max * scale  # of what can be told
    for part, other in zip(found[1:3], expected[1:3], strict=True):
        other = other.clamp(-most, most)
        torch.testing.assert_close(part * scale, other, rtol=0, atol=2e-4 * other.abs().max().item())


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, 3e38])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_ignored_token_touches_nobody(variant: str, reduction: str, poison: float, path: str) -> None:
    """Neither losses nor gradients, whatever it holds."""
    x, w, y = draw()
    y[[LONG, 9]] = -100

    def told(of_ignored: float) -> list[Tensor]:
        x[LONG], x[9, 0] = of_ignored, of_ignored
        return loss_and_gradients(
            lambda x, w, **k: harmonic_loss(x, w, y, reduction=reduction, **k), x, w, variant, EXPONENT
        )

    harmless, found = told(0.5), told(poison)
    assert all(torch.equal(a, b) for a, b in zip(harmless, found, strict=True))
    assert found[0].isfinite().all() and not found[1][[LONG, 9]].any()
    expected = loss_and_gradients(lambda x, w, **k: harmonic_loss_reference(x, w, y, **k), x, w, variant, EXPONENT)
    if reduction == "none":
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)


def test_predictions_are_those_of_each_token_alone() -> None:
    """Ignored targets ask for predictions all the same."""
    x, w, _ = draw()
    head = HarmonicHead(V, D, seed=1)
    head.prototypes.data.copy_(w)
    alone = torch.cat([head.predict(row[None]) for row in x])
    x[LONG] = torch.nan
    others = torch.arange(N) != LONG
    assert torch.equal(head.predict(x)[others], alone[others])
    assert torch.equal(alone, harmonic_log_probs(draw()[0], w, exponent=1.0).argmax(1))


@pytest.mark.parametrize("p", [8.0, 20.0, 40.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_powers_of_minkowski(p: float, dtype: torch.dtype, path: str) -> None:
    """The floor at a match too: powers of entries below 1 vanish, roots of them do not."""
    x, w, y = draw()
    x, w = (x * 0.05).to(dtype), (w * 0.05).to(dtype).float()
    x[0] = w[5].to(dtype)
    w[7] = 40 * w[7].sign()
    y[0], y[1] = 7, 7  # at a far corner, beside a match and without one
    found = harmonic_loss(x, w, y, distance="minkowski", p=p, exponent=2.0, reduction="none")
    expected = harmonic_loss_reference(x, w, y, distance="minkowski", p=p, exponent=2.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    largest = x[0].double().abs().max()
    norm = largest * ((x[0].double().abs() / largest) ** p).sum() ** (1 / p)
    far = (w[7].double() - x[0].double()).abs()
    distance = far.max() * ((far / far.max()) ** p).sum() ** (1 / p)
    by_hand = 2 * (distance / (2.0**-19 * norm)).log()  # the match, at the floor, takes all
    assert expected[0].item() == pytest.approx(by_hand.item(), abs=2e-3)


def test_small_powers_whose_distances_overflow_are_refused() -> None:
    x, w, y = draw()
    with pytest.raises(ValueError, match=r"p=0.05: distances of rows 32 wide pass 3.4e\+38, .* expected 0.078"):
        harmonic_loss(x, w, y, distance="minkowski", p=0.05, exponent=2.0)
    assert harmonic_loss(x, w, y, distance="minkowski", p=0.08, exponent=2.0).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", SCALED)
def test_on_a_gpu(variant: str) -> None:
    """A long token and an ignored one that is no number, at every scale."""
    x, w, y = draw()
    x[LONG] *= 1e8
    y[9] = -100
    given = params_of(variant, D) | {"distance": distance_of(variant), "exponent": EXPONENT, "reduction": "none"}
    given = {name: value.detach().cuda() if isinstance(value, Tensor) else value for name, value in given.items()}
    for scale in (1e-30, 1.0, 1e28):
        tokens, prototypes = x * scale, (w * scale).cuda().requires_grad_()
        expected = truth(tokens, prototypes.detach().cpu(), y, variant)
        tokens[9] = torch.nan
        leaf = tokens.cuda().requires_grad_()
        found = harmonic_loss(leaf, prototypes, y.cuda(), **given)
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-3)
        found.sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[9].any()
        assert prototypes.grad is not None and prototypes.grad.isfinite().all()
