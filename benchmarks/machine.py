"""What results are called and what nvidia-smi says of this machine's GPU; needs nothing but Python."""

from __future__ import annotations

import os
import re
import subprocess

ASKING_S = 20.0


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
