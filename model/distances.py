"""Distances as score functions: everything that is particular to one of them, and nothing that is not.

A score function turns tokens x (M, D) and prototypes w (V, D) into scores s (M, V); the probabilities are
softmax(s). For a distance d, s = -n log d, so that p_j = d_j^-n / sum_k d_k^-n (HarMax, arXiv:2502.01628); the softmax
heads have scores that are linear in a product or in d^2 (`Distance.slope`). To add
one, write one class below `Distance` and enter it in DISTANCES: `between` is enough (it then runs in blocks of
broadcast rows); a `transform` and a `contraction` of model/contractions.py make it fast. One that recipes shall name
without torch is entered here by `@entry`, and in SETTINGS of model/distance_settings.py. The other distances than the
Euclidean follow arXiv:2603.10225 by name and scipy.spatial.distance by formula.

Units and floors: model/distance_base.py. The specification: model/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .contractions import Contraction, DotProduct, Elementwise, LinearSquares, Ratio, SquaredDistance
from .distance_base import ABSOLUTE_FLOOR, RELATIVE_FLOOR, Distance, Start, norm_floor
from .distance_settings import (
    DISTANCES,
    INTERNAL,
    SETTINGS,
    BrayCurtisSettings,
    CosineSettings,
    CosineSoftmaxSettings,
    DotSettings,
    HammingSettings,
    MinkowskiSettings,
    RatioSettings,
    SquaredEuclideanSoftmaxSettings,
    find,
    make,
)
from .kernels import choose, eager
from .kernels.eager_elementwise import Terms
from .row_functions import Bits, UnitRows, uniforms

DENOMINATOR_FLOOR = 2.0**-40  # of a sum of entries that something is divided by

D = TypeVar("D", bound=Distance)


def resolve(distance: str | Distance, params: Mapping[str, Any]) -> Distance:
    """A distance given by name with parameters, or as it is. Raises ValueError."""
    if isinstance(distance, str):
        return make(find(distance, DISTANCES), params, distance)
    if params:
        raise ValueError(f"{', '.join(params)}: {distance} has its parameters already")
    return distance


def entry(name: str) -> Callable[[type[D]], type[D]]:
    """Enters a class in DISTANCES under a name that SETTINGS has."""
    assert name in SETTINGS, f"{name}: enter it in SETTINGS of model/distance_settings.py too"

    def enter(kind: type[D]) -> type[D]:
        DISTANCES[name] = kind
        return kind

    return enter


@entry("euclidean")
@dataclass(frozen=True)
class Euclidean(Distance):
    """d = |x - w| (arXiv:2502.01628, eq. 1). At x = w the gradient is zero, as below any floor."""

    formula = "|x - w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) lengths of x - w."""
        return (x - w).square().sum(-1).sqrt()

    @property
    def contraction(self) -> Contraction:
        """One matrix product: d = q^(1/2) of q = |x|^2 + |w|^2 - 2 x.w."""
        return SquaredDistance(power=0.5)

    def floor(self, x: eager.Tokens) -> Tensor:
        """(M,) about 2^-9.5 |x|: nearer, the product's cancellation leaves hardly a digit of q."""
        return norm_floor(x)


@entry("manhattan")
@dataclass(frozen=True)
class Manhattan(Distance):
    """d = sum_k |x_k - w_k| (scipy: cityblock). Where x_k = w_k the slope is 0."""

    formula = "sum |x - w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) sums of absolute differences."""
        return (x - w).abs().sum(-1)

    @property
    def contraction(self) -> Contraction:
        """Entry by entry: no product gives absolute values."""
        return Elementwise(Terms("l1"))


@entry("chebyshev")
@dataclass(frozen=True)
class Chebyshev(Distance):
    """d = max_k |x_k - w_k| (scipy: chebyshev). The entries that tie for the largest share the gradient equally."""

    formula = "max |x - w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) largest absolute differences."""
        return (x - w).abs().amax(-1)

    @property
    def contraction(self) -> Contraction:
        """Entry by entry, as a running maximum."""
        return Elementwise(Terms("linf"))


