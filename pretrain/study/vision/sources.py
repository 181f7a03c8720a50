"""From a data set's settings to its examples."""

from __future__ import annotations

import numpy as np
import torch

from common.errors import ConfigError
from common.progress import Log
from pretrain.study.vision import folders, hub, pictures, points, signals, zoo
from pretrain.study.vision.config import DataConfig, Digits, FolderImages, HubImages, Points, Signals, TorchvisionImages
from pretrain.study.vision.examples import Examples, Part, Read, split


def load(name: str, data: DataConfig, say: Log) -> Examples:
    """The examples of a data set, in their three parts. Raises ConfigError, which names the data set."""
    try:
        read = _read(data, say)
    except ConfigError as error:
        raise ConfigError(f"data.{name}: {error}") from None
    return split(read, data.tuning_fraction, data.test_fraction, f"data.{name}")


def _read(data: DataConfig, say: Log) -> Read:
    source = data.source
    if isinstance(source, Digits):
        return _digits()
    if isinstance(source, Signals):
        return signals.read(source.train, source.test, source.seed)
    if isinstance(source, Points):
        return points.read(source.train, source.test, source.seed)
    if isinstance(source, TorchvisionImages):
        return _torchvision(source)
    if isinstance(source, HubImages):
        return hub.read(source, say)
    assert isinstance(source, FolderImages)
    return folders.read(source.path, source.image_size, source.channels, say)


def _digits() -> Read:
    """(1797, 1, 8, 8) from 0 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("digits are scikit-learn's, which is not installed: pip install -e '.[vision]'") from None
    found = load_digits()
    inputs = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    keys = [f"digit {place}" for place in range(len(inputs))]
    return Read(Part(inputs, torch.tensor(found.target)), keys, [str(name) for name in found.target_names])


def _torchvision(source: TorchvisionImages) -> Read:
    parts = []
    for train in (True, False):
        found = zoo.dataset(source.name, source.root, train, source.download)
        images = pictures.from_array(np.asarray(found.data), source.image_size, source.channels)
        parts.append(Part(torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(np.asarray(found.targets))))
    keys = [f"{source.name} {place}" for place in range(len(parts[0].labels))]
    return Read(parts[0], keys, list(found.classes), test=parts[1])
