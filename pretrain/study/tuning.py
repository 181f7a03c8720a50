"""What is tuned of a head, and the settings that are tried: the same points of the same space for every head.

Settings are in units that carry over heads and widths: a learning rate as it is, the warm-up as a share of the steps,
and the head's own settings as multiples of what they are by default. A setting is a mapping of names in TUNABLE to
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, RootModel, model_validator

from common.fields import NotNegative, Positive, Seed

MOST_TRIALS = 256
EDGE = 0.1  # of a range, in the scale that it is drawn in: what lies in it at either end is at the edge
DIGITS = 4  # significant ones of a value that was drawn

Setting = Mapping[str, float]
Share = Annotated[float, Field(gt=0, le=1)]
TUNABLE: dict[str, str] = {  # in the order of the dimensions that points are drawn in
    "lr": "learning rate",
    "warmup": "warm-up, share of the steps",
    "init": "start of the prototypes, times the head's own",
    "feature_length": "length of the first hidden states, times the head's own",
    "head_lr": "rate of the head's parameters, times the learning rate",
    "prototype_decay": "weight decay of the prototypes",
    "exponent": "exponent, times the head's own",
}
MULTIPLES = ("init", "feature_length", "head_lr", "exponent")  # 1 is the head's own default


class Range(BaseModel, extra="forbid", frozen=True):
    """From `low` to `high`, drawn evenly in the logarithm."""

    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _rises(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}; what is fixed goes into base")
        return self

    def at(self, share: float) -> float:
        """The value that `share` of the range lies below, rounded to DIGITS."""
        return float(f"{self.low * (self.high / self.low) ** share:.{DIGITS}g}")

    def middle(self) -> float:
        """Of the logarithms."""
        return self.at(0.5)

    def has(self, value: float | None) -> bool:
        """Whether a value may be drawn."""
        return value is not None and self.low <= value <= self.high

    def edge(self, value: float) -> str | None:
        """`low` or `high` if a value lies in the outer EDGE of the range there, or beyond; else None."""
        place = math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else -1.0
        return "low" if place < EDGE else "high" if place > 1 - EDGE else None

    def edges_by_chance(self) -> float:
        """With which a value that was drawn lies at an edge, if it makes no difference."""
        return 2 * EDGE

    def told(self) -> str:
        """In words."""
        return f"{self.low:g} to {self.high:g}"

    def beyond(self, end: str) -> str:
        """A range to try where a choice lay at an end of this one: longer by half, in the logarithm, there."""
        reach = math.sqrt(self.high / self.low)
        low, high = (self.low / reach, self.high) if end == "low" else (self.low, self.high * reach)
        return f"{low:.2g} to {high:.2g}"


class Values(RootModel[tuple[NotNegative, ...]], frozen=True):
    """Some values, rising, as a list."""

    @model_validator(mode="after")
    def _rise(self) -> Values:
        if not 2 <= len(self.root) <= MOST_TRIALS:
            raise ValueError(
                f"a list of {len(self.root)}: give 2 to {MOST_TRIALS} values; what is fixed goes into base"
            )
        if any(a >= b for a, b in pairwise(self.root)):
            raise ValueError(f"{list(self.root)} must rise")
        return self

    def at(self, share: float) -> float:
        """The value of a share of the list."""
        return self.root[min(int(share * len(self.root)), len(self.root) - 1)]

    def middle(self) -> float:
        """The first: what is listed first is the default."""
        return self.root[0]

    def has(self, value: float | None) -> bool:
        """Whether a value may be drawn."""
        return value in self.root

    def edge(self, value: float) -> str | None:
        """`low` or `high` at an end of the list, or beyond; None between them, and at 0, below which nothing is."""
        return "high" if value >= self.root[-1] else "low" if value <= self.root[0] and value > 0 else None

    def edges_by_chance(self) -> float:
        """With which a value that was drawn lies at an edge, if it makes no difference."""
        return sum(self.edge(value) is not None for value in self.root) / len(self.root)

    def told(self) -> str:
        """In words."""
        return ", ".join(f"{value:g}" for value in self.root)

    def beyond(self, end: str) -> str:
        """Values to try where a choice lay at an end of these."""
        return f"values above {self.root[-1]:g} too" if end == "high" else f"values below {self.root[0]:g} too"


Entry = Range | Values


class Space(BaseModel, extra="forbid", frozen=True):
    """What is tuned; a setting that is left out keeps the run's own."""

    lr: Entry | None = None
    warmup: Entry | None = None  # share of the steps
    init: Entry | None = None  # deviation of the prototypes' entries, times the head's own
    feature_length: Entry | None = None  # of the first final hidden states, times the head's own
    head_lr: Entry | None = None  # times lr, for all parameters of the head
    prototype_decay: Entry | None = None
    exponent: Entry | None = None  # times the head's own, of a learned one its start; not of heads without one

    @model_validator(mode="after")
    def _can_be_set(self) -> Space:
        for name, entry in self.entries().items():
            least, most = (entry.low, entry.high) if isinstance(entry, Range) else (entry.root[0], entry.root[-1])
            if name == "warmup" and most > 1:
                raise ValueError(f"warmup={entry.told()}: it is a share of the steps, at most 1")
            if not least and name not in ("warmup", "prototype_decay"):
                raise ValueError(f"{name}={entry.told()}: it must be positive")
        return self

    def entries(self) -> dict[str, Entry]:
        """Those that are given, in the order of TUNABLE."""
        return {name: entry for name in TUNABLE if (entry := getattr(self, name)) is not None}


