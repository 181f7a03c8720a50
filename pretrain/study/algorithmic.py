"""Which head needs how much data, and how many epochs, to generalise on the tasks of pretrain/study/tasks.py, and how
its prototypes and embeddings come to lie: after arXiv:2502.01628, section 4, with everything but the head the same.

A cell is one task, network, head, fraction of training examples and seed. Of one seed, all heads get the same split,
the same initial trunk, the same draw of prototypes (in their own scale) and the same full batches, one an epoch. The
learning rate falls to 0 in a straight line over the task's epochs, and no cell stops early, so that its geometry is
always that of the last epoch. Learning rate and weight decay are chosen for each task, network and head alike, among
the same candidates, on seeds that no reported cell has.

Every finished cell is a file in `out`/cells, so that a study that was stopped goes on where it was; one study at a time
may work there. The same cell gives the same figures on one machine, but for its seconds: it has one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigError
from common.progress import Log
from pretrain.recorder import machine
from pretrain.study.algorithmic_cell import train_cell
from pretrain.study.algorithmic_config import AlgorithmicConfig, Candidate, Cell, TaskName
from pretrain.study.algorithmic_results import (
    GOAL,
    at_fraction,
    compare,
    curve,
    curves,
    edges,
    kept,
    median,
    summarise,
)
from pretrain.study.cells import finish
from pretrain.study.tasks import TASKS, training_examples

Name = tuple[TaskName, str, str]  # task, network, head


def run(cfg: AlgorithmicConfig, log: Log) -> dict[str, Any]:
    """Trains what is not yet in `cfg.out` and returns the results: `cells`, flat, `choices` of learning rate and weight
    decay, `summary` by task, network and head, `comparison` with the baseline, `curves` of the test accuracy by epochs,
    and `sweep` of weight decay, if the study has one.

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
    figures = finish([cell for _, cell in cells], train_cell, cfg.processes, folder, log, "cells")
    swept = _sweep(cfg, folder, log) if cfg.sweep else []
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
    rows = [{name: value for name, value in cell.items() if name != "test_curve"} for cell in flat]
    return {
        "kind": cfg.kind,
        "torch": torch.__version__,
        "machine": machine(),
        "config": cfg.model_dump(mode="json"),
        "goal": GOAL,
        "choices": [
            {
                **{"task": task, "network": network, "head": head, **chosen.model_dump(), "candidates": tried},
                "edges": edges(chosen.model_dump(), [one.model_dump() for one in cfg.choice.candidates]),
            }
            for (task, network, head), (chosen, tried) in choices.items()
        ],
        "summary": summary,
        "comparison": compare(rows, summary, cfg.baseline),
        "curves": curves(flat),
        "sweep": swept,
        "cells": rows,
    }


def cell_of(cfg: AlgorithmicConfig, name: Name, fraction: float, seed: int, chosen: Candidate) -> Cell:
    """What a cell trains, of a study's settings."""
    task, network, head = name
    return Cell(
        task=task,
        network=next(settings for settings in cfg.networks if settings.kind == network),
        head=cfg.heads[head],
        fraction=fraction,
        seed=seed,
        epochs=cfg.tasks[task].epochs,
        evaluate_every=cfg.tasks[task].evaluate_every,
        dim=cfg.dim,
        betas=cfg.betas,
        **chosen.model_dump(),
    )


def _choose(cfg: AlgorithmicConfig, folder: Path, log: Log) -> dict[Name, tuple[Candidate, list[dict[str, Any]]]]:
    """The candidate for each task, network and head, and what every candidate did."""
    names: list[Name] = [
        (task, network.kind, head) for task in cfg.tasks for network in cfg.networks for head in cfg.heads
    ]
    asked = [(name, cfg.tasks[name[0]].fractions[-1], cfg.choice.candidates) for name in names]
    return dict(zip(names, _best(cfg, asked, folder, log, "choosing"), strict=True))


def _sweep(cfg: AlgorithmicConfig, folder: Path, log: Log) -> list[dict[str, Any]]:
    """Every head of the sweep with each weight decay and rule, at the rate that was chosen for it."""
    sweep = cfg.sweep
    assert sweep is not None
    groups = [(head, decay, rule) for head in sweep.heads for decay, rule in sweep.settings()]
    asked = [
        (
            (sweep.task, sweep.network, head),
            sweep.fraction,
            [Candidate(lr=lr, weight_decay=decay, decay_rule=rule) for lr in sweep.lrs],
        )
        for head, decay, rule in groups
    ]
    chosen = _best(cfg, asked, folder, log, "sweep: choosing")
    cells = [
        [cell_of(cfg, name, fraction, seed, best) for seed in cfg.seeds]
        for (name, fraction, _), (best, _) in zip(asked, chosen, strict=True)
    ]
    figures = finish([cell for seeds in cells for cell in seeds], train_cell, cfg.processes, folder, log, "sweep")
    return [
        {
            "head": head,
            **best.model_dump(),
            "candidates": tried,
            **at_fraction(runs := [figures[cell.key()] for cell in seeds]),
            "curve": curve(runs),
        }
        for (head, _, _), (best, tried), seeds in zip(groups, chosen, cells, strict=True)
    ]


Asked = tuple[Name, float, Sequence[Candidate]]  # of what, at which fraction, among what


def _best(
    cfg: AlgorithmicConfig, asked: Sequence[Asked], folder: Path, log: Log, what: str
) -> list[tuple[Candidate, list[dict[str, Any]]]]:
    """The candidate for each that is asked for, as ChoiceConfig says, and what every candidate did."""
    cells = [
        [[cell_of(cfg, name, fraction, seed, one) for seed in cfg.choice.seeds] for one in candidates]
        if len(candidates) > 1
        else []
        for name, fraction, candidates in asked
    ]
    every = [cell for tried in cells for seeds in tried for cell in seeds]
    figures = finish(every, train_cell, cfg.processes, folder, log, what) if every else {}
    found: list[tuple[Candidate, list[dict[str, Any]]]] = []
    for (_, _, candidates), tried in zip(asked, cells, strict=True):
        runs = [[figures[cell.key()] for cell in seeds] for seeds in tried]
        best = min(range(len(runs)), key=[_preference(seeds) for seeds in runs].__getitem__, default=0)
        results = [{**c.model_dump(), **at_fraction(seeds)} for c, seeds in zip(candidates, runs, strict=bool(runs))]
        found.append((candidates[best], results))
    return found


def _preference(runs: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """The smaller, the better."""
    accuracies = [run["test_accuracy"] or 0.0 for run in runs]
    reached = median(run["epochs_to_generalise"] for run in runs)
    return -kept(runs), reached, -statistics.mean(accuracies)
