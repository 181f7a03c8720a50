"""Which kernels serve a tensor: chosen once per device and dtype; where a CPU must do without, the log says why."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from model.kernels import cpu, eager

log = logging.getLogger(__name__)


def kernels_for(x: Tensor) -> ModuleType:
    """The module whose operations serve tensors like `x`."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32):
        return _for_cpu(x.dtype)
    return eager


@functools.cache
def _for_cpu(dtype: torch.dtype) -> ModuleType:
    try:
        cpu.require(dtype)
    except cpu.Unavailable as error:
        _say(str(error))
        return eager
    return cpu


@functools.cache
def _say(reason: str) -> None:
    log.warning("The head runs in plain PyTorch on this CPU, exact but slower: %s.", reason)
