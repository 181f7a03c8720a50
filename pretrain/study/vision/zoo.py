"""torchvision: its data sets and its networks. The one file that imports it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError

NAMES = {  # of a data set: torchvision's class, and what it looks for below its root
    "mnist": ("MNIST", "MNIST/raw/train-images-idx3-ubyte and three files beside it"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte and three files beside it"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
UNUSED = ("nms", "qnms")  # operators on boxes, which no classifier has
_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library


def opened(why: str) -> Any:
    """The package. `why`: what needs it, for the message.

    The builds of package registries have operators for the GPU's torch, which the CPU's cannot load; then importing
    them ends where it says more about two of these. Nothing here uses them, and declared they do no harm.

    Raises:
        ConfigError: it is not installed, or does not fit this torch.
    """
    try:
        return _imported()
    except ImportError as error:
        remedy = "pip install -e '.[vision]'"
        raise ConfigError(f"{why}: torchvision is needed and cannot be imported ({error}): {remedy}") from None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ConfigError(f"{why}: torchvision does not fit torch {torch.__version__}: {error}") from None
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in UNUSED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    try:
        return _imported()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"{why}: torchvision does not fit torch {torch.__version__}: {error}") from None


def _imported() -> Any:
    import torchvision  # type: ignore[import-untyped]

    return torchvision


def dataset(name: str, root: Path, train: bool, download: bool) -> Any:
    """A part of a data set, with `data`, `targets` and `classes`.

    Raises:
        ConfigError: its files are not there or not whole, or could not be downloaded.
    """
    cls, looked_for = NAMES[name]
    package = opened(f"data of torchvision ({name})")
    try:
        return getattr(package.datasets, cls)(root, train=train, download=download)
    except Exception as error:  # of the network, of archives, of files: each its own
        reason = " ".join(str(error).split()) or repr(error)
        remedy = "give the root of a whole copy" if download else "give the root of a whole copy, or download: true"
        raise ConfigError(f"{name}: not read: {reason} Looked for {root / looked_for}; {remedy}") from None


def resnet(name: str, dim: int, small_stem: bool) -> nn.Module:
    """A residual network of three channels with `dim` outputs in place of its classes."""
    network = getattr(opened(name).models, name)(num_classes=dim)
    if small_stem:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as all others there
        network.maxpool = nn.Identity()
    return network


def vit(*, size: int, patch: int, layers: int, heads: int, width: int, mlp: int, dropout: float, dim: int) -> nn.Module:
    """A vision transformer of three channels with `dim` outputs in place of its classes. torchvision starts these at 0,
    which would be the same point for all images: they start as any linear layer here.
    """
    network = opened("vit").models.VisionTransformer(
        image_size=size, patch_size=patch, num_layers=layers, num_heads=heads, hidden_dim=width, mlp_dim=mlp,
        dropout=dropout, num_classes=dim,
    )  # fmt: skip
    network.heads = nn.Linear(width, dim)
    return network
