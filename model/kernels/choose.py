"""Which kernels serve a tensor: chosen once per device and dtype, and said in the log."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from model.kernels import eager


def kernels_for(x: Tensor) -> ModuleType:
    """The module whose five operations serve tensors like `x`."""
    return eager
