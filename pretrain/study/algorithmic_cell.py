"""One cell of an algorithmic study: a small network with a head learns a task.

Legend: N examples, T tokens of an input, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import DecoderConfig
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.analysis.geometry import circle_score, group_score, lattice_score, spectrum
from pretrain.study.algorithmic_config import Cell, DecayRule, MlpConfig
from pretrain.study.algorithmic_results import GOAL, MEASURES, finite
from pretrain.study.cells import one_thread
from pretrain.study.tasks import TASKS, Task, split


def _flops_in_place(_: Any, a: torch.Size, b: torch.Size, **rest: Any) -> int:
    """Of c.addmm_(a, b), by which the head adds up its gradients, and which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: _flops_in_place}


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
                self.last = list(self.trunk[-1].parameters())
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
                self.last = list(decoder.norm.parameters())

    def features(self, inputs: Tensor) -> Tensor:
        """(N, T) -> (N, D), of the length that the head takes."""
        hidden = self.trunk(inputs)
        return (hidden if hidden.dim() == 2 else hidden[:, -1]) * self.scale

    def groups(self, weight_decay: float, rule: DecayRule) -> list[dict[str, Any]]:
        """Parameters by decay, as a `Candidate` has it. What else a head trains never decays: its zero means something.
        A group with a `norm`, the one that its parameters started with, is to have a rate that falls with it.
        """
        prototypes, last = (
            [self.head.prototypes],
            self.last,
        )  # the second makes features: a last layer, or a norm's gain
        rest = [p for p in self.trunk.parameters() if all(p is not one for one in last)]
        own = [p for p in self.head.parameters() if p is not self.head.prototypes]
        free = {"no_prototypes": prototypes, "no_last_layer": [*prototypes, *last]}.get(rule, [])
        decayed = [p for p in [*rest, *last, *prototypes] if all(p is not one for one in free)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": [*free, *own], "weight_decay": 0.0}]
        if rule == "rate_by_norm":
            groups[0]["params"] = rest
            for scaled in (last, prototypes):
                groups.append({"params": scaled, "weight_decay": weight_decay, "norm": norm_of(scaled)})
        return groups


def norm_of(parameters: Sequence[Tensor]) -> float:
    """Of all of them together."""
    return math.sqrt(sum(p.detach().square().sum().item() for p in parameters))


def train_cell(cell: Cell) -> dict[str, Any]:
    """A cell's figures, plain values; None for what it has not: epochs of a goal that it never reached, final figures
    of training that left the finite numbers (`diverged`: in this epoch), figures that say nothing about its task.
    `prototype_growth`: their root mean square over that of their start. `gflops`: of the matrix products of training;
    not of those within attention, nor of what distances do entry by entry. `test_curve`: epochs with the accuracy after
    them.
    """
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(cell.seed)  # of noise that a distance may have
        return _train(cell)


def _train(cell: Cell) -> dict[str, Any]:
    task = TASKS[cell.task]()
    train, test = split(task, cell.fraction, cell.seed)
    inputs, answers = task.inputs[train], task.answers[train]
    learner = Learner(cell, task)
    groups = learner.groups(cell.weight_decay, cell.decay_rule)
    optimizer = torch.optim.AdamW(groups, lr=cell.lr, betas=cell.betas, fused=True)
    reached: dict[str, int | None] = {"generalise": None, "memorise": None}
    diverged, final = None, dict.fromkeys(MEASURES)
    curve: list[tuple[int, float]] = []
    start = norm_of([learner.head.prototypes])
    began = time.perf_counter()
    for epoch in range(1, cell.epochs + 1):
        for group in optimizer.param_groups:
            shrunk = min(1.0, norm_of(group["params"]) / group["norm"]) if "norm" in group else 1.0
            group["lr"] = cell.lr * (1 - (epoch - 1) / cell.epochs) * shrunk
        learner.head.progress = cell.head.progress(epoch - 1, cell.epochs)
        optimizer.zero_grad()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) if epoch == 1 else nullcontext() as counted:
            loss = learner.head(learner.features(inputs), answers)
            if not math.isfinite(loss.item()):
                diverged = epoch
                break
            loss.backward()
        if counted is not None:
            final["gflops"] = counted.get_total_flops() * cell.epochs / 1e9
        optimizer.step()
        if epoch % cell.evaluate_every == 0 or epoch == cell.epochs:
            figures = _evaluate(learner, task, train, test)
            if not math.isfinite(figures["train_loss"]):
                diverged = epoch
                break
            curve.append((epoch, figures["test_accuracy"]))
            for goal, part in (("generalise", "test_accuracy"), ("memorise", "train_accuracy")):
                if reached[goal] is None and figures[part] >= GOAL:
                    reached[goal] = epoch
    else:
        final.update(figures, **_geometry(learner, task))
        final["prototype_growth"] = norm_of([learner.head.prototypes]) / start
    final["seconds"] = time.perf_counter() - began
    epochs = {f"epochs_to_{goal}": epoch for goal, epoch in reached.items()}
    return {**epochs, "diverged": diverged, **{k: finite(value) for k, value in final.items()}, "test_curve": curve}


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
    """Share of the variance in the first two components, and how near a circle, a lattice or groups the points are: of
    the prototypes as the distance sees them (of length 1 for cosine) and of the elements' embeddings as they are.
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
    if task.crystal == "lattice":
        return lattice_score(rows, task.coordinates)
    assert task.groups is not None
    return group_score(rows, task.groups)
