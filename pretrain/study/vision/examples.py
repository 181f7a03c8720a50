"""Examples of a vision study: their parts, one hash of them all, and their file in the study's folder.

Legend: N examples, C channels, H and W pixels, L length of a signal, V classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError
from common.files import replacing

PARTS = ("train", "tuning", "test")
CHUNK = 4096  # inputs that are in float64 at a time


@dataclass(frozen=True, eq=False)
class Part:
    """Inputs (N, C, H, W), or (N, C, L) of signals, uint8 or float32, and classes (N,) int64."""

    inputs: Tensor
    labels: Tensor

    def chosen(self, rows: Tensor) -> Part:
        """Some of them, by a mask (N,)."""
        return Part(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class Read:
    """What a source gives: examples to train on with a key each, by which they are split, and the parts that it has
    of its own.
    """

    train: Part
    keys: Sequence[str]
    classes: Sequence[str]  # names
    test: Part | None = None
    tuning: Part | None = None


@dataclass(frozen=True, eq=False)
class Examples:
    """The three parts of a data set. What is chosen is chosen on `tuning`, what is reported is of `test`."""

    train: Part
    tuning: Part
    test: Part
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input: (C, H, W) or (C, L)."""
        return tuple(self.train.inputs.shape[1:])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training inputs by channel, of pixels from 0 to 1; a channel that does not vary has
        deviation 1.
        """
        total = squares = torch.zeros(self.shape[0], dtype=torch.float64)
        count = 0
        for chunk in self.train.inputs.split(CHUNK):
            rows = scaled(chunk).transpose(0, 1).flatten(1).double()  # (C, N ...)
            total, squares, count = total + rows.sum(1), squares + rows.square().sum(1), count + rows.shape[1]
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(deviation > 1e-6, deviation, 1.0).float()

    def sizes(self) -> dict[str, int]:
        """Examples of each part."""
        return {name: len(getattr(self, name).labels) for name in PARTS}

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the SHA-256 of all examples, in their order, with shapes and names of classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.tuning, self.test):
            for tensor in (part.inputs, part.labels):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                for chunk in tensor.split(CHUNK):
                    digest.update(chunk.numpy().tobytes())
        return digest.hexdigest()[:32]

    def save(self, folder: Path) -> str:
        """Writes them into a folder under their fingerprint, if they are not there; returns it. Raises OSError."""
        name = self.fingerprint()
        file = folder / f"{name}.pt"
        if not file.exists():
            tensors = {part: vars(getattr(self, part)) for part in PARTS}
            with replacing(file) as draft:
                torch.save({"classes": list(self.classes), **tensors}, draft)
        return name

    @classmethod
    def load(cls, folder: Path, name: str) -> Examples:
        """What `save` wrote under a fingerprint."""
        found = torch.load(folder / f"{name}.pt", mmap=True, weights_only=True)
        return cls(**{part: Part(**found[part]) for part in PARTS}, classes=tuple(found["classes"]))


def scaled(inputs: Tensor) -> Tensor:
    """float32; bytes become 0 to 1."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()


def split(read: Read, tuning_fraction: float, test_fraction: float, where: str) -> Examples:
    """Parts by a hash of each example's key: an example stays in its part whatever else comes or goes. A source's own
    test part, or tuning part, is taken as it is.

    Raises:
        ConfigError: a part is empty, or a class is nowhere in the training part.
    """
    places = torch.tensor([_place(key) for key in read.keys], dtype=torch.float64)
    tested = torch.zeros(len(places), dtype=torch.bool) if read.test is not None else places < test_fraction
    if read.tuning is not None:
        tuned = torch.zeros_like(tested)
    else:
        rest = (places - test_fraction) / (1 - test_fraction) if read.test is None else places
        tuned = ~tested & (rest < tuning_fraction)
    test = read.test if read.test is not None else read.train.chosen(tested)
    tuning = read.tuning if read.tuning is not None else read.train.chosen(tuned)
    found = Examples(read.train.chosen(~(tested | tuned)), tuning, test, tuple(read.classes))
    for name, count in found.sizes().items():
        if not count:
            raise ConfigError(
                f"{where}: the {name} part of {len(places):,} examples is empty; give more examples, or change "
                f"tuning_fraction={tuning_fraction:g} or test_fraction={test_fraction:g}"
            )
    counts = torch.bincount(found.train.labels, minlength=len(read.classes))
    missing = [name for name, count in zip(read.classes, counts.tolist(), strict=True) if not count]
    if missing:
        names = ", ".join(missing[:5]) + (" and more" if len(missing) > 5 else "")
        raise ConfigError(f"{where}: no example to train on of the class {names}; give more of it, or leave it out")
    return found


def _place(key: str) -> float:
    """0 to 1, of a key's hash."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
