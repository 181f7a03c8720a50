"""The settings of a vision study (pretrain/study/vision/grid.py), and those of one of its cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from common.fields import FilePath, Name, NotNegative, PathText, Positive, Seed, Steps
from model.config import HeadConfig

MOST_CHOICES = 100  # of one kind in a study
MOST_TRIALS = 1000
MOST_CELLS = 100_000
MOST_PIXELS = 2**13  # of a side
VERSION = 1  # of what a cell's settings mean: to be raised when the same settings would give other figures

Side = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Colours = Literal[1, 3]  # grey; red, green and blue
Share = Annotated[float, Field(gt=0, lt=1)]


# ---- where examples come from


class Digits(BaseModel, extra="forbid", frozen=True):
    """scikit-learn's 1,797 digits of 8 x 8 pixels."""

    kind: Literal["digits"]


class Signals(BaseModel, extra="forbid", frozen=True):
    """Signals of 40 numbers, made by pretrain/study/vision/signals.py after MNIST-1D."""

    kind: Literal["mnist1d"]
    train: int = Field(default=4000, ge=10, le=10**7)
    test: int = Field(default=1000, ge=10, le=10**7)
    seed: Seed = 42


class Points(BaseModel, extra="forbid", frozen=True):
    """Points in a plane, one class in the middle of four, made by pretrain/study/vision/points.py."""

    kind: Literal["points"]
    train: int = Field(default=1000, ge=10, le=10**7)
    test: int = Field(default=1000, ge=10, le=10**7)
    seed: Seed = 42


class TorchvisionImages(BaseModel, extra="forbid", frozen=True):
    """A data set that torchvision knows, in the files of its own form below `root`."""

    kind: Literal["torchvision"]
    name: Literal["mnist", "fashion_mnist", "cifar10", "cifar100"]
    root: FilePath
    download: bool = False  # what is not there
    image_size: Side | None = None  # pixels of a side, which all images get; None: as they are
    channels: Colours | None = None  # None: as they are


class HubImages(BaseModel, extra="forbid", frozen=True):
    """A dataset of the Hub, a local folder in its layout, or one that `save_to_disk` wrote."""

    kind: Literal["hub"]
    name: PathText
    subset: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str | None = "test"  # None: a part of `train`, as `test_fraction` says
    image: str = "image"  # the columns
    label: str = "label"
    image_size: Side
    channels: Colours = 3


class FolderImages(BaseModel, extra="forbid", frozen=True):
    """A folder of images, one subfolder for each class: see pretrain/study/vision/folders.py."""

    kind: Literal["folder"]
    path: FilePath
    image_size: Side
    channels: Colours = 3


Source = Annotated[
    Digits | Signals | Points | TorchvisionImages | HubImages | FolderImages, Field(discriminator="kind")
]


class DataConfig(BaseModel, extra="forbid", frozen=True):
    """A data set, its parts, and how it is trained on, for all heads alike."""

    source: Source
    epochs: Steps
    batch: int = Field(default=128, gt=0, le=2**20)
    tuning_fraction: Share = 0.15  # of what is there to train on: settings are chosen by it
    test_fraction: Share = 0.2  # of all, where the source has no test part of its own
    networks: tuple[Name, ...] | None = Field(default=None, min_length=1, max_length=MOST_CHOICES)  # None: all


# ---- what is trained


class LinearConfig(BaseModel, extra="forbid", frozen=True):
    """No network: pixels are the features, and a prototype can be looked at as an image."""

    kind: Literal["linear"]


class MlpConfig(BaseModel, extra="forbid", frozen=True):
    """Hidden layers with ReLU, then D features."""

    kind: Literal["mlp"]
    hidden: tuple[Width, ...] = Field(default=(128,), min_length=1, max_length=MOST_CHOICES)


