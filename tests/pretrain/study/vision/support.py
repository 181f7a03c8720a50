"""Small data sets and studies for tests of vision studies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.settings import validate
from pretrain.study.vision.config import Cell, DataConfig, VisionConfig
from pretrain.study.vision.examples import Examples
from pretrain.study.vision.sources import load

SMALL: dict[str, Any] = {
    "kind": "vision",
    "title": "Small",
    "data": {"digits": {"source": {"kind": "digits"}, "epochs": 1, "batch": 256}},
    "networks": {"linear": {"kind": "linear"}, "mlp": {"kind": "mlp", "hidden": [8]}},
    "heads": {"softmax": {"distance": "dot"}, "euclidean": {}},
    "baseline": "softmax",
    "dim": 8,
    "tuning": {"trials": 2, "seeds": [100], "space": {"lr": [0.001, 0.01]}},
    "seeds": [1, 2],
    "noise": [0.5],
    "fgsm": [0.1],
}


def quiet(line: str) -> None:
    pass


def config(out: Path, **changed: Any) -> VisionConfig:
    return validate(VisionConfig, {**SMALL, "out": str(out), **changed})


def cell(data: str, **changed: Any) -> Cell:
    given = {
        **{"data": data, "network": {"kind": "mlp", "hidden": [16]}, "head": {}, "seed": 1, "epochs": 2, "batch": 64},
        **{"dim": 8, "betas": [0.9, 0.999], "warmup": 0.05, "noise": [0.5], "fgsm": [0.1], "device": "cpu"},
        **{"setting": {"lr": 0.01, "weight_decay": 0.0, "init": 1.0}, "measured": False},
    }
    return validate(Cell, {**given, **changed})


def examples(source: dict[str, Any], **changed: Any) -> Examples:
    return load("some", validate(DataConfig, {"source": source, "epochs": 1, **changed}), quiet)


def picture(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> None:
    """A file of one colour."""
    image = pytest.importorskip("PIL.Image", reason="no Pillow: the extra `vision` brings it")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, colour).save(file)


def write_mnist(root: Path, train: int, test: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images in MNIST's own files, as torchvision looks for them; what is in them."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    draws, written = np.random.default_rng(3), {}
    for name, count in (("train", train), ("t10k", test)):
        images = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        written[name] = images, labels
    return written
