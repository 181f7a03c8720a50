"""`HarmonicHead` as the output of a plain PyTorch classifier: digits with every distance, and modular addition.

    python -m benchmarks.classify
    python -m benchmarks.classify --task addition

Digits: scikit-learn's 1,797 images of 8 x 8 pixels, three quarters for training, split by class; one hidden layer.
Addition: all pairs (a, b) modulo p, a random part for training and the rest held out; an embedding of both operands and
one hidden layer, in full batches. Each head gets the same network, data, seeds, steps and optimiser; addition shows,
for each weight decay, the learning rate of RATES with the best held-out accuracy.
Legend: N samples, D width of features and prototypes, V classes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measuring import keep, machine, parser, wide_console
from model.distances import DISTANCES
from model.head import HarmonicHead

DIGITS_GOAL = 0.95
ADDITION_GOALS = (0.9, 0.99)
ADDITION_HEADS = ("euclidean", "cosine", "dot", "cosine_softmax", "squared_euclidean_softmax")
WEIGHT_DECAYS = (0.0, 0.1, 1.0)
RATES = (3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Variant:
    """One head: a distance with its own parameters, and the exponent."""

    distance: str
    params: dict[str, Any] = field(default_factory=dict)
    exponent: Any = None  # as HarmonicHead takes it

    def __str__(self) -> str:
        values = (f"{value:g}" if isinstance(value, float) else str(value) for value in self.params.values())
        return " ".join((self.distance, *values)) if self.distance != "dot" else "dot (softmax)"

    def head(self, classes: int, dim: int, seed: int) -> HarmonicHead:
        """Prototypes (V, D) drawn from `seed`; the same draw for every variant, in its own scale."""
        return HarmonicHead(classes, dim, distance=self.distance, exponent=self.exponent, seed=seed, **self.params)


VARIANTS = (
    Variant("euclidean"),
    Variant("manhattan"),
    Variant("chebyshev"),
    Variant("minkowski", {"p": 3.0}),
    Variant("cosine"),
    *(Variant("hamming", {"kind": kind}) for kind in ("soft", "hard", "gumbel")),
    Variant("canberra"),
    *(Variant("braycurtis", {"denominator": denominator}) for denominator in ("sum", "abs")),
    *(Variant("mahalanobis", {"factor": factor}) for factor in ("diagonal", "full")),
    Variant("dot"),
    Variant("cosine_softmax"),
    Variant("squared_euclidean_softmax"),
)


@dataclass(frozen=True)
class Split:
    """Inputs (N, ...) and classes (N,) to train on and to test on."""

    inputs: Tensor
    classes: Tensor
    test_inputs: Tensor
    test_classes: Tensor


@dataclass(frozen=True)
class Trained:
    """Accuracies after the last epoch; `reached`: the first epoch with each goal's test accuracy, None: in none."""

    train_accuracy: float
    test_accuracy: float
    reached: dict[float, int | None]
    seconds: float


class Classifier(nn.Module):
    """A network and its head: inputs -> features (N, D), scaled -> prototypes."""

    def __init__(self, network: nn.Module, head: HarmonicHead) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.scale = head.feature_length / head.prototypes.shape[1] ** 0.5

    def loss(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Inputs (N, ...) and classes (N,) -> the mean loss, in nats."""
        return self.head(self.network(inputs) * self.scale, classes)

    @torch.no_grad()
    def accuracy(self, inputs: Tensor, classes: Tensor) -> float:
        """Inputs (N, ...) and classes (N,) -> the share that is right."""
        predicted = self.head.log_probs(self.network(inputs) * self.scale).argmax(1)
        return (predicted == classes).double().mean().item()

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """No decay for what else a head trains: it would pull Mahalanobis' M to 1, and a learned exponent to 1."""
        free = [p for p in self.head.parameters() if p is not self.head.prototypes]
        decayed = [*self.network.parameters(), self.head.prototypes]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@functools.cache
def digits() -> Split:
    """1,347 and 450 images (N, 64) in -1..1, the same split in every run."""
    from sklearn.datasets import load_digits  # which takes seconds, and help needs none
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images, classes, test_size=0.25, stratify=classes, random_state=0)
    images, test_images = (torch.tensor(part, dtype=torch.float32) / 8 - 1 for part in parts[:2])
    return Split(images, torch.tensor(parts[2]), test_images, torch.tensor(parts[3]))


