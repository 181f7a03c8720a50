"""Where a piece of work spends the device's time, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 12
NAME = 72  # characters of a kernel's name: templates have hundreds


@dataclass(frozen=True)
class Breakdown:
    """The kernels of a piece of work; times are milliseconds on the device."""

    kernels: list[dict[str, Any]]  # name, ms, share of all and launches, the longest first
    total_ms: float  # of all kernels, the copies among them
    launches: int  # of kernels; on a CPU, calls of operations


def breakdown(work: Callable[[], object], device: torch.device) -> Breakdown:
    """Runs `work` once under torch's profiler. On a CPU operations stand in for kernels."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    found = [
        (str(entry.key), getattr(entry, spent) / 1e3, int(entry.count))
        for entry in profiler.key_averages()
        if (entry.device_type == DeviceType.CUDA) == on_gpu
    ]
    total_ms = sum(ms for _, ms, _ in found)
    launches = sum(count for name, _, count in found if not name.startswith(("Memcpy", "Memset")))
    longest = sorted(found, key=lambda one: -one[1])[:SHOWN]
    kernels = [
        {"kernel": name[:NAME], "ms": ms, "share": ms / total_ms if total_ms else None, "launches": count}
        for name, ms, count in longest
    ]
    return Breakdown(kernels, total_ms, launches)
