"""What a distance is: a score function with its parameters, its floor and its way to a contraction.

Units. Where a common factor of x and w changes no probability (`scaled`), both sides are multiplied first by the power
of two that brings the largest entries of the prototypes to about 1 (their geometric mean: model/operands.py), or the
longest of them to 2^20. Tokens have no part in it, so that none can reach another.

Floor. At a match log d is infinite, and where a matrix product takes d^2, a near match loses its digits. So a distance
is at least `floor`, in proportion to its value between x and the origin: 2^-19 of that, and 2^-9.5 where d^2 comes
from a product (2^-20 (|x|^2 + |w|^2) of d^2: near a match |w| = |x|), plus 2^-40 for a token of zeros. This belongs to
the definition of the loss: at or below the floor a distance is a constant, with gradient zero.

Legend: M tokens x, V prototypes w, N rows of either side, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .contractions import Broadcast, Contraction
from .distance_settings import Settings
from .kernels import eager

RELATIVE_FLOOR = 2.0**-19  # of d, and of d^2 where d^2 comes from a product
ABSOLUTE_FLOOR = 2.0**-40  # of d
LARGEST_ROW = 20  # power of two: no prototype has a larger entry once both sides are scaled


class Start(NamedTuple):
    """How a head starts best."""

    entry_std: float  # deviation of the prototypes' entries
    feature_length: float  # of the features that it scores


@dataclass(frozen=True)
class Distance(Settings):
    """One score function with its parameters, which are its fields, as those of its settings are.

    Rows pass through `perturb` and `transform` on both sides; `contraction` takes what `transform` made.
    """

    formula: ClassVar[str]
    slope: ClassVar[int] = 0  # scores are slope * n * what `between` gives (dot: n = 1); 0: -n log of it
    unit: ClassVar[bool] = False  # `transform` brings rows to length 1, and does no more

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        """The specification: (..., D), (..., D) -> (...) distances in any dtype, by autograd differentiable."""
        raise NotImplementedError

    @property
    def contraction(self) -> Contraction:
        """How transformed rows (M, D), (V, D) become distances (M, V), and gradients their way back."""
        assert not self.slope, "scores that are no logarithm need a contraction that says so"
        return Broadcast(self.between)

    @property
    def by_product(self) -> bool:
        """As the settings of a recipe say it, which know no contraction."""
        return not self.contraction.wide

    def transform(self, rows: Tensor) -> Tensor:
        """Rows (N, D) of either side for the contraction; differentiable, in the tensors of the fields too."""
        return rows

    def perturb(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (N, D) with noise, where a distance has any; `index` (N,): the prototype, or -1 - token."""
        return rows

    def pull_back(self, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient (N, D) after `perturb` and `transform`: that of the rows (N, D) before, and those of
        `tensors`, in their order.
        """
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            tensors = {name: t.detach().requires_grad_() for name, t in self.tensors.items()}
            again = replace(self, **tensors)
            transformed = again.transform(again.perturb(leaf, index))
            back, *others = torch.autograd.grad(transformed, (leaf, *tensors.values()), grad)
        return back, others

    def floor(self, x: eager.Tokens) -> Tensor:
        """(M,) the least distance of transformed tokens, in the accumulator's dtype."""
        rows = x.rows.to(eager.accumulator(x.rows.dtype))
        return RELATIVE_FLOOR * self.between(rows, torch.zeros_like(rows)) + ABSOLUTE_FLOOR

    def floor_of_scores(self, x: eager.Tokens) -> Tensor | None:
        """(M,) `floor`; None where scores are no logarithm and need none, so that nobody reads the tokens for it."""
        return None if self.slope else self.floor(x)

    def prepared(self, operands: torch.dtype, draw: Callable[[], Tensor]) -> Distance:
        """This one as one call uses it: matrix products take `operands`; `draw()` gives a random 0-d int64 tensor that
        all ranks agree on.
        """
        return self

    def log_unit(self) -> Tensor | float:
        """The logarithm of what `prepared` divides all distances by, without gradient."""
        return 0.0

    def check(self, dim: int, dtype: torch.dtype) -> None:
        """Raises ValueError unless rows (N, dim) can be scored in `dtype`."""
        for name, tensor in self.tensors.items():
            if tensor.shape[0] != dim:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, but rows are {dim} wide")

    def evaluated(self) -> Distance:
        """This one as it is when a model does not train."""
        return self

    def start(self, dim: int) -> Start:
        """Prototypes of length 1, entries of deviation 1/sqrt(dim), under every distance and for `dot`: the first
        scores are then equally spread at any width.

        For x of length 1 too, the Euclidean d^2 = 1 + |w|^2 - 2 x.w has mean 2 and deviation sqrt(6/dim), so with
        n = sqrt(dim) scores have deviation sqrt(6)/4 = 0.61; much shorter or longer prototypes make all distances
        alike, and the first gradients small. The logits of `dot`, whose features have unit variance, have deviation 1.
        A number that does not know the width is right at one width alone: GPT-2's 0.02 (init_std="gpt2") spreads logits
        by 0.55 at 768, for which it was made, and by 0.23 at 128, where it costs 0.4 bits/byte at the rate that is
        best with the other. Measured at widths 64 to 256: benchmarks/results/starts-cpu.md.
        """
        return Start(dim**-0.5, 1.0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Fields that are tensors, by name: they may require a gradient."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    @classmethod
    def constrained(cls, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters, by name, from the unconstrained values that a head trains."""
        return dict(trained)


def norm_floor(x: eager.Tokens) -> Tensor:
    """(M,) the floor of tokens (M, D) where d^2 comes from a product."""
    return RELATIVE_FLOOR**0.5 * x.squares.sqrt() + ABSOLUTE_FLOOR
