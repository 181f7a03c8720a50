"""HarmonicHead: prototypes, exponent and loss as one module. It knows nothing of language: any classification will
do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .distance_settings import find, settings_of
from .distances import DISTANCES, Distance, make, resolve
from .harmonic import harmonic_log_probs, harmonic_loss, harmonic_predictions
from .options import LossOptions
from .vocab_parallel import VocabShard, full_rows, lookup, rows_of

GPT2_STD = 0.02  # of all weights of GPT-2, at any width
INIT_BLOCK = 1024  # rows that share a random stream, so that a shard draws its own rows and no others


class HarmonicHead(nn.Module):
    """Scores (N, dim) features against `num_prototypes` prototypes; a linear layer and cross-entropy for
    `distance="dot"`.

    Features of about `feature_length` (1 for most distances) give the best start: multiply features of unit variance by
    feature_length / sqrt(dim).

    Args:
        num_prototypes: classes V, of the whole vocabulary group.
        dim: width D of features and prototypes.
        distance: a name in `model.distances.DISTANCES`, or a distance of yours with its parameters.
        exponent: n > 0; "sqrt_dim"; "learned" (starts at sqrt(dim), stays positive; one scalar, replicated); or a pair
            (first, last) that the attribute `progress`, from 0 to 1, moves between: set it as training goes on. None:
            the distance's own, sqrt_dim; cosine_softmax: learned; squared_euclidean_softmax: sqrt(dim) / 4, where a
            learned one starts too.
        exponent_start: of a learned exponent; None: the distance's own.
        shard: the rows of this rank (`model.vocab_parallel.shard_of`); None: all.
        init_std: deviation of the initial entries; "gpt2": GPT2_STD; None: the distance's own (`Distance.start`).
        feature_length: what the attribute of that name tells; None: the distance's own (`Distance.start`).
        seed: of the initial prototypes, which do not depend on the sharding; None: drawn from torch's global generator.
        chunk_bytes: budget of the loss's working memory; None: `model.chunks.CHUNK_BYTES`.
        fused: whether a GPU takes the product and the passes over its scores in one; None: see
            `model.harmonic.harmonic_loss`.
        label_smoothing: of the loss in training; out of it (`eval()`) the loss is the negative log-likelihood.
        z_loss: likewise. See `model.options.LossOptions`.
        soft_cap: of the scores, always. See `model.options.LossOptions`.
        params: the distance's own: minkowski `p`; hamming `kind`, `temperature`; braycurtis `denominator`; mahalanobis
            `factor`, "diagonal" or "full", which the head trains. See model/distances.py.

    Raises:
        ValueError: an unknown distance or parameter, a distance with tensors of its own (which a head makes and trains,
            if it is given the name), an exponent that is not positive, or an option out of range or without sense.
    """

    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        *,
        distance: str | Distance = "euclidean",
        exponent: float | Literal["sqrt_dim", "learned"] | tuple[float, float] | None = None,
        exponent_start: float | None = None,
        shard: VocabShard | None = None,
        init_std: float | Literal["gpt2"] | None = None,
        feature_length: float | None = None,
        seed: int | None = None,
        chunk_bytes: int | None = None,
        fused: bool | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        soft_cap: float | None = None,
        device: torch.device | str | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        if isinstance(distance, Distance):
            self._kind, params = type(distance), _own_params(distance, params)
            trained, distance = distance.trained(dim), self._kind.__name__.lower()
        else:
            self._kind = find(distance, DISTANCES)
            trained = settings_of(distance, params).trained(dim)
        self._fixed = {name: value for name, value in params.items() if name not in trained}
        self.shard = shard or VocabShard(0, num_prototypes)
        self.distance, self.chunk_bytes, self.fused = distance, chunk_bytes, fused
        rows = rows_of(num_prototypes, self.shard.ranks)
        self.prototypes = nn.Parameter(torch.zeros(rows, dim, device=device))
        self._trained = list(trained)
        for name, shape in trained.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))
        start = self.score_function.start(dim)
        self.feature_length = start.feature_length if feature_length is None else feature_length
        self.init_std = start.entry_std if init_std is None else _std(init_std)
        self.progress = 0.0
        self.options = LossOptions(label_smoothing, z_loss, soft_cap)
        self.options.check(self.score_function)
        own = exponent_start or self.score_function.first_exponent(dim)
        if exponent_start is not None and not ((exponent or self._kind.exponent) == "learned" and exponent_start > 0):
            raise ValueError(f"exponent_start={exponent_start}: expected a positive number, of a learned exponent")
        self.exponents = _ends(self._kind.exponent if exponent is None else exponent, dim, own)
        self.log_exponent: nn.Parameter | None = None
        if (exponent or self._kind.exponent) == "learned" and self.has_exponent:
            self.log_exponent = nn.Parameter(torch.tensor(math.log(self.exponents[0]), device=device))
        self.reset_parameters(int(torch.randint(2**31, (), device="cpu")) if seed is None else seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws this rank's rows; the same prototypes for every sharding."""
        if self.prototypes.is_meta:
            return
        first = self.shard.start // INIT_BLOCK * INIT_BLOCK
        for block in range(first, self.shard.stop, INIT_BLOCK):
            # times a large odd number, or another seed's block would have the stream of this one's
            stream = torch.Generator().manual_seed((seed * 2654435761 + block) % 2**63)
            drawn = torch.randn(INIT_BLOCK, self.prototypes.shape[1], generator=stream, device="cpu") * self.init_std
            low, high = max(block, self.shard.start), min(block + INIT_BLOCK, self.shard.stop)
            self.prototypes[low - self.shard.start : high - self.shard.start] = drawn[low - block : high - block]

    @property
    def exponent(self) -> Tensor | float:
        """n now: a number, or a scalar that is learned."""
        if self.log_exponent is not None:
            return self.log_exponent.exp()
        first, last = self.exponents
        return first + (last - first) * self.progress

    @property
    def has_exponent(self) -> bool:
        """Whether the exponent means anything: the softmax baseline has none."""
        return self._kind.has_exponent

    @property
    def score_function(self) -> Distance:
        """The distance with its parameters, the trained ones included, as it is in training or out of it."""
        trained = {name: getattr(self, name) for name in self._trained}
        entry = make(self._kind, {**self._fixed, **self._kind.constrained(trained)})
        return entry if self.training else entry.evaluated()

    def forward(self, hidden: Tensor, targets: Tensor, reduction: str = "mean", ignore_index: int = -100) -> Tensor:
        """hidden (..., D), targets (...) -> scalar loss, or (N,) for "none": see `model.harmonic.harmonic_loss`."""
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "fused": self.fused}
        if self.training:
            options |= {"label_smoothing": self.options.label_smoothing, "z_loss": self.options.z_loss}
        return self._scored(harmonic_loss, hidden, targets, **options)

    def score(self, hidden: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
        """hidden (..., D), targets (...) -> losses (N,) and most probable prototypes (N,), in one pass without
        gradient: see `model.harmonic.harmonic_predictions`. Every rank of the group calls it.
        """
        return self._scored(harmonic_predictions, hidden, targets, ignore_index=ignore_index)

    def _scored(self, function: Callable[..., Any], hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        return function(
            hidden.reshape(-1, hidden.shape[-1]),
            self.prototypes,
            targets.reshape(-1),
            distance=self.score_function,
            exponent=self.exponent,
            shard=self.shard,
            chunk_bytes=self.chunk_bytes,
            soft_cap=self.options.soft_cap,
            **options,
        )

    def predict(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) most probable prototypes; of equally probable ones the first. Every rank of the group calls
        it, with as many.
        """
        ignored = torch.full(hidden.shape[:-1], -100, device=hidden.device)
        return self.score(hidden, ignored)[1].view(hidden.shape[:-1])

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) log-probabilities of the whole vocabulary, without gradient. Every rank of the group
        calls it.
        """
        rows = full_rows(self.prototypes, self.shard)
        flat = hidden.reshape(-1, hidden.shape[-1])
        given: dict[str, Any] = {"exponent": self.exponent, "soft_cap": self.options.soft_cap}
        log_probs = harmonic_log_probs(flat, rows, distance=self.score_function.evaluated(), **given)
        return log_probs.view(*hidden.shape[:-1], -1)

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) tokens -> (..., D): the prototypes as a tied embedding, by vocabulary-parallel lookup."""
        return lookup(self.prototypes, tokens, self.shard)

    def extra_repr(self) -> str:
        """What print shows: prototypes of the whole group, width, distance, and the exponent as it is now."""
        exponent = f", exponent={torch.as_tensor(self.exponent).item():.4g}" if self.has_exponent else ""
        given = {name: value for name, value in asdict(self.options).items() if value}
        options = "".join(f", {name}={value:g}" for name, value in given.items())
        return f"{self.shard.size}, {self.prototypes.shape[1]}, distance={self.distance}{exponent}{options}"


def _own_params(distance: Distance, params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a distance that is given as it is. Raises ValueError for `params` beside it, and where it has tensors."""
    if distance.tensors:
        raise ValueError(f"{', '.join(distance.tensors)} of {distance} would not be trained; give the distance by name")
    return {f.name: getattr(distance, f.name) for f in fields(resolve(distance, params))}


def _std(given: float | str) -> float:
    """The deviation, or that of a start with a name. Raises ValueError."""
    if given == "gpt2":
        return GPT2_STD
    if isinstance(given, str) or not given > 0:
        raise ValueError(f"init_std={given!r}: expected a positive number, or gpt2")
    return given


def _ends(exponent: float | str | tuple[float, float] | None, dim: int, own: float) -> tuple[float, float]:
    """The first and the last exponent; `own`: the distance's. Raises ValueError."""
    if exponent is None or exponent == "learned":
        return own, own
    if isinstance(exponent, str):
        if exponent != "sqrt_dim":
            raise ValueError(f"exponent={exponent!r}: expected a positive number, sqrt_dim, learned or a pair")
        return math.sqrt(dim), math.sqrt(dim)
    first, last = exponent if isinstance(exponent, tuple | list) else (exponent, exponent)
    if not (first > 0 and last > 0):
        raise ValueError(f"exponent={exponent}: expected a positive number, sqrt_dim, learned or a pair")
    return float(first), float(last)
