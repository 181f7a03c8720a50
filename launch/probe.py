"""What a host says of itself: asked over ssh, on all hosts at once, before a job is started there.

`python -m launch.probe [RUN DATA TOKEN [CONFIG key=value ...]]` on a host prints its facts as one JSON object; with a
run folder, a data folder, the name of a file that the asking host has made beside the run folder, and a config, all
that a doctor wants to know. It needs Python's standard library and files of common/ that need no more, so that it can
tell what is missing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.checkout import versions
from common.errors import ConfigError
from common.files import check_writable, read_bounded
from common.machine import cores

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
        "identity": identity(),
        "address": reached[2] if len(reached) == 4 else None,
        "port": free_port(),
        "cores": cores(),
        "gpus": gpus(),
        "time": time.time(),
        "versions": versions(),
    }


def identity() -> str | None:
    """What no two hosts have in common, whatever they are called: the boot of a system, and of its containers those
    with their own network and processes. None: not known.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(f"/proc/self/ns/{space}") for space in ("net", "pid"))])
    except OSError:
        return None


def more_facts(run: Path, data: Path, token: str, config: Sequence[str] = ()) -> dict[str, Any]:
    """What a doctor asks for in addition; `config`: a config's path and settings."""
    above = nearest(run)
    problem = None
    try:
        check_writable(run)
    except ConfigError as error:
        problem = str(error)
    return {
        "common": _in_common(config),
        "driver": _query("driver_version"),
        "gpu_free_mib": [int(mib) for mib in _query("memory.free").split() if mib.isdecimal()],
        "data": data_problem(data),
        "free_bytes": shutil.disk_usage(above).free,
        "unwritable": problem,
        "shares_run": (above / token).exists(),
        "compiler": shutil.which("g++"),
        "ninja": shutil.which(
            "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        ),
        "energy": energy(),
    }


def _in_common(config: Sequence[str]) -> dict[str, Any]:
    """What every host must have alike, as the ranks will compare it; or `problem`: why this one cannot tell."""
    try:
        from pretrain.config import load
        from pretrain.runtime.agreement import facts_here

        return dict(facts_here(load(config[0], config[1:]) if config else None))
    except Exception as error:  # whatever is missing here, a host that says so tells more than a traceback
        return {"problem": f"{type(error).__name__}: {error}"}


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.isdir(path))


def data_problem(folder: Path) -> str | None:
    """The first file of prepared data that is missing or has another size than its manifest says; None: none is."""
    try:
        manifest = json.loads(read_bounded(folder / "manifest.json", MANIFEST_BYTES))
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        if strange := [shard["file"] for shard in shards if Path(shard["file"]).name != shard["file"]]:
            raise ValueError(f"it lists {strange[0]!r}")
        sizes = {shard["file"]: int(shard["size"]) for shard in shards}
        sizes |= {
            str(Path(shard["file"]).with_suffix(".idx")): INDEX_BYTES * int(shard["documents"]) for shard in shards
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return f"{folder / 'manifest.json'}: {error.__class__.__name__}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != size:
            return f"{file}: {file.stat().st_size} bytes instead of {size}"
    return None


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


if __name__ == "__main__":
    answer = facts()
    if len(sys.argv) > 3:
        answer |= more_facts(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    answer["time"] = time.time()  # as late as can be
    sys.stdout.write(MARK + json.dumps(answer, allow_nan=False) + "\n")
