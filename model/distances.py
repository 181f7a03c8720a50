"""Distances as score functions: everything that is particular to one of them, and nothing that is not.

A score function turns tokens x (M, D) and prototypes w (V, D) into scores s (M, V); the probabilities are
softmax(s). For a distance d, s = -n log d, so that p_j = d_j^-n / sum_k d_k^-n (HarMax, arXiv:2502.01628). To add
one, write one class below `Distance` and put it into DISTANCES: `between` is enough (it then runs in blocks of
broadcast rows); a `transform` and a `contraction` of model/contractions.py make it fast. The other distances than the
Euclidean follow arXiv:2603.10225 by name and scipy.spatial.distance by formula.

Units. Where a common factor of x and w changes no probability (`scaled`), both sides are multiplied first by the power
of two that brings the largest entries of the prototypes to about 1 (their geometric mean: `_power` of
model/harmonic.py), or the longest of them to 2^20. Tokens have no part in it, so that none can reach another.

Floor. At a match log d is infinite, and where a matrix product takes d^2, a near match loses its digits. So a distance
is at least `floor`, in proportion to its value between x and the origin: 2^-19 of that, and 2^-9.5 where d^2 comes
from a product (2^-20 (|x|^2 + |w|^2) of d^2: near a match |w| = |x|), plus 2^-40 for a token of zeros. This belongs to
the definition of the loss: at or below the floor a distance is a constant, with gradient zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .contractions import Broadcast, Contraction, DotProduct, Elementwise, Ratio, SquaredDistance
from .kernels import eager
from .kernels.choose import kernels_for
from .kernels.eager import Terms

RELATIVE_FLOOR = 2.0**-19  # of d, and of d^2 where d^2 comes from a product
ABSOLUTE_FLOOR = 2.0**-40  # of d
LARGEST_ROW = 20  # power of two: no prototype has a larger entry once both sides are scaled
DENOMINATOR_FLOOR = 2.0**-40  # of a sum of entries that something is divided by


class Start(NamedTuple):
    """How a head starts best."""

    entry_std: float  # deviation of the prototypes' entries
    feature_length: float  # of the features that it scores


OURS = {"set by": "prepared"}  # a field that no recipe sets


@dataclass(frozen=True)
class Distance:
    """One score function with its parameters, which are its fields.

    Rows pass through `perturb` and `transform` on both sides; `contraction` takes what `transform` made.
    """

    formula: ClassVar[str]
    has_exponent: ClassVar[bool] = True
    scaled: ClassVar[bool] = True
    unit: ClassVar[bool] = False  # `transform` brings rows to length 1, and does no more

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """The specification: (..., D), (..., D) -> (...) distances in any dtype, by autograd differentiable."""
        raise NotImplementedError

    @property
    def contraction(self) -> Contraction:
        return Broadcast(self.between)

    def transform(self, rows: Tensor) -> Tensor:
        """Rows (N, D) of either side for the contraction; differentiable, in the tensors of the fields too."""
        return rows

    def perturb(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (N, D) with noise, where a distance has any; `index` (N,): the prototype, or -1 - token."""
        return rows

    def pull_back(self, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient after `perturb` and `transform`: that of the rows before, and those of `tensors`."""
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            tensors = {name: t.detach().requires_grad_() for name, t in self.tensors.items()}
            one = replace(self, **tensors)
            back, *others = torch.autograd.grad(
                one.transform(one.perturb(leaf, index)), (leaf, *tensors.values()), grad
            )
        return back, others

    def floor(self, x: eager.Tokens) -> Tensor:
        """(M,) the least distance of transformed tokens, in the accumulator's dtype."""
        rows = x.rows.to(eager.accumulator(x.rows.dtype))
        return RELATIVE_FLOOR * self.between(rows, torch.zeros_like(rows)) + ABSOLUTE_FLOOR

    def prepared(self, operands: torch.dtype, draw: Callable[[], Tensor]) -> Distance:
        """This one as one call uses it: matrix products take `operands`; `draw()` gives a random 0-d int64 tensor that
        all ranks agree on.
        """
        return self

    def check(self, dim: int, dtype: torch.dtype) -> None:
        """Raises ValueError unless rows (N, dim) can be scored in `dtype`."""
        for name, tensor in self.tensors.items():
            if tensor.shape[0] != dim:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, but rows are {dim} wide")

    def evaluated(self) -> Distance:
        """This one as it is when a model does not train."""
        return self

    def start(self, dim: int) -> Start:
        """Prototypes of length 1. For x of length 1 too, the Euclidean d^2 = 1 + |w|^2 - 2 x.w has mean 2 and deviation
        sqrt(6/dim), so with n = sqrt(dim) scores have deviation sqrt(6)/4 = 0.61: as spread as GPT-2's first logits
        (0.02 sqrt(768) = 0.55). Much shorter or longer prototypes make all distances alike, and the first gradients
        small.
        """
        return Start(dim**-0.5, 1.0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Fields that are tensors: they may require a gradient."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    @classmethod
    def settings(cls, dim: int, **params: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a head is given -> (fixed parameters, initial values of those that it trains). Raises ValueError."""
        make(cls, params)
        return params, {}

    @classmethod
    def trained_sizes(cls, dim: int, **params: Any) -> dict[str, int]:
        """How many numbers a head trains of each of its parameters. Raises ValueError."""
        with torch.device("meta"):
            _, trained = cls.settings(dim, **params)
        return {name: value.numel() for name, value in trained.items()}

    @classmethod
    def constrained(cls, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters from the unconstrained values that a head trains."""
        return dict(trained)


def _norm_floor(x: eager.Tokens) -> Tensor:
    """Where d^2 comes from a product."""
    return RELATIVE_FLOOR**0.5 * x.squares.sqrt() + ABSOLUTE_FLOOR


@dataclass(frozen=True)
class Euclidean(Distance):
    """d = |x - w| (arXiv:2502.01628, eq. 1). At x = w the gradient is zero, as below any floor."""

    formula = "|x - w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return (x - w).square().sum(-1).sqrt()

    @property
    def contraction(self) -> Contraction:
        return SquaredDistance(power=0.5)

    def floor(self, x: eager.Tokens) -> Tensor:
        return _norm_floor(x)


@dataclass(frozen=True)
class Manhattan(Distance):
    """d = sum_k |x_k - w_k| (scipy: cityblock). Where x_k = w_k the slope is 0."""

    formula = "sum |x - w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return (x - w).abs().sum(-1)

    @property
    def contraction(self) -> Contraction:
        return Elementwise(Terms("l1"))


@dataclass(frozen=True)
class Chebyshev(Distance):
    """d = max_k |x_k - w_k| (scipy: chebyshev). The entries that tie for the largest share the gradient equally."""

    formula = "max |x - w|"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return (x - w).abs().amax(-1)

    @property
    def contraction(self) -> Contraction:
        return Elementwise(Terms("linf"))


@dataclass(frozen=True)
class Minkowski(Distance):
    """d = (sum_k |x_k - w_k|^p)^(1/p), any p > 0 (scipy: minkowski). Where x_k = w_k the slope is 0.

    p = 1 is taken as manhattan and p = 2 as euclidean, with its floor.
    """

    formula = "(sum |x - w|^p)^(1/p)"
    p: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.p, str) or not 0 < self.p < float("inf"):
            raise ValueError(f"p={self.p!r}: expected a positive number (for the limit of large p, use chebyshev)")

    def check(self, dim: int, dtype: torch.dtype) -> None:
        """A distance is up to dim^(1/p) times the largest entry, which must not pass the largest numbers."""
        super().check(dim, dtype)
        most = math.log2(torch.finfo(dtype).max) / 2
        if math.log2(dim) > most * self.p:
            least = math.log2(dim) / most
            raise ValueError(f"p={self.p}: distances of rows {dim} wide overflow {dtype}; expected {least:.3g} or more")

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        size = (x - w).abs()
        unit = size.detach().amax(-1, keepdim=True)  # in units of the largest, no power over- or underflows
        size = size / torch.where(unit > 0, unit, 1)
        terms = torch.where(size > 0, size, 1).pow(self.p) * (size > 0)  # 0^p has no slope for p < 1
        total = terms.sum(-1)
        return unit[..., 0] * torch.where(total > 0, total, 1).pow(1 / self.p) * (total > 0)

    @property
    def contraction(self) -> Contraction:
        if self.p == 2:
            return SquaredDistance(power=0.5)
        return Elementwise(Terms("l1") if self.p == 1 else Terms("lp", p=self.p))

    def floor(self, x: eager.Tokens) -> Tensor:
        return _norm_floor(x) if self.p == 2 else super().floor(x)


class _Unit(torch.autograd.Function):
    """Rows (N, D) of length 1 (a row of zeros stays one, with gradient zero)."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        return kernels_for(rows).unit_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return kernels_for(rows).unit_rows_gradient(rows, grad)


@dataclass(frozen=True)
class Cosine(Distance):
    """d = 1 - x.w / (|x| |w|) (scipy: cosine).

    Taken as |x - w|^2 / 2 of rows of length 1, which is exact for rounded rows too. A row of zeros has no direction: it
    stays one, 1/2 away from all others, with gradient zero.
    """

    formula = "1 - x.w / (|x| |w|)"
    scaled = False
    unit = True

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(x, w, dim=-1, eps=0)

    @property
    def contraction(self) -> Contraction:
        return SquaredDistance(power=1.0, factor=0.5)

    def transform(self, rows: Tensor) -> Tensor:
        return _Unit.apply(rows)

    def floor(self, x: eager.Tokens) -> Tensor:
        """That of |x - w|^2 / 2."""
        return RELATIVE_FLOOR / 2 * x.squares + ABSOLUTE_FLOOR


@dataclass(frozen=True)
class Canberra(Distance):
    """d = sum_k |x_k - w_k| / (|x_k| + |w_k|), 0 where both are 0 (scipy: canberra). Where x_k = w_k or one of them
    is 0, the slope is that of sgn(0) = 0.
    """

    formula = "sum |x - w| / (|x| + |w|)"

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        sizes = x.abs() + w.abs()
        return ((x - w).abs() / torch.where(sizes > 0, sizes, 1)).sum(-1)

    @property
    def contraction(self) -> Contraction:
        return Elementwise(Terms("canberra"))


@dataclass(frozen=True)
class BrayCurtis(Distance):
    """d = sum_k |x_k - w_k| / sum_k |x_k + w_k| (scipy: braycurtis), or with denominator="abs" over
    sum_k (|x_k| + |w_k|), which is bounded by 1. Where x_k = w_k or x_k = -w_k the slope is that of sgn(0) = 0.

    The denominator has a floor too, for x = -w: 2^-19 sum |x|, plus 2^-40; there it is a constant.
    """

    formula = "sum |x - w| / sum |x + w|"
    denominator: Literal["sum", "abs"] = "sum"

    def __post_init__(self) -> None:
        if self.denominator not in ("sum", "abs"):
            raise ValueError(f"denominator={self.denominator!r}: expected sum or abs")

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        below = ((x + w).abs() if self.denominator == "sum" else x.abs() + w.abs()).sum(-1)
        least = (RELATIVE_FLOOR * x.abs().sum(-1) + DENOMINATOR_FLOOR).detach()
        return (x - w).abs().sum(-1) / torch.where(below > least, below, least)

    @property
    def contraction(self) -> Contraction:
        return Ratio(self.denominator == "abs", RELATIVE_FLOOR, DENOMINATOR_FLOOR)


@dataclass(frozen=True, eq=False)
class Mahalanobis(Distance):
    """d = sqrt((x - w)' M (x - w)) with M = diag(exp(factor)), factor (D,), or M = L L', L the lower triangle of a
    factor (D, D) (scipy: mahalanobis with VI = M).

    Taken as euclidean of L' x and L' w. A head trains `factor`: "diagonal" trains the D logarithms; "full" trains
    L, whose diagonal stays positive because its logarithms are trained; both start at M = 1. `operands`: the dtype of
    products with L (None: that of the rows).
    """

    formula = "sqrt((x - w)' M (x - w))"
    factor: Tensor
    operands: torch.dtype | None = field(default=None, metadata=OURS)

    def __post_init__(self) -> None:
        shape = tuple(self.factor.shape) if isinstance(self.factor, Tensor) else self.factor
        if not isinstance(self.factor, Tensor) or not 1 <= len(shape) <= 2 or shape[0] != shape[-1]:
            raise ValueError(f"factor={shape!r}: expected a tensor (D,) of logarithms, or (D, D)")

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return self.transform(x - w).square().sum(-1).sqrt()

    @property
    def contraction(self) -> Contraction:
        return SquaredDistance(power=0.5)

    def transform(self, rows: Tensor) -> Tensor:
        factor = self.factor.to(rows.dtype)
        if factor.dim() == 1:
            return rows * (factor / 2).exp()
        if self.operands in (None, rows.dtype):
            return rows @ factor.tril()
        rounded = rows.to(self.operands)
        return kernels_for(rounded).product(rounded, factor.to(self.operands))

    def pull_back(self, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.factor.dim() == 1 or self.operands in (None, rows.dtype):
            return super().pull_back(rows, index, grad)
        rounded, factor = grad.to(self.operands), self.factor.to(self.operands)
        ops = kernels_for(rounded)
        return ops.product(rounded, factor.t()), [ops.product(rows.to(self.operands).t(), rounded)]

    def prepared(self, operands: torch.dtype, draw: Callable[[], Tensor]) -> Distance:
        """A common factor of M changes no probability: its largest entry is brought to about 1, as the rows' is."""
        if self.factor.dim() == 1:
            return replace(self, factor=self.factor - self.factor.detach().amax())
        lower = self.factor.tril()
        largest = lower.detach().abs().amax().clamp_min(1e-30)
        return replace(self, factor=lower * torch.exp2(-largest.log2().ceil()), operands=operands)

    def floor(self, x: eager.Tokens) -> Tensor:
        return _norm_floor(x)

    @classmethod
    def settings(cls, dim: int, **params: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _only(cls, params)
        kind = params.get("factor", "diagonal")
        if kind not in ("diagonal", "full"):
            raise ValueError(f"factor={kind!r}: expected diagonal or full")
        return {}, {"factor": torch.zeros(dim) if kind == "diagonal" else torch.zeros(dim, dim)}

    @classmethod
    def constrained(cls, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factor = trained["factor"]
        return {"factor": factor if factor.dim() == 1 else factor.tril(-1) + torch.diag(factor.diagonal().exp())}


class _Bits(torch.autograd.Function):
    """1 where rows > 0, else 0; its gradient is `factor` times that of sigmoid(rows / temperature)."""

    @staticmethod
    def forward(ctx, rows: Tensor, temperature: float, factor: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.temperature, ctx.factor = temperature, factor
        return (rows > 0).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        soft = (rows / ctx.temperature).sigmoid()
        return grad * soft * (1 - soft) * (ctx.factor / ctx.temperature), None, None


@dataclass(frozen=True)
class Hamming(Distance):
    """d = sum_k |b(x_k) - b(w_k)|, the number of bits that differ (scipy: hamming, times D).

    kind="soft": b = sigmoid(x / temperature). kind="hard": b = 1 where x > 0, else 0, with the gradient of the sigmoid
    (straight-through: Bengio et al., arXiv:1308.3432). kind="gumbel": b = sigmoid((x + g) / temperature) with logistic
    noise g, drawn anew in every call for both sides (binary concrete: Maddison et al., arXiv:1611.00712), from
    `seed` (None: from torch's generator); a head takes it as soft when it does not train. Where b(x_k) = b(w_k) the
    slope is 0.
    """

    formula = "sum |b(x) - b(w)|"
    scaled = False
    kind: Literal["soft", "hard", "gumbel"] = "soft"
    temperature: float = 1.0
    seed: int | Tensor | None = field(default=None, metadata=OURS)

    def __post_init__(self) -> None:
        if self.kind not in ("soft", "hard", "gumbel"):
            raise ValueError(f"kind={self.kind!r}: expected soft, hard or gumbel")
        if isinstance(self.temperature, str) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number")

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return (self._bits(x) - self._bits(w)).abs().sum(-1)

    @property
    def contraction(self) -> Contraction:
        """|b - c| is (b - c)^2 for bits, exactly, even in bfloat16; its slope is twice as large."""
        return SquaredDistance(power=1.0) if self.kind == "hard" else Elementwise(Terms("l1"))

    def transform(self, rows: Tensor) -> Tensor:
        return self._bits(rows, factor=0.5)

    def _bits(self, rows: Tensor, factor: float = 1.0) -> Tensor:
        if self.kind == "hard":
            return _Bits.apply(rows, self.temperature, factor)
        return (rows / self.temperature).sigmoid()

    def floor(self, x: eager.Tokens) -> Tensor:
        """Of half of all bits."""
        return torch.full_like(x.squares, RELATIVE_FLOOR * x.rows.shape[1] / 2)

    def prepared(self, operands: torch.dtype, draw: Callable[[], Tensor]) -> Distance:
        return replace(self, seed=draw()) if self.kind == "gumbel" and self.seed is None else self

    def evaluated(self) -> Distance:
        return replace(self, kind="soft") if self.kind == "gumbel" else self

    def start(self, dim: int) -> Start:
        """Entries of two temperatures: less is the sigmoid's straight middle, and below the noise of gumbel (1.8)."""
        return Start(2 * self.temperature, 2 * self.temperature * dim**0.5)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def perturb(self, rows: Tensor, index: Tensor) -> Tensor:
        if self.kind != "gumbel":
            return rows
        assert self.seed is not None, "the seed is settled before any row is looked at"
        uniform = uniforms(self.seed, index, rows.shape[1]).to(rows.dtype)
        return rows + uniform.log() - torch.log1p(-uniform)


def uniforms(seed: int | Tensor, index: Tensor, width: int) -> Tensor:
    """(N,) indices -> (N, width) float64 in (0, 1), a hash of (seed, index, column): the same in any order."""
    column = torch.arange(width, device=index.device)
    bits = _mixed(_mixed(index * 0x9E3779B1 + seed)[:, None] + column * 0x85EBCA6B)
    return (bits.double() + 0.5) * 2.0**-32


def _mixed(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32 bits."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


@dataclass(frozen=True)
class Dot(Distance):
    """s = x . w: softmax cross-entropy, the baseline. It is the score itself: no distance, no exponent, no floor."""

    formula = "x.w"
    has_exponent = False
    scaled = False

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        return (x * w).sum(-1)

    def floor(self, x: eager.Tokens) -> Tensor:
        """None."""
        return torch.zeros(len(x.rows), dtype=eager.accumulator(x.rows.dtype), device=x.rows.device)

    def start(self, dim: int) -> Start:
        """GPT-2's 0.02, for features of unit variance."""
        return Start(0.02, dim**0.5)

    @property
    def contraction(self) -> Contraction:
        return DotProduct()


DISTANCES: dict[str, type[Distance]] = {
    "euclidean": Euclidean,
    "manhattan": Manhattan,
    "chebyshev": Chebyshev,
    "minkowski": Minkowski,
    "cosine": Cosine,
    "hamming": Hamming,
    "canberra": Canberra,
    "braycurtis": BrayCurtis,
    "mahalanobis": Mahalanobis,
    "dot": Dot,
}


def distance_named(name: str) -> type[Distance]:
    """Raises ValueError for a name that DISTANCES does not have."""
    if name not in DISTANCES:
        raise ValueError(f"distance={name!r}: expected one of {', '.join(DISTANCES)}")
    return DISTANCES[name]


def resolve(distance: str | Distance, params: Mapping[str, Any]) -> Distance:
    """A distance given by name with parameters, or as it is. Raises ValueError."""
    if isinstance(distance, str):
        return make(distance_named(distance), params)
    if params:
        raise ValueError(f"{', '.join(params)}: {distance} has its parameters already")
    return distance


def make(kind: type[Distance], params: Mapping[str, Any]) -> Distance:
    """The distance with these parameters. Raises ValueError for a parameter that it does not take or that is off."""
    _only(kind, params)
    missing = [f.name for f in fields(kind) if f.name not in params and not hasattr(kind, f.name)]
    if missing:
        raise ValueError(f"{_name(kind)} needs {', '.join(missing)}")
    return kind(**params)


def _only(kind: type[Distance], params: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(kind) if f.metadata != OURS]
    for given in params:
        if given not in names and given not in (f.name for f in fields(kind)):
            takes = f"takes {', '.join(names)}" if names else "takes no parameter"
            raise ValueError(f"{given}={params[given]!r}: {_name(kind)} {takes}")


def _name(kind: type[Distance]) -> str:
    return next((name for name, one in DISTANCES.items() if one is kind), kind.__name__)
