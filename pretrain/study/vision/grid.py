"""Which head classifies images and signals how well, on which network: accuracy, F1, loss, calibration, robustness, the
geometry of prototypes and features, speed and energy, with everything but the head the same.

A cell is one data set, network, head and seed. Of one seed, all heads get the same initial network, the same draw of
prototypes (in their own scale) and the same batches. Rate, weight decay and the scale of the prototypes' start are
chosen for each data set, network and head: each gets the same trials, which are judged on the tuning part alone, with
seeds that no reported cell has. The test part is asked once, of the chosen setting trained anew.

Examples are read, split and written to `out`/data before anything is trained. Every finished cell is a file in
`out`/cells, so that a study that was stopped goes on where it was. The same cell gives the same figures on one machine,
but for its seconds and joules: it has one thread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from common.errors import ConfigError
from common.progress import Log
from pretrain.recorder import machine
from pretrain.study.cells import Figures, finish
from pretrain.study.vision import networks, sources, zoo
from pretrain.study.vision.cell import MEASURES, train_cell
from pretrain.study.vision.config import Cell, Setting, VisionConfig
from pretrain.study.vision.examples import Examples
from pretrain.study.vision.results import compare, summarise

Name = tuple[str, str, str]  # data, network, head


def run(cfg: VisionConfig, log: Log) -> dict[str, Any]:
    """Trains what is not yet in `cfg.out` and returns the results: `data`, what was trained on; `choices` with all
    trials; `summary` by data set, network and head; `comparison` with the baseline; `pictures` of linear networks'
    prototypes; `cells`, flat.

    Raises:
        ConfigError: examples cannot be read, a network does not take them, the folder cannot be written, or a process
            was killed.
    """
    check_machine(cfg)
    try:
        for folder in ("data", "cells"):
            (cfg.out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={cfg.out}: cannot be written: {error}; give a folder that can") from None
    known = prepare(cfg, log)
    choices = _choose(cfg, known, log)
    named = [
        (name, cell_of(cfg, name, known[name[0]]["fingerprint"], seed, chosen))
        for name, (chosen, _) in choices.items()
        for seed in cfg.seeds
    ]
    figures = _finish(cfg, [cell for _, cell in named], log, "cells")
    ran = [(name, cell, figures[cell.key()]) for name, cell in named]
    columns = (*MEASURES, *robustness(cfg))
    rows = [_row(name, cell, found, columns) for name, cell, found in ran]
    whole = [{**row, "right": found.get("right")} for row, (_, _, found) in zip(rows, ran, strict=True)]
    return {
        "kind": cfg.kind,
        "torch": torch.__version__,
        "machine": machine(),
        "config": cfg.model_dump(mode="json"),
        "data": known,
        "choices": [
            {"data": data, "network": network, "head": head, **chosen.model_dump(),
             "edges": cfg.tuning.space.edges(chosen), "trials": trials}
            for (data, network, head), (chosen, trials) in choices.items()
        ],
        "not_measured": ran[0][2]["not_measured"],
        "summary": summarise(rows, columns),
        "comparison": compare(whole, {name: found["sizes"]["test"] for name, found in known.items()}, cfg.baseline),
        "pictures": [
            {**dict(zip(("data", "network", "head"), name, strict=True)), "seed": cell.seed, **found["pictures"]}
            for name, cell, found in ran
            if cell.seed == cfg.seeds[0] and found.get("pictures")
        ],
        "cells": rows,
    }  # fmt: skip


def check_machine(cfg: VisionConfig) -> None:
    """Raises ConfigError if what the study needs is not here."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU here; set device: cpu")
    if needed := cfg.needs_torchvision():
        zoo.opened(", ".join(needed))


def prepare(cfg: VisionConfig, log: Log) -> dict[str, dict[str, Any]]:
    """Reads every data set, sees that its networks take it, and keeps it under its fingerprint: what is known of each.

    Raises:
        ConfigError: it cannot be read or kept, or a network does not take it.
    """
    known = {}
    for name, data in cfg.data.items():
        examples = sources.load(name, data, log)
        for network in data.networks or cfg.networks:
            networks.check(network, cfg.networks[network], name, examples, cfg.dim)
        try:
            known[name] = _known(examples, examples.save(cfg.out / "data"))
        except OSError as error:
            folder = cfg.out / "data"
            raise ConfigError(f"{folder}: cannot be written: {error}; make room, or give another out") from None
    return known