def train_digits(
    variant: Variant, seed: int, *, epochs: int = 20, dim: int = 32, hidden: int = 64, rate: float = 1e-2
) -> Trained:
    """64 pixels -> hidden -> D -> 10 prototypes; AdamW without decay, batches of 128."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, dim))
    model = Classifier(network, variant.head(10, dim, seed))
    optimizer = torch.optim.AdamW(model.groups(0.0), lr=rate)
    return train(model, optimizer, digits(), epochs, batch=128, every=1, goals=(DIGITS_GOAL,))


def addition(modulus: int, fraction: float, seed: int) -> Split:
    """All pairs (N, 2) with their sums; `fraction` of them, drawn from `seed`, to train on."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    first, rest = order.split([round(fraction * len(pairs)), len(pairs) - round(fraction * len(pairs))])
    sums = pairs.sum(1) % modulus
    return Split(pairs[first], sums[first], pairs[rest], sums[rest])


def adder(variant: Variant, seed: int, modulus: int, dim: int, hidden: int) -> Classifier:
    """Two operands, embedded in D each -> hidden -> D -> p prototypes; all drawn from `seed`."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Embedding(modulus, dim), nn.Flatten(), nn.Linear(2 * dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)
    )
    return Classifier(network, variant.head(modulus, dim, seed))


def train_addition(
    variant: Variant,
    seed: int,
    *,
    modulus: int = 59,
    fraction: float = 0.6,
    epochs: int = 1000,
    dim: int = 32,
    hidden: int = 100,
    rate: float = 1e-2,
    weight_decay: float = 0.0,
) -> Trained:
    """AdamW with betas 0.9/0.98, full batches."""
    model = adder(variant, seed, modulus, dim, hidden)
    optimizer = torch.optim.AdamW(model.groups(weight_decay), lr=rate, betas=(0.9, 0.98))
    split = addition(modulus, fraction, seed)
    return train(model, optimizer, split, epochs, batch=len(split.classes), every=10, goals=ADDITION_GOALS)


def train(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    split: Split,
    epochs: int,
    *,
    batch: int,
    every: int,
    goals: Sequence[float],
) -> Trained:
    """The rate falls to 0 in a straight line. Tests after every `every`th epoch and the last; `seconds` are of training
    alone.
    """
    reached: dict[float, int | None] = dict.fromkeys(goals)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / epochs)
    spent = 0.0
    for epoch in range(1, epochs + 1):
        model.head.progress = (epoch - 1) / max(1, epochs - 1)  # moves an exponent that is a pair
        began = time.perf_counter()
        for part in torch.randperm(len(split.classes)).split(batch):
            optimizer.zero_grad()
            model.loss(split.inputs[part], split.classes[part]).backward()
            optimizer.step()
        schedule.step()
        spent += time.perf_counter() - began
        if epoch % every == 0 or epoch == epochs:
            accuracy = model.accuracy(split.test_inputs, split.test_classes)
            reached.update({goal: epoch for goal in goals if reached[goal] is None and accuracy >= goal})
    return Trained(model.accuracy(split.inputs, split.classes), accuracy, reached, spent)


def row(variant: Variant, runs: Sequence[Trained], **settings: float) -> dict[str, Any]:
    """A row of results as plain values: what was trained, and lists with a value for each seed."""
    exponent = {} if variant.exponent is None else {"exponent": variant.exponent}
    return {
        "head": str(variant),
        **exponent,
        **settings,
        "train_accuracy": [run.train_accuracy for run in runs],
        "test_accuracy": [run.test_accuracy for run in runs],
        "epochs_to": {f"{goal:.0%}": [run.reached[goal] for run in runs] for goal in runs[0].reached},
        "seconds": [run.seconds for run in runs],
    }


def digits_rows(
    variants: Sequence[Variant], seeds: int, epochs: int, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each head, over `seeds` runs of it; `advance` is told what comes next."""
    rows = []
    for variant in variants:
        advance(str(variant))
        rows.append(row(variant, [train_digits(variant, seed, epochs=epochs) for seed in range(seeds)]))
    return rows