@entry("minkowski")
@dataclass(frozen=True)
class Minkowski(MinkowskiSettings, Distance):
    """d = (sum_k |x_k - w_k|^p)^(1/p), any p > 0 (scipy: minkowski). Where x_k = w_k the slope is 0.

    p = 1 is taken as manhattan and p = 2 as euclidean, with its floor.
    """

    formula = "(sum |x - w|^p)^(1/p)"

    def check(self, dim: int, dtype: torch.dtype) -> None:
        """And unless distances stay below the largest numbers."""
        super().check(dim, dtype)
        self.check_width(dim, torch.finfo(dtype).max)

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) p-norms of x - w."""
        size = (x - w).abs()
        unit = size.detach().amax(-1, keepdim=True)  # in units of the largest, no power over- or underflows
        size = size / torch.where(unit > 0, unit, 1)
        terms = torch.where(size > 0, size, 1).pow(self.p) * (size > 0)  # 0^p has no slope for p < 1
        total = terms.sum(-1)
        return unit[..., 0] * torch.where(total > 0, total, 1).pow(1 / self.p) * (total > 0)

    @property
    def contraction(self) -> Contraction:
        """Entry by entry; p = 1 and p = 2 are served as the distances that they are."""
        if self.p == 2:
            return SquaredDistance(power=0.5)
        return Elementwise(Terms("l1") if self.p == 1 else Terms("lp", p=self.p))

    def floor(self, x: eager.Tokens) -> Tensor:
        """(M,) that of a product where p = 2, else that of all distances."""
        return norm_floor(x) if self.p == 2 else super().floor(x)


@entry("cosine")
@dataclass(frozen=True)
class Cosine(CosineSettings, Distance):
    """d = 1 - x.w / (|x| |w|) (scipy: cosine).

    Taken as |x - w|^2 / 2 of rows of length 1, which is exact for rounded rows too. A row of zeros has no direction: it
    stays one, 1/2 away from all others, with gradient zero.
    """

    formula = "1 - x.w / (|x| |w|)"
    unit = True

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) 1 less the cosines of the angles."""
        return (_direction(x) - _direction(w)).square().sum(-1) / 2

    @property
    def contraction(self) -> Contraction:
        """One matrix product of rows of length 1: d = q / 2."""
        return SquaredDistance(power=1.0, factor=0.5)

    def transform(self, rows: Tensor) -> Tensor:
        """(N, D) rows of length 1."""
        return UnitRows.apply(rows)

    def floor(self, x: eager.Tokens) -> Tensor:
        """(M,) that of |x - w|^2 / 2."""
        return RELATIVE_FLOOR / 2 * x.squares + ABSOLUTE_FLOOR


@entry("hamming")
@dataclass(frozen=True)
class Hamming(HammingSettings, Distance):
    """d = sum_k |b(x_k) - b(w_k)|, the number of bits that differ (scipy: hamming, times D).

    kind="soft": b = sigmoid(x / temperature). kind="hard": b = 1 where x > 0, else 0, with the gradient of the sigmoid
    (straight-through: Bengio et al., arXiv:1308.3432). kind="gumbel": b = sigmoid((x + g) / temperature) with logistic
    noise g, drawn anew in every call for both sides (binary concrete: Maddison et al., arXiv:1611.00712), from
    `seed` (None: from torch's generator); a head takes it as soft when it does not train. Where b(x_k) = b(w_k) the
    slope is 0.
    """

    formula = "sum |b(x) - b(w)|"
    seed: int | Tensor | None = field(default=None, metadata=INTERNAL)

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) numbers of differing bits, up to D."""
        return (self._bits(x) - self._bits(w)).abs().sum(-1)

    @property
    def contraction(self) -> Contraction:
        """|b - c| is (b - c)^2 for bits, exactly, even in bfloat16; its slope is twice as large."""
        return SquaredDistance(power=1.0) if self.kind == "hard" else Elementwise(Terms("l1"))

    def transform(self, rows: Tensor) -> Tensor:
        """(N, D) bits. Of hard ones half the slope: that of (b - c)^2 is twice that of |b - c|."""
        return self._bits(rows, factor=0.5)

    def _bits(self, rows: Tensor, factor: float = 1.0) -> Tensor:
        if self.kind == "hard":
            return Bits.apply(rows, self.temperature, factor)
        return (rows / self.temperature).sigmoid()

    def floor(self, x: eager.Tokens) -> Tensor:
        """(M,) 2^-19 of half of all bits, whatever the token."""
        return torch.full_like(x.squares, RELATIVE_FLOOR * x.rows.shape[1] / 2)

    def prepared(self, operands: torch.dtype, draw: Callable[[], Tensor]) -> Distance:
        """Draws the seed of this call's noise, the same on all ranks."""
        return replace(self, seed=draw()) if self.kind == "gumbel" and self.seed is None else self

    def evaluated(self) -> Distance:
        """Without noise: gumbel becomes soft."""
        return replace(self, kind="soft") if self.kind == "gumbel" else self

    def start(self, dim: int) -> Start:
        """Entries of two temperatures: less is the sigmoid's straight middle, and below the noise of gumbel (1.8)."""
        return Start(2 * self.temperature, 2 * self.temperature * dim**0.5)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Empty: a seed that is a tensor has no gradient."""
        return {}

    def perturb(self, rows: Tensor, index: Tensor) -> Tensor:
        """(N, D) rows with logistic noise, log(u / (1 - u)) of uniform u, each row's by its index."""
        if self.kind != "gumbel":
            return rows
        assert self.seed is not None, "the seed is settled before any row is looked at"
        uniform = uniforms(self.seed, index, rows.shape[1]).to(rows.dtype)
        return rows + uniform.log() - torch.log1p(-uniform)