def _known(examples: Examples, fingerprint: str) -> dict[str, Any]:
    mean, deviation = examples.moments()
    return {
        "fingerprint": fingerprint,
        "sizes": examples.sizes(),
        "shape": list(examples.shape),
        "classes": list(examples.classes),
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
    }


def cell_of(cfg: VisionConfig, name: Name, fingerprint: str, seed: int, setting: Setting, robust: bool = True) -> Cell:
    """What a cell trains, of a study's settings; `robust`: whether it is asked under noise and attack."""
    data, network, head = name
    return Cell(
        data=fingerprint,
        network=cfg.networks[network],
        head=cfg.heads[head],
        seed=seed,
        epochs=cfg.data[data].epochs,
        batch=cfg.data[data].batch,
        dim=cfg.dim,
        betas=cfg.betas,
        warmup=cfg.warmup,
        setting=setting,
        noise=cfg.noise if robust else (),
        fgsm=cfg.fgsm if robust else (),
        device=cfg.device,
        measured=cfg.processes == 1,
    )


def robustness(cfg: VisionConfig) -> list[str]:
    """Names of the accuracies under noise and attack."""
    return [f"accuracy_noise_{size:g}" for size in cfg.noise] + [f"accuracy_fgsm_{size:g}" for size in cfg.fgsm]


def _finish(cfg: VisionConfig, cells: Sequence[Cell], log: Log, what: str) -> dict[str, Figures]:
    return finish(cells, partial(train_cell, cfg.out / "data"), cfg.processes, cfg.out / "cells", log, what)


def _choose(
    cfg: VisionConfig, known: Mapping[str, Mapping[str, Any]], log: Log
) -> dict[Name, tuple[Setting, list[dict[str, Any]]]]:
    """The setting for each data set, network and head, and what every trial did."""
    settings = cfg.tuning.settings()
    names: list[Name] = [(data, network, head) for data, network in cfg.pairs() for head in cfg.heads]
    cells = {
        (name, place): [
            cell_of(cfg, name, known[name[0]]["fingerprint"], seed, setting, robust=False) for seed in cfg.tuning.seeds
        ]
        for name in names
        for place, setting in enumerate(settings)
    }
    figures = _finish(cfg, [cell for seeds in cells.values() for cell in seeds], log, "choosing")
    choices = {}
    for name in names:
        trials = [
            _trial(setting, [figures[cell.key()] for cell in cells[name, place]])
            for place, setting in enumerate(settings)
        ]
        best = min(range(len(trials)), key=lambda place: _preference(trials[place]))
        if trials[best]["accuracy"] is None:
            raise ConfigError(
                f"{', '.join(name)}: every trial diverged; give tuning.space.lr smaller values, and run it again"
            )
        choices[name] = settings[best], trials
    return choices


def _trial(setting: Setting, runs: Sequence[Figures]) -> dict[str, Any]:
    """Means over seeds on the tuning part; None if one of them diverged."""
    diverged = sum(run["diverged"] is not None for run in runs)
    means = {
        name: None if diverged else statistics.fmean(run[f"tuning_{name}"] for run in runs)
        for name in ("accuracy", "loss")
    }
    return {**setting.model_dump(), **means, "diverged": diverged}


def _preference(trial: Mapping[str, Any]) -> tuple[float, float]:
    """The smaller, the better."""
    return (math.inf, math.inf) if trial["accuracy"] is None else (-trial["accuracy"], trial["loss"])


def _row(name: Name, cell: Cell, figures: Figures, columns: Sequence[str]) -> dict[str, Any]:
    """A cell in a line."""
    return {
        **dict(zip(("data", "network", "head"), name, strict=True)),
        "seed": cell.seed,
        **cell.setting.model_dump(),
        "epochs": cell.epochs,
        "steps": figures["steps"],
        "diverged": figures["diverged"],
        **{column: figures.get(column) for column in columns},
    }
