"""Long training of points and of a small network: layers side by side are heads, and figures are what formulas say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import growth
from model.head import HarmonicHead
from pretrain.study.vision.points import PLACES

PAGE = Path("benchmarks/results/growth-cpu.md")
FLOOR = 2**-9.5


@pytest.mark.parametrize("head", growth.HEADS)
@pytest.mark.parametrize("exactly", [False, True], ids=["apart", "on the points"])
def test_layers_side_by_side_are_heads(head: str, exactly: bool) -> None:
    """Loss and gradient of every layer, also where prototypes lie on their points or on others'."""
    layers = growth.Layers(head, list(growth.SETS), seeds=2)
    if exactly:
        for number, real in enumerate(layers.real):
            layers.w.data[number][real] = layers.x[number][real].roll(number % 2, 0)
    losses = layers.losses(layers.scored())
    (gradients,) = torch.autograd.grad(losses.sum(), [layers.w])
    for number, real in enumerate(layers.real):
        if exactly and not layers.x[number][real].any(1).all():
            continue  # the floor of a point of zeros has a unit, the head's: a power of two near its prototypes
        x, w = layers.x[number][real], layers.w.detach()[number][real]
        name = head.removesuffix(" + bias")
        alone = HarmonicHead(len(x), x.shape[1], distance=name, exponent=layers.exponent).double()
        alone.prototypes.data = w.clone()
        loss = alone(x, torch.arange(len(x)))
        loss.backward()
        assert losses[number].item() == pytest.approx(loss.item(), rel=1e-7, abs=1e-12)
        torch.testing.assert_close(gradients[number][real], alone.prototypes.grad, rtol=1e-6, atol=1e-9)
        assert not gradients[number][~real].any()
