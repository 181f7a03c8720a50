"""Every distance with every parameter that changes what it computes, for tests that go over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "euclidean": {},
    "manhattan": {},
    "chebyshev": {},
    "minkowski p=0.5": {"p": 0.5},
    "minkowski p=1": {"p": 1.0},
    "minkowski p=2": {"p": 2.0},
    "minkowski p=3": {"p": 3.0},
    "minkowski p=7.5": {"p": 7.5},
    "cosine": {},
    "hamming soft": {"kind": "soft", "temperature": 0.7},
    "hamming hard": {"kind": "hard", "temperature": 0.7},
    "hamming gumbel": {"kind": "gumbel", "temperature": 0.7, "seed": 5},
    "canberra": {},
    "braycurtis sum": {"denominator": "sum"},
    "braycurtis abs": {"denominator": "abs"},
    "mahalanobis diagonal": {"factor": "diagonal"},
    "mahalanobis full": {"factor": "full"},
    "dot": {},
    "cosine_softmax": {},
    "squared_euclidean_softmax": {},
}
PRODUCTS = [  # those whose distance is a matrix product
    "euclidean",
    "minkowski p=2",
    "cosine",
    "hamming hard",
    "mahalanobis diagonal",
    "mahalanobis full",
    "dot",
    "cosine_softmax",
    "squared_euclidean_softmax",
]
SOFTMAX = ["dot", "cosine_softmax", "squared_euclidean_softmax"]  # scores that are no logarithm
HARMONIC = [variant for variant in VARIANTS if variant not in SOFTMAX]
LENGTHS = ("euclidean", "manhattan", "chebyshev", "minkowski", "mahalanobis")  # whose scores no cap is put on
OPTIONS: dict[str, dict[str, float]] = {  # of a head's loss and scores
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.05},
    "cap": {"soft_cap": 4.0},
    "all": {"label_smoothing": 0.1, "z_loss": 0.05, "soft_cap": 4.0},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 0.05},
}


def with_options(variants: Iterable[str], names: Iterable[str] = tuple(OPTIONS)) -> list[tuple[str, str]]:
    """(variant, name of options), for those that take a cap, or without one in its place."""
    capped = [(variant, name) for variant in variants for name in names]
    return [pair for pair in capped if distance_of(pair[0]) not in LENGTHS or "soft_cap" not in OPTIONS[pair[1]]]


def distance_of(variant: str) -> str:
    return variant.split()[0]


def params_of(variant: str, dim: int) -> dict[str, Any]:
    """The parameters of `harmonic_loss`; a factor is drawn, in float64, and asks for its gradient."""
    params = dict(VARIANTS[variant])
    if "factor" in params:
        stream = torch.Generator().manual_seed(dim)
        shape = (dim,) if params["factor"] == "diagonal" else (dim, dim)
        drawn = torch.randn(shape, generator=stream, dtype=torch.float64) * 0.3
        params["factor"] = (drawn if drawn.dim() == 1 else drawn + torch.eye(dim)).requires_grad_()
    return params


def loss_and_gradients(
    loss_of: Callable[..., Tensor],
    x: Tensor,
    w: Tensor,
    variant: str,
    exponent: float,
    upstream: Tensor | None = None,
    **params: Any,
) -> list[Tensor]:
    """[losses, d/dx, d/dw, d/dn, d/dfactor] of `loss_of(x, w, distance=..., exponent=..., **params)` in float64.

    `upstream` weighs per-token losses; `params` add to those of the variant.
    """
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    n = torch.tensor(exponent, dtype=torch.float64, requires_grad=True)
    params = params_of(variant, x.shape[1]) | params
    losses = loss_of(x, w, distance=distance_of(variant), exponent=n, **params)
    (losses.sum() if upstream is None else losses.double() @ upstream).backward()
    leaves: Iterable[Tensor] = (x, w, n, *(t for t in params.values() if isinstance(t, Tensor)))
    gradients = (t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves)
    return [t.detach().double() for t in (losses, *gradients)]
