"""The specification: harmonic loss in float64, nothing fused, nothing chunked, to be read beside the papers.

Every fast path is tested against this file. Legend: N tokens, V prototypes, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .distance_base import LARGEST_ROW, Distance
from .distances import resolve
from .kernels.eager import Tokens
from .options import LossOptions


def distances_reference(
    hidden: Tensor, prototypes: Tensor, distance: str | Distance = "euclidean", **params: Any
) -> Tensor:
    """(N, D), (V, D) -> (N, V) float64 distances, as in a textbook: without a floor."""
    entry = _prepared(distance, params)
    x, w = _perturbed(entry, hidden.double(), prototypes.double())
    return entry.between(x[:, None], w[None])


def scores_reference(
    hidden: Tensor,
    prototypes: Tensor,
    distance: str | Distance,
    exponent: float | Tensor,
    soft_cap: float | None = None,
    **params: Any,
) -> Tensor:
    """(N, V) float64 scores: -exponent * log max(d, floor), or those of a softmax head; c tanh(s / c) for a cap of c.

    Distances that do not mind are taken in units in which the prototypes' entries are about 1.
    """
    entry = _prepared(distance, params)
    LossOptions(soft_cap=soft_cap).check(entry)
    scores = _scores(hidden.double(), prototypes.double(), entry, exponent)
    return scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()


def _scores(x: Tensor, w: Tensor, entry: Distance, exponent: float | Tensor) -> Tensor:
    """(N, D), (V, D) -> (N, V), without a cap."""
    if entry.slope:
        return entry.slope * (exponent if entry.has_exponent else 1) * entry.between(x[:, None], w[None])
    if entry.scaled and x.numel() and w.numel():
        unit = _unit(w)
        x, w = x / unit, w / unit
    x, w = _perturbed(entry, x, w)
    floor = entry.floor(Tokens(entry.transform(x))).detach()[:, None]
    apart = (entry.between(x[:, None], w[None]) > floor).detach()
    # where a distance is the constant floor, its formula (which may have no slope there) is asked elsewhere
    d = entry.between(x[:, None], torch.where(apart[..., None], w[None], w[None] + 1))
    return -exponent * torch.where(apart, d, floor).log()


def _unit(w: Tensor) -> float:
    """(V, D) -> the power of two that is next to the geometric mean of the rows' largest entries, as frexp rounds."""
    powers = [math.frexp(size)[1] for size in w.detach().abs().amax(1).tolist() if 0 < size < math.inf]
    typical = round(sum(powers) / len(powers)) if powers else 0
    return 2.0 ** max(typical, max(powers, default=0) - LARGEST_ROW)


def _prepared(distance: str | Distance, params: dict[str, Any]) -> Distance:
    return resolve(distance, params).prepared(torch.float64, lambda: torch.randint(2**31, ()))


def _perturbed(entry: Distance, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and prototypes with the distance's noise, if it has any."""
    return entry.perturb(x, -1 - torch.arange(len(x))), entry.perturb(w, torch.arange(len(w)))


def harmonic_loss_reference(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    distance: str | Distance = "euclidean",
    exponent: float | Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    **params: Any,
) -> Tensor:
    """-log p[target] with p ~ d**-exponent (arXiv:2502.01628, eq. 2): (N,) float64, 0 where the target is ignored.

    With the options of model/options.py: cross-entropy with targets (1 - e) onehot + e / V, plus z * lse^2 of the
    scores in the units that x and w are given in. `params` are the distance's, as in `model.harmonic.harmonic_loss`.
    """
    LossOptions(label_smoothing, z_loss)  # raises
    ignored = targets == ignore_index
    hidden = hidden.masked_fill(ignored[:, None], 1)  # what an ignored token holds touches nobody
    scores = scores_reference(hidden, prototypes, distance, exponent, soft_cap, **params)
    losses = F.cross_entropy(
        scores, targets, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if not z_loss:
        return losses
    entry, lse = resolve(distance, params), scores.logsumexp(1)
    if entry.scaled and entry.degree and len(targets):
        unit = entry.degree * math.log(_unit(prototypes.double())) + entry.log_unit()
        lse = lse - exponent * unit  # distances were taken in this unit
    return losses + (z_loss * lse.square()).masked_fill(ignored, 0)
