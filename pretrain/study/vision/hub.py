"""Images of the Hugging Face Hub, of a local folder in its layout, or of one that `save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError
from common.progress import Log, progress
from pretrain.study.vision.config import HubImages
from pretrain.study.vision.examples import Part, Read
from pretrain.study.vision.pictures import pixels


def read(source: HubImages, say: Log) -> Read:
    """Its images, (N, channels, size, size) bytes.

    Raises:
        ConfigError: there is no such dataset, split or column, or a column holds something else.
    """
    splits = [source.train, *([source.test] if source.test else [])]
    opened = [_opened(source, split) for split in splits]
    for one, split in zip(opened, splits, strict=True):
        for column in (source.image, source.label):
            if column not in one.column_names:
                raise ConfigError(
                    f"{source.name}: no column {column!r} in {split}; set image and label to two of "
                    f"{', '.join(one.column_names)}"
                )
    classes = _classes(opened[0], source)
    parts = [_part(one, source, classes, say) for one in opened]
    keys = [f"{source.train} {place}" for place in range(len(opened[0]))]
    return Read(parts[0], keys, [str(name) for name in classes.values()], *parts[1:])


def _opened(source: HubImages, split: str) -> Any:
    import datasets  # type: ignore[import-untyped]

    folder = Path(source.name).expanduser()
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if not saved:
            return datasets.load_dataset(
                str(folder if folder.is_dir() else source.name), source.subset, split=split, revision=source.revision
            )
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            return found[split]
        if split != source.train:
            raise LookupError("what was saved has one split; with test: null a part of it becomes the test part")
        return found
    except Exception as error:  # the Hub's client and its own client have classes of their own
        reason = " ".join(str(error).split()) or repr(error)
        raise ConfigError(
            f"{source.name}, split {split}: cannot be read: {reason}; check name, subset and split, or give a local "
            "folder of the dataset as name"
        ) from None


def _classes(opened: Any, source: HubImages) -> dict[Any, str]:
    """Labels as they are stored, with their names, in the order of classes."""
    feature = opened.features[source.label]
    if hasattr(feature, "names"):
        return dict(enumerate(feature.names))
    labels = sorted(set(opened[source.label]))
    if len(labels) < 2:
        raise ConfigError(f"{source.name}: the column {source.label!r} has {len(labels)} different labels; expected 2")
    return {label: str(label) for label in labels}


def _part(opened: Any, source: HubImages, classes: dict[Any, str], say: Log) -> Part:
    number = {label: place for place, label in enumerate(classes)}
    inputs = np.empty((len(opened), source.channels, source.image_size, source.image_size), np.uint8)
    labels = []
    with progress(f"reading {source.name}", say) as tell:
        for place, row in enumerate(opened):
            image, label = row[source.image], row[source.label]
            if not hasattr(image, "convert"):
                raise ConfigError(
                    f"{source.name}: {source.image!r} holds {type(image).__name__}; expected a column of images"
                )
            if label not in number:
                raise ConfigError(f"{source.name}: example {place} has the label {label!r}, which none is trained on")
            inputs[place] = pixels(image, source.image_size, source.channels)
            labels.append(number[label])
            if place % 256 == 0:
                tell(place / len(opened), f"{place:,} of {len(opened):,} images")
    return Part(torch.from_numpy(inputs), torch.tensor(labels))
