"""`python -m benchmarks.growth`: whether weights go on growing in long training at a constant rate, head by head.

Points: one linear layer, whose features are points of a plane, one point a class (arXiv:2502.01628, section 2). `two`
are opposite corners of a square; `middle` are its four corners and the point between them, the places of
pretrain/study/vision/points.py; `inside` has that point moved off the middle. Adam at 0.01, full batches, float64; dot
also with a bias, as a third entry of every point that is 1. The layers of all sets and seeds are trained side by side,
by the definition of `model.reference`; `float32` has a single one of `two`, by `HarmonicHead`.

Network: a + b mod p as in `benchmarks.classify`, smaller, AdamW at 0.003 without decay, in float64.
Legend: R layers, N samples, V classes, D width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.classify import Classifier, Variant, adder, addition
from benchmarks.measuring import keep, kept, markdown, parser
from common.progress import say
from common.strict_json import plain, to_json
from model.distance_base import Distance
from model.distances import resolve
from model.head import HarmonicHead
from model.kernels.eager import Tokens
from pretrain.study.vision.points import PLACES

RATE, NETWORK_RATE = 0.01, 0.003
SHORT = 10_000  # steps of the heads below that are not in LONG, and of `float32`
LONG = ("dot", "euclidean", "cosine", "cosine_softmax")
HEADS = (*LONG, "dot + bias", "squared_euclidean_softmax", "manhattan", "chebyshev", "canberra", "braycurtis")
NETWORK_HEADS = ("dot", "euclidean", "cosine", "cosine_softmax")
MODULUS, WIDTH, HIDDEN, FRACTION = 17, 16, 48, 0.6
CORNERS = torch.tensor(PLACES)
SETS = {
    "two": CORNERS[[1, 3]],
    "middle": CORNERS,
    "inside": torch.cat([torch.tensor([[0.5, 0.2]], dtype=torch.float64), CORNERS[1:]]),
}


def marks(steps: int) -> list[int]:
    """Steps after which figures are taken: powers of ten from 10 on, and the last."""
    return sorted({10**power for power in range(1, 9) if 10**power < steps} | {steps})


def scores(entry: Distance, exponent: Tensor | float, x: Tensor, w: Tensor, floor: Tensor | None) -> Tensor:
    """(R, N, D), (R, V, D) -> (R, N, V), as `model.reference` defines them; `floor` (R, N, 1) as `floors` has it."""
    there, here = x[:, :, None], w[:, None]
    apart = entry.between(there, here)
    if floor is None:
        return entry.slope * exponent * apart
    far = (apart > floor).detach()
    if not apart.all():  # at 0 a length has no slope; there the floor is taken, and the formula asked elsewhere
        apart = entry.between(there, torch.where(far[..., None], here, here + 1))
    return -exponent * torch.where(far, apart, floor).log()


def floors(entry: Distance, x: Tensor) -> Tensor | None:
    """Of points (R, N, D), the least distance (R, N, 1) of each; None where scores need none."""
    floor = entry.floor_of_scores(Tokens(entry.transform(x.flatten(0, 1))))
    return None if floor is None else floor.view(*x.shape[:2], 1)


@dataclass
class Layers:
    """One linear layer for every set and seed, side by side: R = sets times seeds, V the most classes of any set.

    A set with fewer classes than V has rows of zeros, whose samples and prototypes count nothing.
    """

    head: str
    sets: Sequence[str]
    seeds: int
    x: Tensor = field(init=False)  # (R, V, D)
    w: Tensor = field(init=False)  # (R, V, D)
    log_exponent: Tensor | None = field(init=False)  # (R, 1, 1), where it is learned

    def __post_init__(self) -> None:
        bias, name = self.head.endswith(" + bias"), self.head.removesuffix(" + bias")
        self.entry = resolve(name, {})
        most = max(len(SETS[one]) for one in self.sets)
        self.x = torch.stack([F.pad(SETS[one], (0, 0, 0, most - len(SETS[one]))) for one in self.sets])
        real = torch.stack([torch.arange(most) < len(SETS[one]) for one in self.sets])
        self.x, self.real = (side.repeat_interleave(self.seeds, 0) for side in (self.x, real))
        heads = [HarmonicHead(most, 2, distance=name, seed=seed) for seed in range(self.seeds)]
        self.w = torch.stack([head.prototypes.detach().double() for head in heads]).repeat(len(self.sets), 1, 1)
        if bias:
            self.x, self.w = F.pad(self.x, (0, 1), value=1.0), F.pad(self.w, (0, 1))
        self.exponent = heads[0].exponents[0] if heads[0].has_exponent else 1.0
        learned = heads[0].log_exponent is not None
        self.log_exponent = self.x.new_full((len(self.x), 1, 1), self.exponent).log() if learned else None
        self.parameters = [part.requires_grad_() for part in (self.w, self.log_exponent) if part is not None]
        self.floor = floors(self.entry, self.x)
        self.classes = torch.arange(most).where(self.real, 0).flatten()  # (R V,)
        self.shares = self.real.double() / self.real.sum(1, keepdim=True)  # (R, V) of a layer's loss
        self.without = torch.zeros_like(self.x[:, :1, 0, None]).masked_fill(~self.real[:, None], -torch.inf)

    def scored(self) -> Tensor:
        """(R, V, V) scores of every point against the prototypes of its layer."""
        exponent = self.exponent if self.log_exponent is None else self.log_exponent.exp()
        return scores(self.entry, exponent, self.x, self.w, self.floor) + self.without

    def losses(self, scored: Tensor) -> Tensor:
        """(R,) means over the points of each layer, in nats."""
        losses = F.cross_entropy(scored.flatten(0, 1), self.classes, reduction="none")
        return (losses.view(self.shares.shape) * self.shares).sum(1)

    def train(self, steps: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Trains all of them and gives their figures at the marks."""
        optimizer, stops = torch.optim.Adam(self.parameters, lr=RATE, fused=True), marks(steps)
        for step in range(1, steps + 1):
            total = self.losses(self.scored()).sum()
            for part, gradient in zip(self.parameters, torch.autograd.grad(total, self.parameters), strict=True):
                part.grad = gradient
            optimizer.step()
            if step in stops:
                yield step, self.figures()

    @torch.no_grad()
    def figures(self) -> list[dict[str, Any]]:
        """Of each layer. A point is right where its own score is above all others: a tie is wrong."""
        scored = self.scored()
        own = scored.diagonal(dim1=1, dim2=2)
        others = scored.masked_fill(torch.eye(scored.shape[1], dtype=torch.bool), -torch.inf).amax(2)
        columns = {
            "loss": self.losses(scored),
            "accuracy": ((own > others) * self.shares).sum(1),
            "norm": self.w.where(self.real[..., None], 0).flatten(1).norm(dim=1),
            "away": ((self.x - self.w)[..., :2].norm(dim=2) * self.shares).sum(1),
        }
        if self.floor is not None:
            at_floor = self.entry.between(self.x, self.w) <= self.floor[..., 0]
            columns["at_floor"] = (at_floor * self.shares).sum(1)
        if self.log_exponent is not None:
            columns["exponent"] = self.log_exponent.exp().flatten()
        names = [(one, seed) for one in self.sets for seed in range(self.seeds)]
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"set": one, "seed": seed, **dict(zip(columns, row, strict=True))}
            for (one, seed), row in zip(names, values, strict=True)
        ]


