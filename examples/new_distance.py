"""A distance of your own: one class with a formula, held to float64 and trained with.

    pip install .
    python examples/new_distance.py

Seconds on a CPU. It prints how far loss and gradients in float32 are from a plain formula in float64, about 1e-6 of
their largest number, and the accuracy on three rings of points, 100%.

The Lorentzian distance, d(x, w) = sum_k log(1 + |x_k - w_k|), grows with the logarithm of a difference: entries that
are far off count little (Cha, 2007, "Comprehensive Survey on Distance/Similarity Measures between Probability Density
Functions", the L1 family). Here differences are told in units of `width`, the distance's own parameter.
"""

from dataclasses import dataclass

import torch
from overtone import Distance, HarmonicHead, harmonic_loss
from torch import Tensor, nn
from torch.nn import functional as F

DIM, CLASSES = 16, 3


@dataclass(frozen=True)
class Lorentzian(Distance):
    """d = sum_k log(1 + |x_k - w_k| / width). Where x_k = w_k the slope is 0."""

    formula = "sum log(1 + |x - w| / width)"
    scaled = False  # a common factor of x and w does change the probabilities
    width: float = 0.1

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"width={self.width!r}: expected a positive number")

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...). This is all that a distance needs: chunks and gradients follow from it."""
        return ((x - w).abs() / self.width).log1p().sum(-1)


def plain_loss(x: Tensor, w: Tensor, targets: Tensor, exponent: float, width: float) -> Tensor:
    """-log p[target] with p ~ d^-n as it is written, all (N, V) distances at once."""
    distances = torch.log(1 + (x[:, None] - w[None]).abs() / width).sum(-1)
    return F.cross_entropy(-exponent * distances.log(), targets)


def check() -> float:
    """The largest difference of loss and gradients, relative to the largest number of each."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(11, (37,), generator=generator)
    fast = [torch.randn(rows, DIM, generator=generator).requires_grad_() for rows in (37, 11)]
    exact = [rows.detach().double().requires_grad_() for rows in fast]
    loss = harmonic_loss(*fast, targets, distance=Lorentzian(0.3), exponent=4.0)
    truth = plain_loss(exact[0], exact[1], targets, exponent=4.0, width=0.3)
    pairs = [(loss, truth), *zip(torch.autograd.grad(loss, fast), torch.autograd.grad(truth, exact), strict=True)]
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def train() -> float:
    """Accuracy on fresh points of three rings of radius 1, 2 and 3."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, DIM))
    head = HarmonicHead(CLASSES, DIM, distance=Lorentzian())
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        classes, angles = torch.randint(CLASSES, (256,)), torch.rand(256) * 2 * torch.pi
        points = torch.stack([angles.cos(), angles.sin()], 1) * (classes + 1 + 0.1 * torch.randn(256))[:, None]
        features = network(points) * head.feature_length / DIM**0.5
        loss = head(features, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (head.predict(features) == classes).double().mean().item()


if __name__ == "__main__":
    print(f"largest relative difference to float64: {check():.1e}")
    print(f"accuracy {train():.1%}")
