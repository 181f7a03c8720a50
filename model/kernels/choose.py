"""Which kernels serve a tensor: chosen once per device and dtype, and said in the log where it is not the fast choice."""

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
        log.warning("The head runs in plain PyTorch for %s on this CPU, exact but slower: %s.", dtype, error)
        return eager
    return cpu
