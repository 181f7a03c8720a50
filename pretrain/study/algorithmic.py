"""Which head needs how much data, and how many epochs, to generalise on the tasks of pretrain/study/tasks.py, and how
its prototypes and embeddings come to lie: after arXiv:2502.01628, section 4, with everything but the head the same.

A cell is one task, network, head, fraction of training examples and seed. Of one seed, all heads get the same split,
the same initial trunk, the same draw of prototypes (in their own scale) and the same full batches, one an epoch. The
learning rate falls to 0 in a straight line over the task's epochs, and no cell stops early, so that its geometry is
always that of the last epoch. Learning rate and weight decay are chosen for each task, network and head alike, among
the same candidates, on seeds that no reported cell has.

Every finished cell is a file in `out`/cells, so that a study that was stopped goes on where it was; one study at a time
may work there. The same cell gives the same figures on one machine, but for its seconds: it has one thread.

Legend: N examples, T tokens of an input, D width, V classes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from common.errors import ConfigError
from common.files import replace_file
from common.plain import to_json
from common.progress import Log, progress
from common.workers import Workers
from model.config import DecoderConfig, HeadConfig
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.analysis.geometry import circle_score, lattice_score, spectrum
from pretrain.metrics import machine
from pretrain.study.algorithmic_results import GOAL, MEASURES, at_fraction, compare, finite, kept, median, summarise
from pretrain.study.tasks import TASKS, Task, split, training_examples

VERSION = 1  # of what a cell's settings mean: to be raised when the same settings would give other figures

log = logging.getLogger(__name__)

TaskName = Literal["modular_addition", "circle", "equivalence", "in_context", "permutation"]


# ---- settings


class MlpConfig(BaseModel, extra="forbid", frozen=True):
    """Embeddings of the inputs side by side, two hidden layers with SiLU, D features."""

    kind: Literal["mlp"]
    hidden: int = Field(default=100, gt=0)


class TransformerConfig(BaseModel, extra="forbid", frozen=True):
    """A `Decoder` with learned positions, whose last hidden state predicts."""

    kind: Literal["transformer"]
    layers: int = Field(default=2, gt=0)
    heads: int = Field(default=2, gt=0)


NetworkConfig = Annotated[MlpConfig | TransformerConfig, Field(discriminator="kind")]


class TaskConfig(BaseModel, extra="forbid", frozen=True):
    fractions: tuple[float, ...] = Field(min_length=1)  # of all examples, to train on; ascending
    epochs: int = Field(gt=0)  # updates: batches are full
    evaluate_every: int = Field(default=5, gt=0)  # epochs; those to generalise are counted in these

    @model_validator(mode="after")
    def _rising_fractions(self) -> TaskConfig:
        rising = all(a < b for a, b in itertools.pairwise(self.fractions))
        if not rising or not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(f"fractions={list(self.fractions)} must rise and lie between 0 and 1")
        return self


class Candidate(BaseModel, extra="forbid", frozen=True):
    lr: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)


class ChoiceConfig(BaseModel, extra="forbid", frozen=True):
    """Each candidate is trained at the task's largest fraction, where most heads can be told apart, with the seeds
    given here. Taken is the one with which most of them end with GOAL of the test examples right; of those the one with
    the fewest epochs until they first had it, in the median; of those the one with the best mean test accuracy; of
    those the first.
    """

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _a_choice_has_seeds(self) -> ChoiceConfig:
        if len(self.candidates) > 1 and not self.seeds:
            raise ValueError(f"seeds: none given; {len(self.candidates)} candidates need at least one to choose by")
        return self


class AlgorithmicConfig(BaseModel, extra="forbid", frozen=True):
    kind: Literal["algorithmic"]
    title: str
    out: Path
    processes: int = Field(default=1, gt=0)  # cells at once, each on one thread
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    networks: tuple[NetworkConfig, ...] = Field(min_length=1)
    heads: dict[str, HeadConfig] = Field(min_length=1)
    baseline: str  # one of the heads, which the others are compared with
    dim: int = Field(default=16, gt=1)  # of embeddings, features and prototypes
    betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    choice: ChoiceConfig
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_cell_once(self) -> AlgorithmicConfig:
        for name, values in (
            ("networks", [network.kind for network in self.networks]),
            ("seeds", list(self.seeds)),
            ("choice.seeds", list(self.choice.seeds)),
            ("choice.candidates", [(one.lr, one.weight_decay) for one in self.choice.candidates]),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must differ from each other")
        common = set(self.seeds) & set(self.choice.seeds)
        if common:
            raise ValueError(f"choice.seeds and seeds share {sorted(common)}: what is reported must not have chosen")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _baseline_is_a_head(self) -> AlgorithmicConfig:
        if self.baseline not in self.heads:
            raise ValueError(f"baseline={self.baseline} is none of the heads: {', '.join(self.heads)}")
        return self

    @model_validator(mode="after")
    def _there_are_examples(self) -> AlgorithmicConfig:
        for name, one in self.tasks.items():
            task = TASKS[name]()
            for fraction in one.fractions:
                if not 0 < training_examples(task, fraction) < len(task.answers):
                    raise ValueError(
                        f"tasks.{name}.fractions: {fraction} of {len(task.answers)} examples leaves none to train on "
                        "or none to test"
                    )
        return self

    @model_validator(mode="after")
    def _decoders_can_be_made(self) -> AlgorithmicConfig:
        for network in self.networks:
            if isinstance(network, TransformerConfig) and self.dim % network.heads:
                raise ValueError(f"dim={self.dim} must be a multiple of the transformer's heads={network.heads}")
        return self


class Cell(BaseModel, extra="forbid", frozen=True):
    """Exactly what determines a cell's figures."""

    task: TaskName
    network: NetworkConfig
    head: HeadConfig
    fraction: float
    seed: int
    epochs: int
    evaluate_every: int
    dim: int
    betas: tuple[float, float]
    lr: float
    weight_decay: float

    def settings(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {"version": VERSION, **self.model_dump(mode="json")}

    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]

    def file(self, folder: Path) -> Path:
        return folder / f"{self.key()}.json"


