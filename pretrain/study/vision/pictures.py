"""Images to bytes, by Pillow: the one file that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB"}


def open_file(file: Path, size: int, channels: int) -> np.ndarray:
    """A file's image as `pixels` gives it. Raises ConfigError for what is no image."""
    image_class = _pillow()
    try:
        with image_class.open(file) as image:
            return pixels(image, size, channels)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file; copy the whole data set") from None
    except Exception as error:  # of Pillow's many readers each has its own
        raise ConfigError(f"{file}: cannot be read as an image: {error}; remove or replace it") from None


def pixels(image: Any, size: int | None, channels: int | None) -> np.ndarray:
    """A Pillow image, turned as its camera says -> (channels, size, size) bytes, stretched to a square; None: as it is,
    grey or in colours.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    image = image.convert(MODES[channels or (1 if image.mode in ("1", "L", "I;16") else 3)])
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), _pillow().Resampling.BILINEAR)  # over all pixels that one covers
    array = np.asarray(image, np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def from_array(array: np.ndarray, size: int | None, channels: int | None) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) bytes -> (N, channels, size, size)."""
    if size in (None, array.shape[1]) and channels in (None, 1 if array.ndim == 3 else 3):
        return array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    image_class = _pillow()
    return np.stack([pixels(image_class.fromarray(one), size, channels) for one in array])


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("images need Pillow, which is not installed: pip install -e '.[vision]'") from None
    return Image
