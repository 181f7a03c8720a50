"""Which kernels serve a tensor: chosen once per device and dtype; where it must do without, the log says why."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, eager

log = logging.getLogger(__name__)


def kernels_for(x: Tensor) -> ModuleType:
    """The module whose operations serve tensors like `x`, of any shape: by device and dtype."""
    if x.dtype in (torch.bfloat16, torch.float32):
        if x.device.type == "cpu":
            return _for_cpu(x.dtype)
        if x.device.type == "cuda":
            return _for_gpu(x.device)
    return eager


def fused_kernels_for(x: Tensor, fused: bool | None, apart: str | None = None) -> ModuleType | None:
    """The module whose `fused_statistics` serves tokens like `x`, or None: the product and the passes are then apart.

    None leaves it to the device: GPUs as `gpu.FUSED` says, others apart. True takes the plain form where there is no
    kernel, but for GPUs and sizes that the kernels do not serve, which the log tells, as it tells the reason `apart`
    why a loss cannot be served.
    """
    kernels = kernels_for(x)
    plain = kernels in (eager, cpu)
    if not (fused if plain else kernels.FUSED if fused is None else fused):
        return None
    if plain and x.device.type == "cuda":
        return None
    reason = apart or (None if plain else kernels.fused_unavailable(x))
    if reason:
        _say_apart(reason)
        return None
    return eager if plain else kernels


@functools.cache
def _for_cpu(dtype: torch.dtype) -> ModuleType:
    return _if_available("CPU", cpu, dtype)


@functools.cache
def _for_gpu(device: torch.device) -> ModuleType:
    try:
        from . import gpu
    except ImportError as error:
        _say("GPU", f"{error}; pip install triton would help")
        return eager
    return _if_available("GPU", gpu, device)


def _if_available(device: str, kernels: ModuleType, required: torch.dtype | torch.device) -> ModuleType:
    try:
        kernels.require(required)
    except kernels.Unavailable as error:
        _say(device, str(error))
        return eager
    return kernels


@functools.cache
def _say(device: str, reason: str) -> None:
    log.warning("The head runs in plain PyTorch on this %s, exact but slower: %s.", device, reason)


@functools.cache
def _say_apart(reason: str) -> None:
    log.warning("The head takes its products and the passes over scores apart: %s.", reason)
