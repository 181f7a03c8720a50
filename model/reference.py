"""The specification: harmonic loss in float64, nothing fused, nothing chunked, to be read beside the papers.

Every fast path is tested against this file. Legend: N tokens, V prototypes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.distances import ABSOLUTE_FLOOR, RELATIVE_FLOOR


def distances_reference(hidden: Tensor, prototypes: Tensor, distance: str = "euclidean") -> Tensor:
    """(N, D), (V, D) -> (N, V) float64 distances with their floor. At or below the floor a distance is a constant."""
    x, w = hidden.double()[:, None], prototypes.double()[None]  # (N, 1, D), (1, V, D)
    if distance == "euclidean":
        squared = (x - w).square().sum(-1)
        largest = max(x.abs().max(), w.abs().max())
        floor = RELATIVE_FLOOR * hidden.double().square().sum(-1, keepdim=True) + ABSOLUTE_FLOOR * largest**2
        return torch.where(squared > floor, squared, floor.detach()).sqrt()
    if distance == "cosine":
        d = 1 - F.cosine_similarity(x, w, dim=-1, eps=0)
        return torch.where(d > RELATIVE_FLOOR / 2, d, torch.full_like(d, RELATIVE_FLOOR / 2))
    raise ValueError(f"no reference for distance {distance!r}")


def scores_reference(hidden: Tensor, prototypes: Tensor, distance: str, exponent: float | Tensor) -> Tensor:
    """(N, V) float64 scores: -exponent * log d, or the dot product of the softmax baseline."""
    if distance == "dot":
        return hidden.double() @ prototypes.double().t()
    return -exponent * distances_reference(hidden, prototypes, distance).log()


def harmonic_loss_reference(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    distance: str = "euclidean",
    exponent: float | Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """-log p[target] with p ~ d**-exponent (arXiv:2502.01628, eq. 2): (N,) float64, 0 where the target is ignored."""
    scores = scores_reference(hidden, prototypes, distance, exponent)
    return F.cross_entropy(scores, targets, reduction="none", ignore_index=ignore_index)
