"""A folder of images, one subfolder for each class, as several data sets come:

    CLASS/.../*.jpg                                   as MarathiSignLanguage: the parts are made by a hash of the path
    train/CLASS/.../*.JPEG, test/CLASS/...            `test` is the test part; `val`, if it is there, the tuning part
    train/CLASS/.../*.JPEG, val/images/*.JPEG and val/val_annotations.txt (file, tab, class, ...)
                                                      as TinyImageNet, whose own test part has no labels: `val` tests

A class has its images anywhere beneath its folder. Files of other types are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.errors import ConfigError
from common.progress import Log, progress
from pretrain.study.vision.examples import Part, Read
from pretrain.study.vision.pictures import SUFFIXES, open_file

ANNOTATIONS = "val_annotations.txt"
Listed = list[tuple[Path, str]]  # files with their classes


def read(path: Path, size: int, channels: int, say: Log) -> Read:
    """All images of a folder, (N, channels, size, size) bytes.

    Raises:
        ConfigError: there is no such folder, it has none of these layouts, a class has no image, or a file cannot be
            read.
    """
    if not path.is_dir():
        raise ConfigError(f"path={path}: there is no such folder; give one with a subfolder of images for each class")
    own = path / "train"
    trained = _by_class(own if own.is_dir() else path)
    classes = sorted({name for _, name in trained})
    held = {name: _labelled(path / name, classes) for name in ("val", "test")} if own.is_dir() else {}
    test, tuning = held.get("test") or held.get("val"), held.get("val") if held.get("test") else None

    def part(listed: Listed | None, name: str) -> Part | None:
        return None if not listed else _part(listed, classes, size, channels, say, f"{path.name}, {name}")

    found = part(trained, "train")
    assert found is not None
    keys = [file.relative_to(path).as_posix() for file, _ in trained]
    return Read(found, keys, classes, part(test, "test"), part(tuning, "tuning"))


def _folders(path: Path) -> list[Path]:
    return sorted(below for below in path.iterdir() if below.is_dir() and not below.name.startswith("."))


def _by_class(path: Path) -> Listed:
    """Every image beneath the folders of classes, in the order of their names."""
    listed: Listed = []
    for folder in _folders(path):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ConfigError(
                f"{folder}: no image beneath the folder of this class; looked for {', '.join(SUFFIXES)}; add some, or "
                "remove the folder"
            )
        listed += [(file, folder.name) for file in files]
    if len({name for _, name in listed}) < 2:
        raise ConfigError(f"{path}: {len(_folders(path))} subfolders; expected one for each of two or more classes")
    return listed


def _labelled(path: Path, classes: Sequence[str]) -> Listed | None:
    """The images of a folder beside `train`, with their classes; None where it is missing or names none."""
    if not path.is_dir():
        return None
    file = path / ANNOTATIONS
    if not file.is_file():
        return _by_class(path) if {folder.name for folder in _folders(path)} & set(classes) else None
    listed: Listed = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if not label:
            raise ConfigError(f"{file}, line {number}: expected a file's name, a tab and its class")
        listed.append((path / "images" / name, label))
    return listed


def _part(listed: Listed, classes: Sequence[str], size: int, channels: int, say: Log, what: str) -> Part:
    number = {name: place for place, name in enumerate(classes)}
    strange = next(((file, name) for file, name in listed if name not in number), None)
    if strange is not None:
        raise ConfigError(f"{strange[0]}: its class {strange[1]} has no folder to train on; remove it, or add that")
    inputs = np.empty((len(listed), channels, size, size), np.uint8)
    with progress(f"reading {what}", say) as tell:
        for place, (file, _) in enumerate(listed):
            inputs[place] = open_file(file, size, channels)
            if place % 256 == 0:
                tell(place / len(listed), f"{place:,} of {len(listed):,} images")
    labels = torch.tensor([number[name] for _, name in listed])
    return Part(torch.from_numpy(inputs), labels)
