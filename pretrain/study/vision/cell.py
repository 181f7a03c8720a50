"""One cell of a vision study: a network with a head learns a data set, and is asked about its test part.

Legend: N examples, D width, V classes.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.analysis.geometry import effective_rank, spectrum
from pretrain.energy.meter import Meter, zeus_counter
from pretrain.runtime.ranks import alone
from pretrain.study.cells import one_thread
from pretrain.study.vision.config import Cell, LinearConfig
from pretrain.study.vision.examples import Examples, Part
from pretrain.study.vision.networks import Learner

EVALUATED = 1024  # inputs at a time
BINS = 15  # of confidence, in the calibration error
PICTURED = 16  # prototypes of a linear network that are kept as images
MEASURES = (  # of a cell that are averaged over seeds, beside accuracies under noise and attack
    "accuracy",
    "macro_f1",
    "loss",
    "calibration_error",
    "train_accuracy",
    "tuning_accuracy",
    "tuning_loss",
    "prototypes_first_2",
    "prototypes_components_90",
    "prototypes_effective_rank",
    "features_first_2",
    "features_components_90",
    "features_effective_rank",
    "fgsm_unmoved",
    "seconds",
    "images_per_s",
    "j_per_image",
)
SHARED = "cells at once share the machine's counters; with processes: 1 each is measured"


@functools.lru_cache(maxsize=2)
def examples_of(folder: Path, name: str) -> Examples:
    """The examples of a fingerprint, as the study keeps them; the last two stay in memory."""
    return Examples.load(folder, name)


def train_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """A cell's figures, plain values; None for what it has not: all of training that left the finite numbers
    (`diverged`: at this step), and what was not measured.
    """
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(cell.seed)  # of noise that a distance may have, and of dropout
        return _train(cell, examples_of(folder, cell.data))


def _train(cell: Cell, examples: Examples) -> dict[str, Any]:
    device = torch.device(cell.device)
    init, decay = cell.setting.init, cell.setting.weight_decay
    learner = Learner(cell.network, cell.head, examples, cell.dim, cell.seed, init).to(device)
    inputs, labels = examples.train.inputs.to(device), examples.train.labels.to(device)
    learner.measure(learner.normalise(inputs[:EVALUATED]))
    optimizer = torch.optim.AdamW(learner.groups(decay), lr=cell.setting.lr, betas=cell.betas, fused=True)
    batch = min(cell.batch, len(labels))
    steps = cell.epochs * (len(labels) // batch)
    order = torch.Generator().manual_seed(cell.seed)
    diverged = None
    meter = _meter(cell.device, cell.measured)
    with meter.window("train") as spent:
        for step, rows in enumerate(_batches(len(labels), batch, cell.epochs, order)):
            for group in optimizer.param_groups:
                group["lr"] = cell.setting.lr * _share(step, steps, cell.warmup)
            learner.head.progress = cell.head.progress(step, steps)
            optimizer.zero_grad()
            rows = rows.to(device)
            loss = learner.head(learner.features(learner.normalise(inputs[rows])), labels[rows])
            if not math.isfinite(loss.item()):
                diverged = step
                break
            loss.backward()
            optimizer.step()
    figures = {} if diverged is not None else _figures(cell, learner, examples)
    if figures and not all(math.isfinite(figures[name]) for name in ("loss", "tuning_loss")):
        figures, diverged = {}, steps
    joules = spent[0].total_j or None  # 0: the window was too short for the counter
    made = steps * batch
    return {
        **dict.fromkeys(MEASURES),
        **figures,
        "diverged": diverged,
        "steps": steps,
        "seconds": spent[0].seconds,
        "images_per_s": made / spent[0].seconds if diverged is None else None,
        "j_per_image": joules / made if joules is not None and diverged is None else None,
        "not_measured": dict(meter.missing) if cell.measured else {"energy": SHARED},
    }


@functools.cache
def _meter(device: str, measured: bool) -> Meter:
    """Of this process; one that does not measure tells the seconds alone."""
    ranks = replace(alone(), device=torch.device(device))
    return Meter(ranks, zeus_counter(ranks) if measured else None)


def _batches(count: int, batch: int, epochs: int, order: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step; what an epoch has over whole batches is left out, another rest each time."""
    for _ in range(epochs):
        rows = torch.randperm(count, generator=order)
        yield from rows[: count // batch * batch].view(-1, batch)


def _share(step: int, steps: int, warmup: float) -> float:
    """Of the rate: up over the warm-up, then down in a straight line, 0 after the last step."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising), 1.0)


# ---- what is asked of a trained network


def _figures(cell: Cell, learner: Learner, examples: Examples) -> dict[str, Any]:
    learner.eval()
    test, tuning, train = (Asked(learner, part) for part in (examples.test, examples.tuning, examples.train))
    figures: dict[str, Any] = {
        "accuracy": test.accuracy(),
        "macro_f1": macro_f1(test.predicted, test.labels, len(examples.classes)),
        "loss": test.loss(),
        "calibration_error": calibration_error(test.confidence, test.predicted == test.labels),
        "train_accuracy": train.accuracy(),
        "tuning_accuracy": tuning.accuracy(),
        "tuning_loss": tuning.loss(),
        "right": packed(test.predicted == test.labels),
    }
    if not math.isfinite(figures["loss"]):
        return figures  # it has diverged
    noise = torch.Generator(cell.device).manual_seed(cell.seed)
    for size in cell.noise:

        def noisy(inputs: Tensor, labels: Tensor, size: float = size) -> Tensor:
            drawn = torch.randn(inputs.shape, generator=noise, device=inputs.device)
            return inputs + size * drawn

        figures[f"accuracy_noise_{size:g}"] = Asked(learner, examples.test, noisy).accuracy()
    for size in cell.fgsm:
        attack = Attack(learner, size)
        figures[f"accuracy_fgsm_{size:g}"] = Asked(learner, examples.test, attack).accuracy()
        figures["fgsm_unmoved"] = attack.unmoved / len(examples.test.labels)
    with torch.no_grad():
        features = [
            learner.features(learner.normalise(some.to(cell.device))) for some in examples.test.inputs.split(EVALUATED)
        ]
    for name, rows in (("prototypes", learner.head.prototypes.detach()), ("features", torch.cat(features))):
        figures |= _geometry(name, learner.head.score_function.transform(rows))
    if isinstance(cell.network, LinearConfig):
        figures["pictures"] = pictures(learner.head.prototypes.detach(), examples.shape)
    return figures


class Asked:
    """What a learner says of a part, whose inputs may be changed before: of N examples the most probable class, its
    probability and the loss, in nats.
    """

    def __init__(self, learner: Learner, part: Part, change: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.labels = part.labels
        found: list[tuple[Tensor, ...]] = []
        for some, labels in zip(part.inputs.split(EVALUATED), part.labels.split(EVALUATED), strict=True):
            there = labels.to(learner.mean.device)
            inputs = learner.normalise(some.to(there.device))
            inputs = change(inputs, there) if change else inputs
            with torch.no_grad():
                log_probs = learner.head.log_probs(learner.features(inputs))
            highest, predicted = log_probs.max(1)
            losses = -log_probs.gather(1, there[:, None])[:, 0]
            found.append((predicted.cpu(), highest.double().exp().cpu(), losses.double().cpu()))
        self.predicted, self.confidence, self.losses = (torch.cat(x) for x in zip(*found, strict=True))

    def accuracy(self) -> float:
        """The share that is right."""
        return (self.predicted == self.labels).double().mean().item()

    def loss(self) -> float:
        """The mean negative log-likelihood, in nats."""
        return self.losses.mean().item()


class Attack:
    """The fast gradient sign method (arXiv:1412.6572): every entry of an input moves by `size`, to where the loss
    grows. An input on which the gradient is 0 in float32 stays; they are counted (`unmoved`), as they make a network
    look safer than it is.
    """

    def __init__(self, learner: Learner, size: float) -> None:
        self.learner, self.size = learner, size
        self.unmoved = 0

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs (N, *shape) of mean 0 and variance 1, and their classes (N,) -> inputs that are moved."""
        inputs = inputs.detach().requires_grad_()
        loss = self.learner.head(self.learner.features(inputs), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, inputs)
        self.unmoved += int((slope == 0).flatten(1).all(1).sum())
        return (inputs + self.size * slope.sign()).detach()


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """The mean over classes of the harmonic mean of precision and recall; 0 for a class that is never right, and a
    class that is neither there nor predicted does not count.
    """
    right = torch.bincount(labels[predicted == labels], minlength=classes).double()
    both = (torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes)).double()
    return (2 * right[both > 0] / both[both > 0]).mean().item()


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error (arXiv:1706.04599): over BINS bins of equal width, the share of examples in a bin
    times the difference of its mean confidence and its accuracy.
    """
    places = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, places, confidence.double() - right.double())
    return (sums.abs().sum() / len(confidence)).item()


def _geometry(name: str, rows: Tensor) -> dict[str, float | None]:
    """Of points as the head's distance sees them, less their mean."""
    if not rows.isfinite().all() or len(rows) < 3:
        return {}
    spread = spectrum(rows)
    if not spread.variances.sum() > 0:
        return {}
    return {
        f"{name}_first_2": spread.explained(2),
        f"{name}_components_90": spread.dimensions(0.9),
        f"{name}_effective_rank": effective_rank(rows.double() - rows.double().mean(0)),
    }


def packed(right: Tensor) -> str:
    """(N,) bool -> base64 of its bits, eight to a byte, the first one highest."""
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The reverse: (count,) bool."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def pictures(prototypes: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """The first PICTURED prototypes as images of the inputs' shape, base64 of a byte for each entry: 128 is 0, and 1 or
    255 the largest entry of all, `largest`.
    """
    rows = prototypes[:PICTURED].double().cpu()
    largest = rows.abs().max().item()
    values = (128 + 127 * rows / largest if largest else torch.full_like(rows, 128)).round().to(torch.uint8)
    return {"shape": list(shape), "largest": largest, "pixels": base64.b64encode(values.numpy().tobytes()).decode()}