@entry("canberra")
@dataclass(frozen=True)
class Canberra(RatioSettings, Distance):
    """d = sum_k |x_k - w_k| / (|x_k| + |w_k|), 0 where both are 0 (scipy: canberra). Where x_k = w_k or one of them
    is 0, the slope is that of sgn(0) = 0.
    """

    formula = "sum |x - w| / (|x| + |w|)"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) sums of relative differences, up to D."""
        sizes = x.abs() + w.abs()
        return ((x - w).abs() / torch.where(sizes > 0, sizes, 1)).sum(-1)

    @property
    def contraction(self) -> Contraction:
        """Entry by entry."""
        return Elementwise(Terms("canberra"))


@entry("braycurtis")
@dataclass(frozen=True)
class BrayCurtis(BrayCurtisSettings, Distance):
    """d = sum_k |x_k - w_k| / sum_k |x_k + w_k| (scipy: braycurtis), or with denominator="abs" over
    sum_k (|x_k| + |w_k|), which is bounded by 1. Where x_k = w_k or x_k = -w_k the slope is that of sgn(0) = 0.

    The denominator has a floor too, for x = -w: 2^-19 sum |x|, plus 2^-40; there it is a constant.
    """

    formula = "sum |x - w| / sum |x + w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) ratios of two sums over the entries."""
        below = ((x + w).abs() if self.denominator == "sum" else x.abs() + w.abs()).sum(-1)
        least = (RELATIVE_FLOOR * x.abs().sum(-1) + DENOMINATOR_FLOOR).detach()
        return (x - w).abs().sum(-1) / torch.where(below > least, below, least)

    @property
    def contraction(self) -> Contraction:
        """Entry by entry: one sum over differences, and one of the denominator."""
        return Ratio(self.denominator == "abs", RELATIVE_FLOOR, DENOMINATOR_FLOOR)


