"""Networks of a vision study, from inputs to the features that a head takes.

Legend: N examples, C channels, H and W pixels, L length of a signal, D width of features and prototypes, V classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from model.config import HeadConfig
from model.head import HarmonicHead
from pretrain.study.vision import zoo
from pretrain.study.vision.config import (
    CnnConfig,
    LinearConfig,
    MlpConfig,
    NetworkConfig,
    ResnetConfig,
    VitConfig,
)
from pretrain.study.vision.examples import Examples, scaled


class Coloured(nn.Module):
    """What takes three channels, given one: (N, 1, H, W) is repeated; (N, 3, H, W) stays."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) -> what the network makes of it."""
        return self.network(inputs.expand(-1, 3, -1, -1) if inputs.shape[1] == 1 else inputs)


def network_of(config: NetworkConfig, shape: Sequence[int], dim: int) -> tuple[nn.Module, int]:
    """A network for inputs (N, *shape) from torch's random state, and the width of its features: `dim`, or of `linear`
    the number of an input's entries.
    """
    entries = math.prod(shape)
    if isinstance(config, LinearConfig):
        return nn.Flatten(), entries
    if isinstance(config, MlpConfig):
        pairs = itertools.pairwise((entries, *config.hidden))
        layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(config.hidden[-1], dim)), dim
    if isinstance(config, CnnConfig):
        return _cnn(config.channels, shape, dim), dim
    if isinstance(config, ResnetConfig):
        return Coloured(zoo.resnet(config.name, dim, config.stem == "small")), dim
    assert isinstance(config, VitConfig)
    made = zoo.vit(
        size=shape[-1], patch=config.patch, layers=config.layers, heads=config.heads, width=config.width,
        mlp=config.mlp, dropout=config.dropout, dim=dim,
    )  # fmt: skip
    return Coloured(made), dim


def _cnn(channels: Sequence[int], shape: Sequence[int], dim: int) -> nn.Module:
    convolution, maximum = (nn.Conv2d, nn.MaxPool2d) if len(shape) == 3 else (nn.Conv1d, nn.MaxPool1d)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((shape[0], *channels)):
        layers += [convolution(a, b, 3, padding=1), nn.ReLU(), maximum(2)]
    left = [side >> len(channels) for side in shape[1:]]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * math.prod(left), dim))


def check(name: str, config: NetworkConfig, data: str, examples: Examples, dim: int) -> None:
    """Raises ConfigError if a network cannot be made for these examples, or does not take them."""
    shape = examples.shape
    why = None
    if isinstance(config, ResnetConfig | VitConfig) and len(shape) != 3:
        why = "it takes images, and these are signals; leave it out of this data set's networks"
    elif isinstance(config, VitConfig) and shape[1] % config.patch:
        why = f"patch={config.patch} must divide the {shape[1]} pixels of a side"
    elif isinstance(config, VitConfig) and shape[1] != shape[2]:
        why = "it takes square images; set image_size"
    elif isinstance(config, CnnConfig) and min(shape[1:]) >> len(config.channels) == 0:
        why = f"{len(config.channels)} maxima over 2 leave nothing; give fewer channels"
    if why is None:
        try:
            with torch.device("meta"):
                network_of(config, shape, dim)[0].eval()(torch.empty(2, *shape))
        except (RuntimeError, ValueError) as error:
            why = str(error)
    if why is not None:
        raise ConfigError(f"networks.{name} with data.{data}, of inputs {list(shape)}: {why}")


class Learner(nn.Module):
    """Inputs (N, *shape) -> features (N, D) -> prototypes.

    Inputs are shifted and scaled by channel to mean 0 and variance 1 over the training part. Features are multiplied by
    one number, so that on the first inputs their root mean square length is the head's `feature_length`: see `measure`.
    """

    mean: Tensor
    deviation: Tensor
    scale: Tensor

    def __init__(
        self, network: NetworkConfig, head: HeadConfig, examples: Examples, dim: int, seed: int, init: float = 1.0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk, width = network_of(network, examples.shape, dim)
        self.head = HarmonicHead(len(examples.classes), width, seed=seed, **head.arguments())
        with torch.no_grad():
            self.head.prototypes.mul_(init)
        mean, deviation = examples.moments()
        ones = [1] * (len(examples.shape) - 1)
        self.register_buffer("mean", mean.view(-1, *ones))
        self.register_buffer("deviation", deviation.view(-1, *ones))
        self.register_buffer("scale", torch.ones(()))

    def normalise(self, inputs: Tensor) -> Tensor:
        """As they are stored -> float32 of mean 0 and variance 1."""
        return (scaled(inputs) - self.mean) / self.deviation

    def features(self, normalised: Tensor) -> Tensor:
        """(N, *shape) -> (N, D), of the length that the head takes."""
        return self.trunk(normalised) * self.scale

    @torch.no_grad()
    def measure(self, normalised: Tensor) -> None:
        """Sets `scale` by some inputs, before anything is trained."""
        self.eval()
        length = self.trunk(normalised).square().sum(1).mean().sqrt()
        self.train()
        if length > 0 and length.isfinite():
            self.scale.fill_(self.head.feature_length / length)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All parameters decay, but what else a head trains: its zero means something."""
        own = [p for p in self.head.parameters() if p is not self.head.prototypes]
        decayed = [*self.trunk.parameters(), self.head.prototypes]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": own, "weight_decay": 0.0}]
