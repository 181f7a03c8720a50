"""What this machine is called, for the headings of results; needs nothing but Python."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

ASKING_S = 20.0


def cpu_name() -> str:
    """This machine's processor, in words."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as part of a file's: lower case, letters and digits between hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def first_gpu() -> str:
    """The index or UUID by which nvidia-smi knows the first GPU that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def nvidia_smi(field: str) -> str | None:
    """One field of `nvidia-smi --query-gpu`, of the first GPU, without its unit; None if it cannot be had."""
    words = ["nvidia-smi", "-i", first_gpu(), f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=ASKING_S)
    except (OSError, subprocess.SubprocessError):
        return None
    value = said.stdout.strip()
    return None if said.returncode or not value or value.startswith("[") else value