# ---- one cell


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
        found = self.trunk(inputs)
        return (found if found.dim() == 2 else found[:, -1]) * self.scale

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All parameters decay, but what else a head trains: its zero means something."""
        own = [p for p in self.head.parameters() if p is not self.head.prototypes]
        kept = {id(p) for p in own}
        decayed = [p for p in self.parameters() if id(p) not in kept]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": own, "weight_decay": 0.0}]


def train_cell(cell: Cell) -> dict[str, Any]:
    """A cell's figures, plain values; None for what it has not: epochs of a goal that it never reached, final figures
    of training that left the finite numbers (`diverged`: in this epoch), figures that say nothing about its task.
    """
    with _one_thread(), torch.random.fork_rng():
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
            found = _evaluate(learner, task, train, test)
            if not math.isfinite(found["train_loss"]):
                diverged = epoch
                break
            for goal, part in (("generalise", "test_accuracy"), ("memorise", "train_accuracy")):
                if reached[goal] is None and found[part] >= GOAL:
                    reached[goal] = epoch
    else:
        final.update(found, **_geometry(learner, task))
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
    found: dict[str, float | None] = {}
    for name, rows in points.items():
        telling = len(rows) > 3 and bool(rows.isfinite().all())  # three points lie in a plane anyway
        found[f"{name}_explained"] = spectrum(rows).explained(2) if telling else None
        found[f"{name}_crystal"] = _crystal(rows, task) if telling else None
    return found


def _crystal(rows: Tensor, task: Task) -> float | None:
    if task.crystal == "circle":
        return circle_score(rows).score  # the best of all steps k, so that any multiple of 0, 1, 2, ... will do
    return lattice_score(rows, task.coordinates) if task.crystal == "lattice" else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, and no fight over cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- the grid

Name = tuple[TaskName, str, str]  # task, network, head


def run(cfg: AlgorithmicConfig, log: Log) -> dict[str, Any]:
    """Trains what is not yet in `cfg.out` and returns the results: `cells`, flat, `choices` of learning rate and weight
    decay, `summary` by task, network and head, and `comparison` with the baseline.

    Raises:
        ConfigError: the folder cannot be written, or a process was killed.
    """
    folder = cfg.out / "cells"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={cfg.out}: cannot be written: {error}; give a folder that can") from None
    choices = _choose(cfg, folder, log)
    cells = [
        (name[2], cell_of(cfg, name, fraction, seed, chosen))
        for name, (chosen, _) in choices.items()
        for fraction in cfg.tasks[name[0]].fractions
        for seed in cfg.seeds
    ]
    figures = _finish([cell for _, cell in cells], cfg.processes, folder, log, "cells")
    flat = [
        {
            "task": cell.task,
            "network": cell.network.kind,
            "head": head,
            "fraction": cell.fraction,
            "examples": training_examples(TASKS[cell.task](), cell.fraction),
            "seed": cell.seed,
            "lr": cell.lr,
            "weight_decay": cell.weight_decay,
            "epochs": cell.epochs,
            **figures[cell.key()],
        }
        for head, cell in cells
    ]
    summary = summarise(flat)
    return {
        "kind": cfg.kind,
        "torch": torch.__version__,
        "machine": machine(),
        "config": cfg.model_dump(mode="json"),
        "goal": GOAL,
        "choices": [
            {"task": task, "network": network, "head": head, **chosen.model_dump(), "candidates": tried}
            for (task, network, head), (chosen, tried) in choices.items()
        ],
        "summary": summary,
        "comparison": compare(flat, summary, cfg.baseline),
        "cells": flat,
    }


def cell_of(cfg: AlgorithmicConfig, name: Name, fraction: float, seed: int, settings: Candidate) -> Cell:
    task, network, head = name
    return Cell(
        task=task,
        network=next(one for one in cfg.networks if one.kind == network),
        head=cfg.heads[head],
        fraction=fraction,
        seed=seed,
        epochs=cfg.tasks[task].epochs,
        evaluate_every=cfg.tasks[task].evaluate_every,
        dim=cfg.dim,
        betas=cfg.betas,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )


def _choose(cfg: AlgorithmicConfig, folder: Path, log: Log) -> dict[Name, tuple[Candidate, list[dict[str, Any]]]]:
    """The candidate for each task, network and head, and what every candidate did."""
    names: list[Name] = [
        (task, network.kind, head) for task in cfg.tasks for network in cfg.networks for head in cfg.heads
    ]
    candidates = cfg.choice.candidates
    if len(candidates) == 1:
        return {name: (candidates[0], []) for name in names}
    cells = {
        name: [
            [cell_of(cfg, name, cfg.tasks[name[0]].fractions[-1], seed, one) for seed in cfg.choice.seeds]
            for one in candidates
        ]
        for name in names
    }
    figures = _finish(
        [cell for tried in cells.values() for some in tried for cell in some], cfg.processes, folder, log, "choosing"
    )
    found = {}
    for name, tried in cells.items():
        runs = [[figures[cell.key()] for cell in some] for some in tried]
        best = min(range(len(candidates)), key=[_preference(some) for some in runs].__getitem__)
        told = [{**one.model_dump(), **at_fraction(some)} for one, some in zip(candidates, runs, strict=True)]
        found[name] = candidates[best], told
    return found


def _preference(runs: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """The smaller, the better."""
    accuracies = [run["test_accuracy"] or 0.0 for run in runs]
    reached = median(run["epochs_to_generalise"] for run in runs)
    return -kept(runs), reached, -statistics.mean(accuracies)


def _finish(cells: Sequence[Cell], processes: int, folder: Path, say: Log, what: str) -> dict[str, dict[str, Any]]:
    """The figures of cells by their keys: of those that have none yet, by training."""
    found = {cell.key(): figures for cell in cells if (figures := read_cell(cell, folder)) is not None}
    missing = {cell.key(): cell for cell in cells if cell.key() not in found}
    if found:
        say(f"{what}: {len(found):,} of {len(found) + len(missing):,} cells are finished already")
    count = min(processes, max(1, len(missing)))
    with progress(what, say) as tell, Workers(partial(_train_and_keep, folder), count) as workers:
        asked = ((key, workers.submit(cell)) for key, cell in missing.items())
        for done, (key, result) in enumerate(list(asked) if count > 1 else asked, 1):
            found[key] = workers.result(result)
            tell(done / len(missing), f"{done:,} of {len(missing):,} cells")
    return found


def _train_and_keep(folder: Path, cell: Cell) -> dict[str, Any]:
    figures = train_cell(cell)
    kept = {"cell": cell.settings(), "figures": figures}
    replace_file(cell.file(folder), to_json(kept, indent=1) + "\n")
    return figures


def read_cell(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The figures of a finished cell; None if there are none of exactly its settings."""
    file = cell.file(folder)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["cell"] == cell.settings():
            return dict(kept["figures"])
        log.warning("%s is of other settings than its name says: its cell is trained again", file)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        log.warning("%s cannot be read: its cell is trained again", file)
    return None