def points(head: str, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Figures of all sets and seeds of one head."""
    steps = steps if head in LONG else min(steps, SHORT)
    layers = Layers(head, list(SETS), seeds)
    return [{"step": step, **row} for step, rows in layers.train(steps) for row in rows]


def float32(head: str, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Figures of the set of two points, by `HarmonicHead` in float32; from the first layer's start."""
    x, classes = SETS["two"].float(), torch.arange(2)
    layer = HarmonicHead(2, 2, distance=head, seed=0)
    optimizer, steps, found = torch.optim.Adam(layer.parameters(), lr=RATE), min(steps, SHORT), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = layer(x, classes)
        loss.backward()
        optimizer.step()
        if step in marks(steps):
            right = (layer.predict(x) == classes).double().mean().item()
            w = layer.prototypes.detach()
            figures = {"loss": layer(x, classes).item(), "accuracy": right, "norm": w.norm().item()}
            found.append({"step": step, "set": "two", "seed": 0, **figures, "away": (x - w).norm(dim=1).mean().item()})
    return found


def network(head: str, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Figures of the small network under one head, of each seed."""
    found = []
    for seed in range(seeds):
        split = addition(MODULUS, FRACTION, seed)
        model = adder(Variant(head), seed, MODULUS, WIDTH, HIDDEN).double()
        optimizer, stops = torch.optim.AdamW(model.groups(0.0), lr=NETWORK_RATE, fused=True), marks(steps)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model.loss(split.inputs, split.classes).backward()
            optimizer.step()
            if step in stops:
                held_out = model.accuracy(split.test_inputs, split.test_classes)
                figures = network_figures(model, split.inputs, split.classes)
                found.append({"step": step, "seed": seed, "held_out": held_out, **figures})
    return found


@torch.no_grad()
def network_figures(model: Classifier, inputs: Tensor, classes: Tensor) -> dict[str, Any]:
    """On the training pairs: loss, accuracy, lengths, of distances the nearest wrong pair and those at the floor."""
    head, x = model.head, model.network(inputs) * model.scale
    found: dict[str, Any] = {
        "loss": head(x, classes).item(),
        "accuracy": model.accuracy(inputs, classes),
        "prototypes": head.prototypes.norm(dim=1).mean().item(),
        "features": x.norm(dim=1).mean().item(),
        "network": torch.cat([part.flatten() for part in model.network.parameters()]).norm().item(),
        "exponent": float(head.exponent) if head.has_exponent else None,
    }
    entry = head.score_function
    floor = floors(entry, x[None])
    if floor is not None:
        excess = entry.between(x[:, None], head.prototypes[None]) / floor[0]  # (N, V), in floors
        own = F.one_hot(classes, excess.shape[1]).bool()
        at_floor = excess <= 1
        found |= {"own_at_floor": at_floor[own].double().mean().item(), "wrong_at_floor": int(at_floor[~own].sum())}
        found |= {"nearest_wrong_floors": excess[~own].min().item()}
    return found


PARTS: dict[str, tuple[Callable[[str, int, int], list[dict[str, Any]]], Sequence[str]]] = {
    "points": (points, HEADS),
    "float32": (float32, ("dot", "euclidean")),
    "network": (network, NETWORK_HEADS),
}
GROWN = {  # a table of each over the marks
    "points": ("loss", "norm"),
    "float32": ("loss", "norm"),
    "network": ("loss", "prototypes", "features", "network"),
}
LAST = {  # those of the last mark only
    "points": ("accuracy", "away", "at_floor", "exponent"),
    "float32": ("accuracy", "away"),
    "network": ("accuracy", "held_out", "exponent", "own_at_floor", "wrong_at_floor", "nearest_wrong_floors"),
}


def told(runs: Sequence[dict[str, Any]], column: str) -> str:
    """Mean and sample deviation over seeds, the mean to three digits; the second is left out where it rounds to
    nothing. Nothing of what a head does not have.
    """
    values = [run[column] for run in runs if run.get(column) is not None]
    if not values:
        return ""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.3g} ± {deviation:.1g}" if deviation > 5e-4 * abs(mean) else f"{mean:.3g}"


def tables(cells: Sequence[dict[str, Any]]) -> Iterator[list[list[str]]]:
    """Of each part and set, one table for every figure that may grow, heads by marks, and one of the others at the end;
    the first cell of a table says which it is.
    """
    for part in dict.fromkeys(cell["part"] for cell in cells):
        mine = [cell for cell in cells if cell["part"] == part]
        steps = sorted({run["step"] for cell in mine for run in cell["runs"]})
        for name in dict.fromkeys(run.get("set") for cell in mine for run in cell["runs"]):
            known = {cell["head"]: [run for run in cell["runs"] if run.get("set") == name] for cell in mine}
            title = f"{part}, {name}" if name else part
            for column in GROWN[part]:
                at = {h: [[run for run in runs if run["step"] == step] for step in steps] for h, runs in known.items()}
                made = [[head, *(told(now, column) for now in by_step)] for head, by_step in at.items()]
                yield [[f"{title}: {column}", *(f"{step:,}" for step in steps)], *made]
            last = {h: [run for run in runs if run["step"] == runs[-1]["step"]] for h, runs in known.items()}
            made = [[head, *(told(now, column) for column in LAST[part])] for head, now in last.items()]
            yield [[f"{title}, at the end", *LAST[part]], *made]


def main(argv: Sequence[str] | None = None) -> int:
    """The command: tables, and with --out everything as JSON, which a second call goes on from."""
    made = parser("growth", __doc__)
    made.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    made.add_argument("--heads", nargs="+", help="of each part those it has (default: all)")
    made.add_argument("--steps", type=int, default=100_000, help="of the points (default %(default)s)")
    made.add_argument("--network-steps", type=int, default=10_000)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--network-seeds", type=int, default=2)
    made.add_argument("--out", type=Path, help="a JSON file")
    return _run(made.parse_args(argv))


def _run(asked: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    found = kept(asked.out, "cells")
    for part in asked.parts:
        measure, heads = PARTS[part]
        for head in (head for head in heads if head in (asked.heads or heads)):
            small = part == "network"
            steps, seeds = (asked.network_steps, asked.network_seeds) if small else (asked.steps, asked.seeds)
            cell = {"part": part, "head": head, "steps": steps, "seeds": seeds}
            if any(all(one[name] == value for name, value in cell.items()) for one in found):
                continue
            found.append({**cell, "runs": measure(head, steps, seeds)})
            say(f"{part}, {head}: {to_json(plain(found[-1]['runs'][-1]))}")
            keep(asked.out, {"cells": found})
    for table in tables(found):
        print("\n".join([*markdown(table), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
