"""A study of two heads that is as small as one can be, and a launcher that trains nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.config import RunConfig, dump, load
from pretrain.records import Eval, Train
from pretrain.runtime.endings import EXIT_RECORD
from pretrain.study import language_config
from pretrain.study.jobs import Jobs
from pretrain.study.language_config import Cell, LanguageConfig
from pretrain.study.records import Records
from tests.support.tiny import text_config

TESTED = {"test_fraction": 0.05}  # of the `data` section
DOCUMENTS = np.array([120.0, 80.0, 200.0, 150.0])  # bytes of the test split that nobody prepared

Bits = Callable[[str], float | None]  # by the run's name; None: it diverges


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two heads, three trials, two rungs, two fresh seeds, one size, on `make_text(folder / "data", **TESTED)`."""
    usual = {"train__steps": 4, "evaluation__every": 2, "logging__every": 1, "train__micro_batch": 4}
    run = text_config(folder, **usual).model_dump(mode="json", exclude={"run": True, "head": True})
    run["data"] |= TESTED
    del run["train"]["seed"], run["optim"]["lr"], run["optim"]["min_lr"], run["optim"]["warmup_steps"]
    del run["optim"]["prototype_decay"], run["optim"]["head_lr_scale"]
    return {
        "kind": "language",
        "title": "two heads",
        "out": str(folder / "study"),
        "baseline": "softmax",
        "heads": {"softmax": {"distance": "dot"}, "cosine": {"distance": "cosine"}},
        "tuning": {
            "trials": 3,
            "rungs": [0.5, 1],
            "seed": 1,
            "space": {
                "lr": {"low": 0.001, "high": 0.1},
                "warmup": {"low": 0.02, "high": 0.5},
                "init": {"low": 0.25, "high": 4},
                "exponent": {"low": 0.5, "high": 2},
                "prototype_decay": [0, 0.1],
            },
        },
        "seeds": [11, 12],
        "sizes": {"d32": {}},
        "base": run,
        **changes,
    }


def study(folder: Path, **changes: Any) -> LanguageConfig:
    return language_config.from_tree(tree(folder, **changes))


def asked(folder: Path, **changes: Any) -> str:
    """A study's file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **changes), sort_keys=False))
    return str(path)


def leave_run(cfg: RunConfig, bits: float | None, code: int | None = 0) -> None:
    """The folder of a run that ended; with `code` None, of one that did not tell how."""
    cfg.run.mkdir(parents=True, exist_ok=True)
    (cfg.run / "config.yaml").write_text(dump(cfg))
    steps = cfg.train.steps
    trained = [
        Train(
            step=step, tokens=step * cfg.train.tokens_per_step, seconds=1.0, loss=5.0, loss_mean=5.0, tokens_per_s=100.0
        )
        for step in range(1, steps + 1)
    ]
    held_out = Eval(step=steps, seconds=1.0, loss=bits, bits_per_byte=bits, perplexity=1.0)
    (cfg.run / "metrics.jsonl").write_text("".join(record.line() + "\n" for record in [*trained, held_out]))
    if code is not None:
        (cfg.run / EXIT_RECORD).write_text(json.dumps({"code": code, "reason": "", "step": steps}))


def measure_as(monkeypatch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Runs are not scored: their test split has these bits/byte, and half a bit more in every other document."""

    def measured(records: Records, cell: Cell, cfg: RunConfig) -> dict[str, Any]:
        value = bits(cell.name) or 0.0
        nats = (value + np.array([0.5, -0.6, 0.2, -0.3467])) * DOCUMENTS * np.log(2)
        with records.file(cell).with_suffix(".npz").open("wb") as stream:
            np.savez(stream, nats=nats.astype(np.float32), text_bytes=DOCUMENTS)
        spectrum = {"effective_rank": 9.0, "participation_ratio": 8.0, "first_2": 0.5, "dimensions_90": 12}
        return {
            "evaluation": {"bits_per_byte": float(nats.sum() / np.log(2) / DOCUMENTS.sum())},
            "geometry": {
                "spectra": dict.fromkeys(("prototypes", "displacement"), spectrum)
                | {"hidden": {**spectrum, "arxiv_2603_10225": {"effective_rank": 7.0}}},
                "start": {"share": 0.5},
                "first_component_with_count": {"displacement": {"every_token": 0.9}},
                "norms": {},
            },
            "scree": [0.5, 1.0],
            "projection": {"explained": [0.3, 0.2], "points": []},
        }

    monkeypatch.setattr(Records, "_measure", measured)


def launch_as(monkeypatch: pytest.MonkeyPatch, bits: Bits, launched: list[str]) -> None:
    """Runs are not trained: they end with these bits/byte of `val`, and their names are added to `launched`."""

    def launch(jobs: Jobs, config: Path) -> int:
        cfg = load(config)
        launched.append(cfg.run.name)
        value = bits(cfg.run.name)
        leave_run(cfg, value, 0 if value is not None else 3)
        return 0 if value is not None else 3

    monkeypatch.setattr(Jobs, "launch", launch)