class Known(BaseModel, extra="forbid", frozen=True):
    """A head's published or known recipe, in the units of the space."""

    source: str = Field(min_length=1, max_length=200)
    settings: dict[str, NotNegative] = Field(min_length=1)


class Tuning(BaseModel, extra="forbid", frozen=True):
    """A search by successive halving (arXiv:1502.07943) with as many trials for every head."""

    trials: int = Field(gt=0, le=MOST_TRIALS)
    rungs: tuple[Share, ...] = Field(default=(1.0,), min_length=1, max_length=20)  # of the steps
    keep: float = Field(default=0.34, gt=0, lt=1)  # of a rung's trials, those that go on to the next
    seed: Seed  # of the draws and of the runs
    space: Space

    @model_validator(mode="after")
    def _rungs_rise_to_the_whole(self) -> Tuning:
        if any(a >= b for a, b in pairwise(self.rungs)) or self.rungs[-1] != 1:
            raise ValueError(f"rungs={list(self.rungs)} must rise to 1, which is all of the steps")
        return self

    def counts(self) -> list[int]:
        """Trials of a head that are trained at each rung, if none diverges."""
        counts = [self.trials]
        for _ in self.rungs[1:]:
            counts.append(max(1, round(counts[-1] * self.keep)))
        return counts


def default_setting(space: Mapping[str, Entry], known: Setting) -> dict[str, float]:
    """What a head is without tuning: its own defaults (all multiples 1, and no decay of prototypes, if that is tried),
    and of what has none, the known value, if it is one that may be tried, or the middle of the range.
    """

    def first(name: str, entry: Entry) -> float:
        if name in MULTIPLES:
            return 1.0
        if name == "prototype_decay" and entry.has(0.0):
            return 0.0
        return known[name] if entry.has(known.get(name)) else entry.middle()

    return {name: first(name, entry) for name, entry in space.items()}


def settings_of(tuning: Tuning, space: Mapping[str, Entry], known: Setting) -> list[dict[str, float]]:
    """The settings that a head is tried with. The first is its default; the others are points of a scrambled Sobol
    sequence, the same for all heads, so that trial k of one head has the place of trial k of any other.
    """
    names = list(TUNABLE)
    drawn = [
        {name: entry.at(float(point[names.index(name)])) for name, entry in space.items()}
        for point in points(tuning.trials - 1, tuning.seed)
    ]
    return [default_setting(space, known), *drawn]


def points(count: int, seed: int) -> np.ndarray:
    """(count, TUNABLE) points in [0, 1); a larger count begins with the same ones."""
    from scipy.stats import qmc

    if not count:
        return np.empty((0, len(TUNABLE)))
    sequence = qmc.Sobol(len(TUNABLE), scramble=True, rng=np.random.default_rng(seed))
    return sequence.random_base2(math.ceil(math.log2(count)))[:count] if count > 1 else sequence.random(1)


def edges(space: Mapping[str, Entry], setting: Setting) -> dict[str, str]:
    """The settings that lie at an edge of what was tried, with the end."""
    return {name: end for name, entry in space.items() if (end := entry.edge(setting[name])) is not None}


def ratios(setting: Setting, known: Setting) -> dict[str, float | None]:
    """How far a setting is from a known one: value by value, the one over the other; None where the known one is 0 and
    the other is not.
    """
    return {
        name: 1.0 if setting[name] == value else setting[name] / value if value else None
        for name, value in known.items()
        if name in setting
    }


def ranks(bits: Sequence[float | None]) -> list[int]:
    """Places of values from the least to the greatest; what is None is last, and ties stay in their order."""
    return sorted(range(len(bits)), key=lambda k: math.inf if (value := bits[k]) is None else value)