class CnnConfig(BaseModel, extra="forbid", frozen=True):
    """For each of `channels` a convolution of width 3 with ReLU and a maximum over 2 (x 2), then D features; of signals
    along their one axis.
    """

    kind: Literal["cnn"]
    channels: tuple[Width, ...] = Field(default=(16, 32), min_length=1, max_length=12)


class ResnetConfig(BaseModel, extra="forbid", frozen=True):
    """torchvision's, from random weights. `stem` small: the first convolution has width 3 and stride 1, and no maximum
    follows, as images of 32 pixels want it.
    """

    kind: Literal["resnet"]
    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    stem: Literal["small", "imagenet"] = "small"


class VitConfig(BaseModel, extra="forbid", frozen=True):
    """torchvision's VisionTransformer, from random weights."""

    kind: Literal["vit"]
    patch: Side = 4
    layers: int = Field(default=4, gt=0, le=1024)
    heads: Width = 4
    width: Width = 64
    mlp: Width = 128
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> VitConfig:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self


NetworkConfig = Annotated[LinearConfig | MlpConfig | CnnConfig | ResnetConfig | VitConfig, Field(discriminator="kind")]


# ---- how it is chosen


class Setting(BaseModel, extra="forbid", frozen=True):
    """What is tuned: AdamW's rate and weight decay, and the deviation of the prototypes' first entries as a multiple of
    the head's own.
    """

    lr: float
    weight_decay: float
    init: float


