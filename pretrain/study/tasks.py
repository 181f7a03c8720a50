"""Algorithmic tasks: all examples of each, exactly, and their split into training and test examples.

Modular addition, equivalence classes, in-context learning on a lattice and permutation composition are tasks of
arXiv:2502.01628, section 4, in its sizes; its fifth, genealogy, is not here. Circle is ours. The published code draws
1,000 examples, for some tasks with replacement, so that an example can be both trained on and tested; here a task is
all of its examples, each once, and the two parts are disjoint. Ordered pairs are examples of their own: (a, b) may be
trained on and (b, a) tested, as in the paper.

Legend: N examples, T tokens of an input, V classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

MODULUS = 31
STEPS = (-3, -2, -1, 1, 2, 3)  # of the circle
ELEMENTS, CLASSES = 40, 5  # of the equivalence
SIDE = 5  # of the lattice
PERMUTED = 4
KLEIN = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))


@dataclass(frozen=True, eq=False)
class Task:
    """Inputs (N, T) int64 tokens and their answers (N,) int64 classes."""

    inputs: Tensor
    answers: Tensor
    tokens: int  # of the inputs' vocabulary
    elements: int  # its first tokens, the things that the task is about; those after them are steps
    classes: int
    crystal: Literal["circle", "lattice", "groups"]  # how elements, and classes where they are elements, would lie best
    groups: Tensor | None = None  # of the elements, where they would lie in groups

    @property
    def coordinates(self) -> Tensor:
        """(V, 2) places of the lattice's points, in their order as classes."""
        return torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))


def modular_addition() -> Task:
    """(a, b) -> a + b mod 31."""
    inputs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    return Task(inputs, inputs.sum(1) % MODULUS, MODULUS, MODULUS, MODULUS, "circle")


def circle() -> Task:
    """(a, s) -> a + s mod 31 for steps s of -3..3 without 0. A step is a token of its own, 31 and on."""
    inputs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(len(STEPS)) + MODULUS)
    answers = (inputs[:, 0] + torch.tensor(STEPS)[inputs[:, 1] - MODULUS]) % MODULUS
    return Task(inputs, answers, MODULUS + len(STEPS), MODULUS, MODULUS, "circle")


def equivalence() -> Task:
    """(a, b) -> 1 if a = b mod 5, else 0, for a and b of 0..39: four in five are 0."""
    inputs = torch.cartesian_prod(torch.arange(ELEMENTS), torch.arange(ELEMENTS))
    answers = (inputs[:, 0] % CLASSES == inputs[:, 1] % CLASSES).long()
    return Task(inputs, answers, ELEMENTS, ELEMENTS, 2, "groups", torch.arange(ELEMENTS) % CLASSES)


def in_context() -> Task:
    """(a, b, c) -> d with b - a = d - c, all four in the 5 x 5 lattice, whose point (i, j) is token 5 i + j."""
    points = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    inputs = torch.cartesian_prod(*[torch.arange(len(points))] * 3)
    a, b, c = (points[inputs[:, place]] for place in range(3))
    fourth = c + b - a
    inside = ((fourth >= 0) & (fourth < SIDE)).all(1)
    answers = fourth[inside] @ torch.tensor([SIDE, 1])
    return Task(inputs[inside], answers, len(points), len(points), len(points), "lattice")


def permutation() -> Task:
    """(a, b) -> ab in S4, (ab)(i) = a(b(i)); elements in the order of itertools.permutations. Their groups are the six
    cosets of Klein's four-group, which are the same from the left and from the right.
    """
    elements = list(itertools.permutations(range(PERMUTED)))
    number = {element: index for index, element in enumerate(elements)}
    answers = [number[tuple(a[i] for i in b)] for a in elements for b in elements]
    inputs = torch.cartesian_prod(torch.arange(len(elements)), torch.arange(len(elements)))
    left = torch.tensor([min(number[tuple(a[i] for i in one)] for one in KLEIN) for a in elements])
    return Task(inputs, torch.tensor(answers), len(elements), len(elements), len(elements), "groups", left)


TASKS: dict[str, Callable[[], Task]] = {
    "modular_addition": cache(modular_addition),
    "circle": cache(circle),
    "equivalence": cache(equivalence),
    "in_context": cache(in_context),
    "permutation": cache(permutation),
}


def training_examples(task: Task, fraction: float) -> int:
    """How many examples the fraction is, rounded."""
    return round(fraction * len(task.answers))


def split(task: Task, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test examples. A seed's smaller training parts lie within its larger ones."""
    order = torch.randperm(len(task.answers), generator=torch.Generator().manual_seed(seed))
    count = training_examples(task, fraction)
    return order[:count], order[count:]