@entry("mahalanobis")
@dataclass(frozen=True, eq=False)
class Mahalanobis(Euclidean):
    """d = sqrt((x - w)' M (x - w)) with M = diag(exp(factor)), factor (D,), or M = L L', L the lower triangle of a
    factor (D, D) (scipy: mahalanobis with VI = M).

    Taken as euclidean of L' x and L' w. A head trains `factor`: "diagonal" trains the D logarithms; "full" trains
    L, whose diagonal stays positive because its logarithms are trained; both start at M = 1. `operands`: the dtype of
    products with L (None: that of the rows).
    """

    formula = "sqrt((x - w)' M (x - w))"
    factor: Tensor
    operands: torch.dtype | None = field(default=None, metadata=INTERNAL)

    def __post_init__(self) -> None:
        shape = tuple(self.factor.shape) if isinstance(self.factor, Tensor) else self.factor
        if not isinstance(self.factor, Tensor) or not 1 <= len(shape) <= 2 or shape[0] != shape[-1]:
            raise ValueError(f"factor={shape!r}: expected a tensor (D,) of logarithms, or (D, D)")

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) lengths of L' (x - w)."""
        return self.transform(x - w).square().sum(-1).sqrt()

    def transform(self, rows: Tensor) -> Tensor:
        """(N, D) L' of each row: rows times the root of the diagonal, or times the lower triangle."""
        factor = self.factor.to(rows.dtype)
        if factor.dim() == 1:
            return rows * (factor / 2).exp()
        if self.operands in (None, rows.dtype):
            return rows @ factor.tril()
        rounded = rows.to(self.operands)
        return choose.kernels_for(rounded).product(rounded, factor.to(self.operands))

    def pull_back(self, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A triangle's products by the kernels, rounded as on the way in; all else by autograd."""
        if self.factor.dim() == 1 or self.operands in (None, rows.dtype):
            return super().pull_back(rows, index, grad)
        rounded, factor = grad.to(self.operands), self.factor.to(self.operands)
        ops = choose.kernels_for(rounded)
        return ops.product(rounded, factor.t()), [ops.product(rows.to(self.operands).t(), rounded)]

    def prepared(self, operands: torch.dtype, draw: Callable[[], Tensor]) -> Distance:
        """A common factor of M changes no probability: its largest entry is brought to about 1, as the rows' is."""
        if self.factor.dim() == 1:
            return replace(self, factor=self.factor - self.factor.detach().amax())
        return replace(self, factor=self.factor.tril() * torch.exp2(-self._power()), operands=operands)

    def _power(self) -> Tensor:
        """0-d, of two: the least that is no less than the largest entry of the triangle."""
        return self.factor.detach().tril().abs().amax().clamp_min(1e-30).log2().ceil()

    def log_unit(self) -> Tensor:
        """Half of the largest logarithm of a diagonal, or that of the triangle's power of two."""
        return self.factor.detach().amax() / 2 if self.factor.dim() == 1 else self._power() * math.log(2)

    @classmethod
    def constrained(cls, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factor as it is, or the triangle with the exponential of its diagonal."""
        factor = trained["factor"]
        return {"factor": factor if factor.dim() == 1 else factor.tril(-1) + torch.diag(factor.diagonal().exp())}


@entry("dot")
@dataclass(frozen=True)
class Dot(DotSettings, Distance):
    """s = x . w: softmax cross-entropy, the baseline. It is the score itself: no distance, no exponent, no floor."""

    formula = "x.w"
    slope = 1

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) products."""
        return (x * w).sum(-1)

    def start(self, dim: int) -> Start:
        """Prototypes as under every distance, features of unit variance."""
        return Start(dim**-0.5, dim**0.5)

    @property
    def contraction(self) -> Contraction:
        """One matrix product, which is the score."""
        return DotProduct()


@entry("cosine_softmax")
@dataclass(frozen=True)
class CosineSoftmax(CosineSoftmaxSettings, Distance):
    """s = n cos(x, w): softmax over cosines (Wang et al., arXiv:1704.06369), n the inverse temperature, learned where
    none is given. A control: lengths do not count, as with `cosine`, and no distance is taken. A row of zeros has no
    direction: its cosines are 0, and so is its gradient.
    """

    formula = "cos(x, w)"
    slope = 1
    unit = True

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) cosines of the angles."""
        return (_direction(x) * _direction(w)).sum(-1)

    @property
    def contraction(self) -> Contraction:
        """One matrix product of rows of length 1, times n."""
        return DotProduct(scaled=True)

    def transform(self, rows: Tensor) -> Tensor:
        """(N, D) rows of length 1."""
        return UnitRows.apply(rows)


@entry("squared_euclidean_softmax")
@dataclass(frozen=True)
class SquaredEuclideanSoftmax(SquaredEuclideanSoftmaxSettings, Distance):
    """s = -n |x - w|^2: softmax over squared distances, as prototypical networks (Snell et al., arXiv:1703.05175) and
    Gaussian classes of one width have it. A control: distances count, but so does their unit. There is no floor. n is
    fixed where none is given: see its settings.
    """

    formula = "|x - w|^2"
    slope = -1

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """(..., D), (..., D) -> (...) squared lengths of x - w."""
        return (x - w).square().sum(-1)

    @property
    def contraction(self) -> Contraction:
        """One matrix product: q = |x|^2 + |w|^2 - 2 x.w."""
        return LinearSquares()


def _direction(rows: Tensor) -> Tensor:
    """(..., D) rows of length 1; zeros stay zeros, with gradient zero."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0)
