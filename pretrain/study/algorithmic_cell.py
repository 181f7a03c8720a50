"""One cell of an algorithmic study: a small network with a head learns a task.

Legend: N examples, T tokens of an input, D width.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from model.config import DecoderConfig
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.analysis.geometry import circle_score, lattice_score, spectrum
from pretrain.study.algorithmic_config import Cell, MlpConfig
from pretrain.study.algorithmic_results import GOAL, MEASURES, finite
from pretrain.study.cells import one_thread
from pretrain.study.tasks import TASKS, Task, split


class Learner(nn.Module):
    """Tokens (N, T) -> features (N, D) -> prototypes."""

    def __init__(self, cell: Cell, task: Task) -> None:
        super().__init__()
        places, dim = task.inputs.shape[1], cell.dim
        self.head = HarmonicHead(task.classes, dim, seed=cell.seed, **cell.head.arguments())
        length = self.head.feature_length
        with torch.random.fork_rng():
            torch.manual_seed(cell.seed)
            if isinstance(cell.network, MlpConfig):
                hidden = cell.network.hidden
                self.embedding = nn.Embedding(task.tokens, dim)
                self.trunk: nn.Module = nn.Sequential(
                    *(self.embedding, nn.Flatten()),
                    *(nn.Linear(places * dim, hidden), nn.SiLU()),
                    *(nn.Linear(hidden, hidden), nn.SiLU()),
                    nn.Linear(hidden, dim),
                )
                self.scale = length / dim**0.5
            else:
                decoder = Decoder(
                    DecoderConfig(
                        vocab_size=task.tokens,
                        seq_len=places,
                        layers=cell.network.layers,
                        heads=cell.network.heads,
                        dim=dim,
                    ),
                    length,
                )
                assert decoder.tokens is not None  # it is not tied
                self.embedding, self.trunk, self.scale = decoder.tokens, decoder, 1.0

    def features(self, inputs: Tensor) -> Tensor:
        """(N, T) -> (N, D), of the length that the head takes."""
        hidden = self.trunk(inputs)
        return (hidden if hidden.dim() == 2 else hidden[:, -1]) * self.scale

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All parameters decay, but what else a head trains: its zero means something."""
        own = [p for p in self.head.parameters() if p is not self.head.prototypes]
        decayed = [*self.trunk.parameters(), self.head.prototypes]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": own, "weight_decay": 0.0}]


def train_cell(cell: Cell) -> dict[str, Any]:
    """A cell's figures, plain values; None for what it has not: epochs of a goal that it never reached, final figures
    of training that left the finite numbers (`diverged`: in this epoch), figures that say nothing about its task.
    """
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(cell.seed)  # of noise that a distance may have
        return _train(cell)


def _train(cell: Cell) -> dict[str, Any]:
    task = TASKS[cell.task]()
    train, test = split(task, cell.fraction, cell.seed)
    inputs, answers = task.inputs[train], task.answers[train]
    learner = Learner(cell, task)
    optimizer = torch.optim.AdamW(learner.groups(cell.weight_decay), lr=cell.lr, betas=cell.betas, fused=True)
    reached: dict[str, int | None] = {"generalise": None, "memorise": None}
    diverged, final = None, dict.fromkeys(MEASURES)
    began = time.perf_counter()
    for epoch in range(1, cell.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = cell.lr * (1 - (epoch - 1) / cell.epochs)
        learner.head.progress = cell.head.progress(epoch - 1, cell.epochs)
        optimizer.zero_grad()
        loss = learner.head(learner.features(inputs), answers)
        if not math.isfinite(loss.item()):
            diverged = epoch
            break
        loss.backward()
        optimizer.step()
        if epoch % cell.evaluate_every == 0 or epoch == cell.epochs:
            figures = _evaluate(learner, task, train, test)
            if not math.isfinite(figures["train_loss"]):
                diverged = epoch
                break
            for goal, part in (("generalise", "test_accuracy"), ("memorise", "train_accuracy")):
                if reached[goal] is None and figures[part] >= GOAL:
                    reached[goal] = epoch
    else:
        final.update(figures, **_geometry(learner, task))
    final["seconds"] = time.perf_counter() - began
    epochs = {f"epochs_to_{goal}": epoch for goal, epoch in reached.items()}
    return {**epochs, "diverged": diverged, **{name: finite(value) for name, value in final.items()}}


@torch.no_grad()
def _evaluate(learner: Learner, task: Task, train: Tensor, test: Tensor) -> dict[str, float]:
    learner.eval()
    losses, predicted = learner.head.score(learner.features(task.inputs), task.answers)
    learner.train()
    right = (predicted == task.answers).double()
    return {
        f"{name}_{what}": values[part].double().mean().item()
        for name, part in (("train", train), ("test", test))
        for what, values in (("accuracy", right), ("loss", losses))
    }


def _geometry(learner: Learner, task: Task) -> dict[str, float | None]:
    """Share of the variance in the first two components, and how near a circle or a lattice the points are: of the
    prototypes as the distance sees them (of length 1 for cosine) and of the elements' embeddings as they are.
    """
    learner.eval()
    seen = learner.head.score_function.transform(learner.head.prototypes.detach())
    points = {"prototypes": seen, "embedding": learner.embedding.weight.detach()[: task.elements]}
    figures: dict[str, float | None] = {}
    for name, rows in points.items():
        telling = len(rows) > 3 and bool(rows.isfinite().all())  # three points lie in a plane anyway
        figures[f"{name}_explained"] = spectrum(rows).explained(2) if telling else None
        figures[f"{name}_crystal"] = _crystal(rows, task) if telling else None
    return figures


def _crystal(rows: Tensor, task: Task) -> float | None:
    if task.crystal == "circle":
        return circle_score(rows).score  # the best of all steps k, so that any multiple of 0, 1, 2, ... will do
    return lattice_score(rows, task.coordinates) if task.crystal == "lattice" else None
