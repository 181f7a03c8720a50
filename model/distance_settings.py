"""What a recipe may say of a distance: its name, its parameters and their values, and what a head trains of it.

Without torch, so that a config is checked and a plan is made without it; model/distances.py has the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from .distance_base import Distance

FLOAT32_MOST = (2 - 2**-23) * 2.0**127
MOST_POWER = 1e4  # beyond it a power of two float32 numbers next to each other is all or nothing
HOTTEST = 1e6  # and its inverse the coldest: in between, twice the temperature and entries over it are float32 numbers
INTERNAL = {"set by": "the distance itself"}  # metadata of a field that no recipe sets


@dataclass(frozen=True)
class Settings:
    """A distance's parameters, which are its fields. Raises ValueError for a value that is off."""

    has_exponent: ClassVar[bool] = True
    exponent: ClassVar[str | None] = "sqrt_dim"  # where none is given, as a word; None: `first_exponent` as a number
    scaled: ClassVar[bool] = True  # a common factor a of x and w changes no probability,
    degree: ClassVar[int] = 1  # and a distance is a ** degree times as large

    def first_exponent(self, dim: int) -> float:
        """n for rows `dim` wide where none is given; one that is learned starts there."""
        return math.sqrt(dim)

    @property
    def by_product(self) -> bool:
        """Whether distances come from one matrix product; the others go entry by entry, at a speed of their own."""
        return False

    def trained(self, dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that a head trains for rows `dim` wide, by name. They start at 0."""
        return {}

    def check_width(self, dim: int, most: float = FLOAT32_MOST) -> None:
        """Raises ValueError if distances of rows `dim` wide may pass `most`, their dtype's largest number."""


@dataclass(frozen=True)
class ProductSettings(Settings):
    """Of a distance that is a matrix product whatever its parameters."""

    @property
    def by_product(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class CosineSettings(ProductSettings):
    """None: lengths do not count."""

    scaled = False


@dataclass(frozen=True)
class MinkowskiSettings(Settings):
    """p > 0, the power of the differences."""

    p: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.p, str) or not 0 < self.p <= MOST_POWER:
            limit = f"up to {MOST_POWER:,.0f} (for the limit of large p, use chebyshev)"
            raise ValueError(f"p={self.p!r}: expected a positive number {limit}")

    def check_width(self, dim: int, most: float = FLOAT32_MOST) -> None:
        """A distance is up to dim^(1/p) times the largest entry, for which half of the exponents are left."""
        digits = math.log2(most) / 2
        if math.log2(dim) > digits * self.p:
            least = math.log2(dim) / digits
            raise ValueError(
                f"p={self.p}: distances of rows {dim} wide pass {most:.3g}, the dtype's largest number; expected "
                f"{least:.3g} or more"
            )

    @property
    def by_product(self) -> bool:
        """For p = 2, which is the Euclidean distance."""
        return self.p == 2


@dataclass(frozen=True)
class HammingSettings(Settings):
    """How bits are made of numbers; `temperature` > 0, in their units, is the width of the sigmoid."""

    scaled = False
    kind: Literal["soft", "hard", "gumbel"] = "soft"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("soft", "hard", "gumbel"):
            raise ValueError(f"kind={self.kind!r}: expected soft, hard or gumbel")
        if isinstance(self.temperature, str) or not 1 / HOTTEST <= self.temperature <= HOTTEST:
            raise ValueError(
                f"temperature={self.temperature!r}: expected a positive number from {1 / HOTTEST:g} to {HOTTEST:g}"
            )

    @property
    def by_product(self) -> bool:
        """For hard bits, whose differences are their own squares."""
        return self.kind == "hard"


@dataclass(frozen=True)
class RatioSettings(Settings):
    """Of a distance that divides entries by entries: it is a number without a unit."""

    degree = 0


@dataclass(frozen=True)
class BrayCurtisSettings(RatioSettings):
    """What the sum of differences is divided by: sum |x + w|, or with "abs" sum |x| + sum |w|."""

    denominator: Literal["sum", "abs"] = "sum"

    def __post_init__(self) -> None:
        if self.denominator not in ("sum", "abs"):
            raise ValueError(f"denominator={self.denominator!r}: expected sum or abs")


@dataclass(frozen=True)
class MahalanobisSettings(ProductSettings):
    """Whether M is a diagonal, of which D logarithms are trained, or L L' with a trained (D, D)."""

    factor: Literal["diagonal", "full"] = "diagonal"

    def __post_init__(self) -> None:
        if self.factor not in ("diagonal", "full"):
            raise ValueError(f"factor={self.factor!r}: expected diagonal or full")

    def trained(self, dim: int) -> dict[str, tuple[int, ...]]:
        """(dim,) logarithms of a diagonal, or a (dim, dim) triangle: zeros are M = 1."""
        return {"factor": (dim,) if self.factor == "diagonal" else (dim, dim)}


@dataclass(frozen=True)
class DotSettings(ProductSettings):
    """None: the score is the product."""

    has_exponent = False
    scaled = False


@dataclass(frozen=True)
class CosineSoftmaxSettings(CosineSettings):
    """None: the exponent, which is an inverse temperature, is learned where none is given."""

    exponent = "learned"


@dataclass(frozen=True)
class SquaredEuclideanSoftmaxSettings(ProductSettings):
    """None."""

    exponent = None
    scaled = False

    def first_exponent(self, dim: int) -> float:
        """sqrt(dim) / 4: d^2 of x and w of length 1 has deviation sqrt(6 / dim), so that scores have sqrt(6) / 4, which
        is 0.61, as those of the other distances have: see `model.distance_base.Distance.start`.
        """
        return math.sqrt(dim) / 4


SETTINGS: dict[str, type[Settings]] = {
    "euclidean": ProductSettings,
    "manhattan": Settings,
    "chebyshev": Settings,
    "minkowski": MinkowskiSettings,
    "cosine": CosineSettings,
    "hamming": HammingSettings,
    "canberra": RatioSettings,
    "braycurtis": BrayCurtisSettings,
    "mahalanobis": MahalanobisSettings,
    "dot": DotSettings,
    "cosine_softmax": CosineSoftmaxSettings,
    "squared_euclidean_softmax": SquaredEuclideanSoftmaxSettings,
}
DISTANCES: dict[str, type[Distance]] = {}  # the score functions by name: see model/distances.py, which enters its own

S = TypeVar("S", bound=Settings)


def find(distance: str, table: Mapping[str, type[S]]) -> type[S]:
    """What a table has under a distance's name. Raises ValueError for an unknown one."""
    if distance not in table:
        raise ValueError(f"distance={distance!r}: expected one of {', '.join(table)}")
    return table[distance]


def settings_of(distance: str, params: Mapping[str, Any]) -> Settings:
    """The settings that a recipe asks for. Raises ValueError for a distance or a parameter that is unknown or off.

    A distance that is in DISTANCES alone is its own settings.
    """
    return make(find(distance, {**DISTANCES, **SETTINGS}), params, distance)


def make(kind: type[S], params: Mapping[str, Any], name: str | None = None) -> S:
    """Settings, or a distance, with these parameters. Raises ValueError for one that it does not take or that is off.

    `name`: what errors call it; None: the class's name.
    """
    name = name or kind.__name__.lower()
    takes = [f.name for f in fields(kind) if f.metadata != INTERNAL]
    known = [f.name for f in fields(kind)]
    for parameter, value in params.items():
        if parameter not in known:
            raise ValueError(f"{parameter}={value!r}: {name} takes {', '.join(takes) or 'no parameter'}")
    missing = [parameter for parameter in known if parameter not in params and not hasattr(kind, parameter)]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    return kind(**params)
