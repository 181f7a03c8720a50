"""What this machine is called and how many cores it gives; needs nothing but Python."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path


def cpu_name() -> str:
    """This machine's processor, in words."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processor cores that this process may use, by its affinity where the system tells it, else all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