class SpaceConfig(BaseModel, extra="forbid", frozen=True):
    """The values of each, rising."""

    lr: tuple[Positive, ...] = Field(min_length=1, max_length=MOST_CHOICES)
    weight_decay: tuple[NotNegative, ...] = Field(default=(0.0,), min_length=1, max_length=MOST_CHOICES)
    init: tuple[Positive, ...] = Field(default=(1.0,), min_length=1, max_length=MOST_CHOICES)

    @field_validator("lr", "weight_decay", "init")
    @classmethod
    def _rising(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(a < b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{list(values)} must rise")
        return values

    def grid(self) -> list[Setting]:
        """All combinations."""
        values = itertools.product(self.lr, self.weight_decay, self.init)
        return [Setting(lr=lr, weight_decay=decay, init=init) for lr, decay, init in values]

    def edges(self, setting: Setting) -> list[str]:
        """What of a setting lies at an end of its values, where they go on: no weight decay is no edge."""
        found = []
        for name in Setting.model_fields:
            values, value = getattr(self, name), getattr(setting, name)
            if len(values) > 1 and value in (values[0], values[-1]) and value > 0:
                found.append(name)
        return found


class TuningConfig(BaseModel, extra="forbid", frozen=True):
    """Every head gets the same trials. Taken is the one with the best mean accuracy on the tuning part over `seeds`; of
    those the one with the least loss there; of those the first. A trial of which a seed diverged is not taken.
    """

    trials: int = Field(gt=0, le=MOST_TRIALS)
    seed: Seed = 0  # of the draw of trials
    seeds: tuple[Seed, ...] = Field(min_length=1, max_length=MOST_CHOICES)  # that they are trained with
    space: SpaceConfig

    @model_validator(mode="after")
    def _there_are_as_many(self) -> TuningConfig:
        if self.trials > len(self.space.grid()):
            raise ValueError(f"trials={self.trials}: the space has only {len(self.space.grid())} combinations")
        return self

    def settings(self) -> list[Setting]:
        """The trials: combinations drawn without repeats, in the order of the grid."""
        grid = self.space.grid()
        drawn = random.Random(self.seed).sample(range(len(grid)), self.trials)
        return [grid[place] for place in sorted(drawn)]


class VisionConfig(BaseModel, extra="forbid", frozen=True):
    """A study of kind `vision`: every data set, network, head and seed is a cell."""

    kind: Literal["vision"]
    title: Name
    out: FilePath
    processes: int = Field(default=1, gt=0, le=1024)  # cells at once, each on one thread
    device: Literal["cpu", "cuda"] = "cpu"
    data: dict[Name, DataConfig] = Field(min_length=1, max_length=MOST_CHOICES)
    networks: dict[Name, NetworkConfig] = Field(min_length=1, max_length=MOST_CHOICES)
    heads: dict[Name, HeadConfig] = Field(min_length=1, max_length=MOST_CHOICES)
    baseline: str  # one of the heads, which the others are compared with
    dim: int = Field(default=32, gt=1, le=2**16)  # of features and prototypes; a linear network has its pixels
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    warmup: float = Field(default=0.05, ge=0, lt=1)  # share of the steps; then the rate falls to 0 in a straight line
    tuning: TuningConfig
    seeds: tuple[Seed, ...] = Field(min_length=2, max_length=MOST_CHOICES)  # fresh: what is reported
    noise: tuple[Positive, ...] = Field(default=(0.5, 1.0), max_length=MOST_CHOICES)  # deviations of the inputs
    fgsm: tuple[Positive, ...] = Field(default=(0.1, 0.3), max_length=MOST_CHOICES)  # the same unit

    @model_validator(mode="after")
    def _every_cell_once(self) -> VisionConfig:
        for name, values in (
            *(("seeds", self.seeds), ("tuning.seeds", self.tuning.seeds)),
            *((name, [f"{size:g}" for size in getattr(self, name)]) for name in ("noise", "fgsm")),
            *((f"data.{name}.networks", data.networks or ()) for name, data in self.data.items()),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must differ from each other")
        common = set(self.seeds) & set(self.tuning.seeds)
        if common:
            raise ValueError(f"tuning.seeds and seeds share {sorted(common)}: what is reported must not have chosen")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _names_are_there(self) -> VisionConfig:
        if self.baseline not in self.heads:
            raise ValueError(f"baseline={self.baseline} is none of the heads: {', '.join(self.heads)}")
        for name, data in self.data.items():
            for network in data.networks or ():
                if network not in self.networks:
                    raise ValueError(f"data.{name}.networks: {network} is none of: {', '.join(self.networks)}")
        return self

    @model_validator(mode="after")
    def _not_too_many(self) -> VisionConfig:
        cells = len(self.pairs()) * len(self.heads)
        cells *= self.tuning.trials * len(self.tuning.seeds) + len(self.seeds)
        if cells > MOST_CELLS:
            raise ValueError(
                f"{cells:,} cells of data, networks, heads, trials and seeds; expected {MOST_CELLS:,} at most"
            )
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """Data sets and the networks that train on them, by name."""
        return [(name, network) for name, data in self.data.items() for network in data.networks or self.networks]

    def needs_torchvision(self) -> list[str]:
        """The settings that do, in words."""
        used = {network for _, network in self.pairs()}
        networks = [name for name in self.networks if self.networks[name].kind in ("resnet", "vit") and name in used]
        sources = [name for name, data in self.data.items() if data.source.kind == "torchvision"]
        return [*(f"networks.{name}" for name in networks), *(f"data.{name}" for name in sources)]


class Cell(BaseModel, extra="forbid", frozen=True):
    """Exactly what determines a cell's figures; `data` names the examples by a hash of all of them."""

    data: str
    network: NetworkConfig
    head: HeadConfig
    seed: int
    epochs: int
    batch: int
    dim: int
    betas: tuple[float, float]
    warmup: float
    setting: Setting
    noise: tuple[float, ...]
    fgsm: tuple[float, ...]
    device: str
    measured: bool  # whether energy is: it is only where no other cell runs beside this one

    def settings(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {"version": VERSION, **self.model_dump(mode="json")}

    def key(self) -> str:
        """32 hexadecimal digits of its settings' SHA-256, the same on any machine."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]

    def file(self, folder: Path) -> Path:
        """Where its figures are kept."""
        return folder / f"{self.key()}.json"