def addition_rows(
    variants: Sequence[Variant],
    seeds: int,
    epochs: int,
    modulus: int,
    fraction: float,
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each weight decay and head, at its best rate; `advance` is told what comes next."""
    rows = []
    for decay, variant in itertools.product(WEIGHT_DECAYS, variants):
        trained = functools.partial(
            train_addition, variant, modulus=modulus, fraction=fraction, epochs=epochs, weight_decay=decay
        )
        sweep = {}
        for rate in RATES:
            advance(f"{variant}, weight decay {decay:g}, rate {rate:g}")
            sweep[rate] = [trained(seed=seed, rate=rate) for seed in range(seeds)]
        rate, runs = max(sweep.items(), key=lambda tried: statistics.mean(run.test_accuracy for run in tried[1]))
        rows.append(row(variant, runs, weight_decay=decay, rate=rate))
    return rows


def told(rows: Sequence[dict[str, Any]], epochs: int) -> list[list[str]]:
    """Rows as words, the first of them the heading."""
    goals = list(rows[0]["epochs_to"])
    swept = "rate" in rows[0]
    tested = "held out, %" if swept else "test accuracy, %"
    named = ["exponent"] if "exponent" in rows[0] else []
    heading = ["head", *named, *(["weight decay", "rate", "train, %"] if swept else []), tested]
    found = [[*heading, *(f"epochs to {goal}" for goal in goals), "seconds"]]
    for one in rows:
        settings = [f"{one['weight_decay']:g}", f"{one['rate']:g}", spread(one["train_accuracy"])] if swept else []
        reached = [epochs_until(one["epochs_to"][goal], epochs) for goal in goals]
        seconds = f"{statistics.mean(one['seconds']):.{1 if swept else 2}f}"
        found.append(
            [
                one["head"],
                *(str(one[name]) for name in named),
                *settings,
                spread(one["test_accuracy"]),
                *reached,
                seconds,
            ]
        )
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and sample deviation, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def epochs_until(reached: Sequence[int | None], epochs: int) -> str:
    """The mean of the epochs to a goal, if every run got there."""
    there = [epoch for epoch in reached if epoch is not None]
    if len(there) == len(reached):
        return f"{statistics.mean(there):.0f}"
    return f"not in {epochs}" if not there else f"{len(there)} of {len(reached)} runs"


def exponent_of(text: str) -> Any:
    """The value of --exponent. Raises ValueError, which argparse tells, for another word."""
    return text if text in ("sqrt_dim", "learned") else float(text)


def arguments() -> argparse.Namespace:
    """The words of the command line."""
    command = parser("classify", __doc__)
    command.add_argument("--task", choices=["digits", "addition"], default="digits")
    command.add_argument("--seeds", type=int, default=5, help="runs of each row (default %(default)s)")
    command.add_argument("--epochs", type=int, help="default 20 for digits, 1000 for addition")
    heads = f"default: all for digits, {' '.join(ADDITION_HEADS)} for addition"
    command.add_argument("--heads", nargs="+", choices=list(DISTANCES), metavar="DISTANCE", help=heads)
    own = "numbers, sqrt_dim or learned (default: the distance's own)"
    command.add_argument("--exponent", type=exponent_of, nargs="+", default=[None], help=own)
    command.add_argument("--modulus", type=int, default=59, help="p of addition (default %(default)s)")
    command.add_argument("--fraction", type=float, default=0.6, help="of all pairs, to train on (default %(default)s)")
    command.add_argument("--out", type=Path, help="a JSON file for everything")
    return command.parse_args()


def main() -> None:
    """The command: one task, its table after all of its runs."""
    args = arguments()
    heads = args.heads or (list(DISTANCES) if args.task == "digits" else ADDITION_HEADS)
    exponents, asked = args.exponent, [variant for variant in VARIANTS if variant.distance in heads]
    variants = [replace(variant, exponent=exponent) for exponent in exponents for variant in asked]
    epochs = args.epochs or (20 if args.task == "digits" else 1000)
    exponent = "the distance's own" if exponents == [None] else ", ".join(map(str, exponents))
    settings = f"{epochs} epochs, exponent {exponent}, {args.seeds} seeds: mean ± deviation over seeds"
    console = wide_console()
    console.print(machine("cpu"))
    with console.status("training") as status:

        def advance(what: str) -> None:
            status.update(f"training: {what}")

        if args.task == "digits":
            settings = f"digits, {settings}"
            rows = digits_rows(variants, args.seeds, epochs, advance)
        else:
            rates = ", ".join(f"{rate:g}" for rate in RATES)
            settings = f"a + b mod {args.modulus}, trained on {args.fraction:.0%} of the pairs, {settings}"
            settings += f"; of the rates {rates}, the one with the best held-out accuracy"
            rows = addition_rows(variants, args.seeds, epochs, args.modulus, args.fraction, advance)
    keep(args.out, {"task": args.task, "settings": settings, "epochs": epochs, "rows": rows})
    console.print(settings)
    heading, *body = told(rows, epochs)
    table = Table(*heading)
    for place, words in enumerate(body):
        last = place + 1 == len(body) or rows[place].get("weight_decay") != rows[place + 1].get("weight_decay")
        table.add_row(*words, end_section=last)
    console.print(table)


if __name__ == "__main__":
    main()
