"""Where this house's code is, for processes that start in another folder; and which code it is, for hosts to compare.

It needs Python's standard library alone, so that a host can tell what is missing there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("common", "data", "model", "pretrain", "launch")  # folders that ranks run code of
KINDS = {".py", ".cpp", ".cu", ".h"}
PACKAGES = (  # that a loss, or what ranks tell each other, depends on
    *("torch", "deepspeed", "numpy", "safetensors", "triton", "flash-attn", "flash-attn-4"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)


def python_path() -> dict[str, str]:
    """What Python needs in its environment to run the checkout from the working directory; nothing if they are one.

    DeepSpeed's launcher hands variables on to other hosts whose names begin with PYTHON.
    """
    if Path.cwd() == ROOT:
        return {}
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([str(ROOT), *filter(None, given)])
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}  # no data/ of the user's before ours


def revision() -> str | None:
    """The revision of this checkout; None outside git."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def sources_sha256() -> str:
    """Of the names and bytes of all files that ranks run, whatever git knows of them."""
    files = (file for folder in CODE for file in (ROOT / folder).rglob("*") if file.suffix in KINDS)
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
