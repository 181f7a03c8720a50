"""Harmonic loss for PyTorch: `from overtone import HarmonicHead`.

Installed, this package needs torch alone. Its public names are the ones below, each imported at its first use, so that
importing the package does not import torch. A Decoder is made of an `overtone.config.DecoderConfig`, which needs
pydantic too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"
__all__ = [
    "DISTANCES",
    "Decoder",
    "Distance",
    "HarmonicHead",
    "VocabShard",
    "__version__",
    "harmonic_loss",
    "harmonic_loss_reference",
    "shard_of",
]

if TYPE_CHECKING:
    from .decoder import Decoder
    from .distances import DISTANCES, Distance
    from .harmonic import harmonic_loss
    from .head import HarmonicHead
    from .reference import harmonic_loss_reference
    from .vocab_parallel import VocabShard, shard_of
else:
    _HOMES = {
        "DISTANCES": "distances",
        "Decoder": "decoder",
        "Distance": "distances",
        "HarmonicHead": "head",
        "VocabShard": "vocab_parallel",
        "harmonic_loss": "harmonic",
        "harmonic_loss_reference": "reference",
        "shard_of": "vocab_parallel",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)

    def __dir__():
        return sorted({*globals(), *__all__})
