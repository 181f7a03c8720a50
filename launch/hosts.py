"""Where the ranks go: this machine's GPUs, this machine's cores, or the hosts of a deepspeed hostfile."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.settings import ConfigError

CPU_RANKS = 2  # on a machine without a GPU, so that whatever is distributed is exercised
LINE = re.compile(r"(?P<host>[A-Za-z0-9_\[][\w.@:\[\]-]*)\s+slots=(?P<slots>[0-9]+)\s*(#.*)?", re.ASCII)


@dataclass(frozen=True)
class Placement:
    """How many ranks run where."""

    ranks: Mapping[str, int]  # by host, in the order of the hostfile
    hostfile: Path | None = None  # None: all on this machine
    gpus: tuple[int, ...] = ()  # those of this machine that are used; none: its cores

    @property
    def world(self) -> int:
        return sum(self.ranks.values())


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the order of the file, which has a line `HOST slots=N` for each host and comments after `#`.

    Raises:
        ConfigError: the file cannot be read or has no host; a line is malformed, repeats a host or offers no slot.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such hostfile; it has a line `HOST slots=N` for each host") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a hostfile: {error}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = LINE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{path}, line {number}: given {text!r}; expected `HOST slots=N`, such as `node1 slots=8`"
            )
        host = found["host"]
        if host in slots:
            raise ConfigError(f"{path}, line {number}: the host {host} is given twice; add its slots up in one line")
        if int(found["slots"]) == 0:
            raise ConfigError(
                f"{path}, line {number}: the host {host} has slots=0; give it a rank or more, or take its line out"
            )
        slots[host] = int(found["slots"])
    if not slots:
        raise ConfigError(f"{path}: there is no host in it; it has a line `HOST slots=N` for each host")
    return slots


def place(hostfile: Path | None = None, per_host: int | None = None) -> Placement:
    """Decides where the ranks go.

    Args:
        hostfile: the hosts; None: this machine.
        per_host: ranks on each host; None: as many as it has slots or GPUs, and CPU_RANKS without a GPU.
    Raises:
        ConfigError: a bad hostfile, or more ranks than slots or GPUs.
    """
    if per_host is not None and per_host < 1:
        raise ConfigError(f"--num-gpus {per_host}: expected 1 or more ranks on each host")
    if hostfile is not None:
        slots = read_hostfile(hostfile)
        for host, offered in slots.items():
            if per_host is not None and per_host > offered:
                raise ConfigError(f"--num-gpus {per_host}: the host {host} in {hostfile} has only slots={offered}")
        return Placement({host: per_host or offered for host, offered in slots.items()}, hostfile)
    gpus = visible_gpus()
    if not gpus:
        return Placement({"localhost": per_host or min(CPU_RANKS, cores())})
    if per_host is not None and per_host > len(gpus):
        raise ConfigError(
            f"--num-gpus {per_host}: this machine has {len(gpus)} GPU{'s' * (len(gpus) > 1)} to use "
            f"({', '.join(map(str, gpus))}). Ask for fewer, or set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return Placement({"localhost": per_host or len(gpus)}, gpus=gpus[:per_host])


def visible_gpus() -> tuple[int, ...]:
    """Indices of the GPUs that ranks may use, by CUDA_VISIBLE_DEVICES where it is set, else by `nvidia-smi -L`.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES holds names instead of numbers.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        if "-1" in names:  # CUDA's sign for none from here on
            names = names[: names.index("-1")]
        if not all(name.isdecimal() for name in names):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={chosen}: the deepspeed launcher takes numbers of GPUs only; "
                "`nvidia-smi -L` tells which number each name has"
            )
        return tuple(sorted({int(name) for name in names}))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(range(len(found))) if listed.returncode == 0 else ()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
