"""What a host says of itself: asked over ssh, on all hosts at once, before a job is started there.

`python -m launch.probe [RUN DATA TOKEN]` on a host prints its facts as one JSON object; with a run folder, a data
folder and the name of a file that the asking host has made beside the run folder, all that a doctor wants to know. It
needs Python's standard library and two files of common/, which need no more, so that it can tell what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import check_writable, read_bounded
from common.machine import cores

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
MANIFEST_BYTES = 1 << 28  # of prepared data at most: data.manifest.MOST
INDEX_BYTES = 18  # of a document in a shard's index: data.shards.INDEX
MARK = "overtone-facts:"  # before the facts, since a login shell may print more


def free_port() -> int | None:
    """A free port below those that the system hands out by itself, so that it stays free while the ranks start."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    return None


def gpus() -> int:
    """GPUs of this host that CUDA may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").partition(",")[0].strip() in ("", "-1"):
        return 0  # as CUDA reads it
    return listed_gpus()


def listed_gpus() -> int:
    """GPUs that the driver lists, whatever CUDA_VISIBLE_DEVICES says."""
    return sum(line.startswith("GPU ") for line in (_said("nvidia-smi", "-L") or "").splitlines())


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
        "packages": {name: installed for name in PACKAGES if (installed := _version(name)) is not None},
    }


def more_facts(run: Path, data: Path, token: str) -> dict[str, Any]:
    """What a doctor asks for in addition."""
    above = nearest(run)
    problem = None
    try:
        check_writable(run)
    except ConfigError as error:
        problem = str(error)
    return {
        "revision": _said("git", "rev-parse", "HEAD"),
        "changed": _changes(),
        "driver": _query("driver_version"),
        "gpu_free_mib": [int(mib) for mib in _query("memory.free").split() if mib.isdecimal()],
        "data": data_state(data),
        "free_bytes": shutil.disk_usage(above).free,
        "writable": problem is None,
        "unwritable": problem,
        "shares_run": (above / token).exists(),
        "compiler": shutil.which("g++"),
        "ninja": shutil.which(
            "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        ),
        "energy": energy(),
    }


def _changes() -> str:
    """The beginning of a hash of what differs from the revision that is checked out; empty if nothing does."""
    changes = _said("git", "diff", "HEAD")
    return hashlib.sha256(changes.encode()).hexdigest()[:9] if changes else ""


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.isdir(path))


def data_state(folder: Path) -> dict[str, str | None]:
    """The hash of the manifest of prepared data, which holds the hashes of all its files, and the first file that is
    missing or has another size.
    """
    try:
        raw = read_bounded(folder / "manifest.json", MANIFEST_BYTES)
        manifest = json.loads(raw)
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        if strange := [shard["file"] for shard in shards if Path(shard["file"]).name != shard["file"]]:
            raise ValueError(f"it lists {strange[0]!r}")
        sizes = {shard["file"]: int(shard["size"]) for shard in shards}
        sizes |= {
            str(Path(shard["file"]).with_suffix(".idx")): INDEX_BYTES * int(shard["documents"]) for shard in shards
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return {"sha256": None, "problem": f"{folder / 'manifest.json'}: {error.__class__.__name__}"}
    problem = None
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            problem = problem or f"{file}: missing"
        elif file.stat().st_size != size:
            problem = problem or f"{file}: {file.stat().st_size} bytes instead of {size}"
    return {"sha256": hashlib.sha256(raw).hexdigest(), "problem": problem}


def energy() -> str:
    """Which energy counters there are, and whether this user may read them."""
    readable = [f"{count} GPU" for count in [gpus()] if count]
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:*/energy_uj"))
    if counters:
        readable.append("CPU" if os.access(counters[0], os.R_OK) else f"CPU (only {counters[0].owner()} reads it)")
    return ", ".join(readable) or "none"


def _query(field: str) -> str:
    return _said("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits") or ""


def _said(*words: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    return None


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


if __name__ == "__main__":
    answer = facts()
    if len(sys.argv) == 4:
        answer |= more_facts(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    answer["time"] = time.time()  # as late as can be
    sys.stdout.write(MARK + json.dumps(answer, allow_nan=False) + "\n")
