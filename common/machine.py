"""What this machine is called and how many cores it gives; needs nothing but Python."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """This machine's processor, in words."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
