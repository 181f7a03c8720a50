"""What a host says of itself: asked over ssh, on all hosts at once, before a job is started there.

`python launch/probe.py` on a host prints its facts as one JSON object. It needs Python's standard library alone, so
that it can tell what is missing.
"""

from __future__ import annotations

import json
import os
import platform
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
MARK = "overtone-facts:"  # before the facts, since a login shell may print more


def free_port() -> int | None:
    """A free port below those that the system hands out by itself, so that it stays free while the ranks start."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    return None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """GPUs of this host."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        return 0
    with suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return 0


def facts() -> dict[str, Any]:
    """What a launch needs to know of this host."""
    # sshd says "client port server port": at which of this host's addresses it was reached
    reached = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "host": socket.gethostname(),
        "address": reached[2] if len(reached) == 4 else None,
        "port": free_port(),
        "cores": cores(),
        "gpus": gpus(),
        "time": time.time(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "checkout": Path("pretrain/__main__.py").is_file(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(MARK + json.dumps(facts()) + "\n")
