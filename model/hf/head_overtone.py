"""The head of an Overtone model for the transformers library: distances to prototypes, and scores -n log d of them, or
those of a softmax head.

Legend: N tokens, V prototypes, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configuration_overtone import OvertoneConfig

RELATIVE_FLOOR = 2.0**-19  # of a distance between a token and the origin; its root where products give squares
ABSOLUTE_FLOOR = 2.0**-40
DENOMINATOR_FLOOR = 2.0**-40
LARGEST_ROW, LONGEST_TOKEN = 20, 50  # powers of two that entries of prototypes and tokens do not pass once scaled
BLOCK_ENTRIES = 1 << 25  # of an (N, prototypes, D) temporary
COLUMNS = 64  # terms of one sum in `taxicab`

KNOWN = (
    *("dot", "euclidean", "manhattan", "chebyshev", "minkowski", "cosine", "hamming", "canberra", "braycurtis"),
    *("mahalanobis", "cosine_softmax", "squared_euclidean_softmax"),
)


class OvertoneHead(nn.Module):
    """Hidden states (..., D) -> scores (..., V): -n log d, or for softmax heads products (dot), n times cosines
    (cosine_softmax) or -n d^2 (squared_euclidean_softmax); a cap c makes c tanh(s / c) of them.
    """

    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__()
        if config.distance not in KNOWN:
            raise ValueError(f"distance={config.distance!r}: this code knows {', '.join(KNOWN)}; export anew")
        self.distance, self.params = config.distance, config.distance_params or {}
        self.exponent, self.soft_cap = config.exponent or 1.0, config.soft_cap
        self.power: float = self.params.get("p", 1.0)
        self.prototypes = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        if self.distance == "mahalanobis":
            square = (config.dim, config.dim) if self.params["factor"] == "full" else (config.dim,)
            self.factor = nn.Parameter(torch.empty(square))
        learned = config.exponent is None and self.distance != "dot"
        self.log_exponent = nn.Parameter(torch.empty(())) if learned else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> scores (..., V), in float32 at least."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        x, w = hidden.reshape(-1, hidden.shape[-1]).to(wide), self.prototypes.to(wide)
        n = self.exponent if self.log_exponent is None else self.log_exponent.exp()
        if self.distance == "dot":
            scores = x @ w.t()
        elif self.distance == "cosine_softmax":
            scores = n * (self._transformed(x) @ self._transformed(w).t())
        elif self.distance == "squared_euclidean_softmax":
            scores = -n * _squares(x, w)
        else:
            scores = -n * self.distances(x, w).log()
        if self.soft_cap is not None:
            scores = self.soft_cap * (scores / self.soft_cap).tanh()
        return scores.view(*hidden.shape[:-1], -1)

    def distances(self, x: Tensor, w: Tensor) -> Tensor:
        """(N, D), (V, D) -> (N, V), never less than a floor, below which they are constant."""
        if self.distance not in ("cosine", "hamming") and x.numel():
            x, w = _scaled(x, w)
        x, w = self._transformed(x), self._transformed(w)
        if self.distance in ("euclidean", "mahalanobis", "cosine") or self.power == 2:
            xx, squares = x.square().sum(-1, keepdim=True), _squares(x, w)
            if self.distance == "cosine":
                return torch.maximum(squares / 2, (RELATIVE_FLOOR / 2 * xx + ABSOLUTE_FLOOR).detach())
            least = RELATIVE_FLOOR**0.5 * xx.sqrt() + ABSOLUTE_FLOOR
            return torch.maximum(squares, least.square().detach()).sqrt()
        if self.distance == "hamming":
            least = x.new_tensor(RELATIVE_FLOOR * x.shape[1] / 2)
        else:
            least = RELATIVE_FLOOR * self._between(x, torch.zeros_like(w[:1])) + ABSOLUTE_FLOOR
        return torch.maximum(self._between(x, w), least.detach())

    def _transformed(self, rows: Tensor) -> Tensor:
        if self.distance in ("cosine", "cosine_softmax"):
            rows = rows / torch.where(rows.any(-1, keepdim=True), rows.detach().abs().amax(-1, keepdim=True), 1)
            length = rows.square().sum(-1, keepdim=True).sqrt()
            return rows / torch.where(length > 0, length, 1)
        if self.distance == "hamming":
            soft = (rows / self.params["temperature"]).sigmoid()
            hard = (rows > 0).to(rows.dtype) + (soft - soft.detach())  # with the gradient of the sigmoid
            return hard if self.params["kind"] == "hard" else soft
        if self.distance == "mahalanobis":
            factor = self.factor.to(rows.dtype)
            if factor.dim() == 1:
                return rows * ((factor - factor.detach().amax()) / 2).exp()
            lower = factor.tril(-1) + torch.diag(factor.diagonal().exp())
            return rows @ (lower * torch.exp2(-lower.detach().abs().amax().log2().ceil()))
        return rows

    def _between(self, x: Tensor, w: Tensor) -> Tensor:
        if self.distance == "chebyshev":
            return torch.cdist(x, w, p=math.inf)
        if self.distance == "canberra" or self.power != 1:
            block = max(1, BLOCK_ENTRIES // max(1, x.numel()))
            return torch.cat([checkpoint(self._pairs, x, part, use_reentrant=False) for part in w.split(block)], -1)
        above = taxicab(x, w)
        if self.distance != "braycurtis":
            return above
        sizes = x.abs().sum(-1, keepdim=True)
        below = sizes + w.abs().sum(-1) if self.params["denominator"] == "abs" else taxicab(x, -w)
        return above / torch.maximum(below, (RELATIVE_FLOOR * sizes + DENOMINATOR_FLOOR).detach())

    def _pairs(self, x: Tensor, w: Tensor) -> Tensor:
        """As `_between`, by way of (N, V, D) entries."""
        x = x[:, None]
        apart = (x - w).abs()
        if self.distance == "canberra":
            sizes = x.abs() + w.abs()
            return (apart / torch.where(sizes > 0, sizes, 1)).sum(-1)
        unit = apart.detach().amax(-1)
        unit = torch.where(unit > 0, unit, 1)  # of the largest entry: else high powers are no numbers
        terms = torch.where(apart > 0, apart / unit[..., None], 1).pow(self.power) * (apart > 0)
        total = terms.sum(-1)
        return unit * torch.where(total > 0, total, 1).pow(1 / self.power) * (total > 0)


def _squares(x: Tensor, w: Tensor) -> Tensor:
    """(N, D), (V, D) -> (N, V) |x - w|^2."""
    return x.square().sum(-1, keepdim=True) + w.square().sum(-1) - 2 * (x @ w.t())


def _scaled(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, D) and prototypes (V, D) times the power of two that brings the latter to entries of about 1, which
    changes no probability. Tokens that would be too long then get less: they are equally far from all prototypes.
    """
    sizes = w.detach().abs().amax(-1)
    powers = sizes.frexp().exponent
    typical = powers[sizes > 0].double().mean().nan_to_num().round()
    power = torch.minimum(-typical, LARGEST_ROW - powers.max().double()).clamp(-126, 126)
    own = torch.minimum(power, LONGEST_TOKEN - x.detach().abs().amax(-1, keepdim=True).frexp().exponent)
    return x * torch.exp2(own).to(x.dtype), w * torch.exp2(power).to(w.dtype)


def taxicab(x: Tensor, w: Tensor) -> Tensor:
    """(N, D), (V, D) -> (N, V) sums of |x - w|, of a few columns at a time: one long sum in float32 loses digits."""
    parts = zip(x.split(COLUMNS, -1), w.split(COLUMNS, -1), strict=True)
    return sum((torch.cdist(a, b, p=1) for a, b in parts), x.new_zeros(()))
