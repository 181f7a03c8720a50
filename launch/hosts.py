"""Where the ranks go: this machine's GPUs, this machine's cores, or the hosts of a deepspeed hostfile."""

import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.machine import cores
from launch.probe import listed_gpus

CPU_RANKS = 2  # on a machine without a GPU, so that whatever is distributed is exercised
LINE = re.compile(r"(?P<host>[A-Za-z0-9_\[][\w.@:\[\]-]*)\s+slots=(?P<slots>[0-9]+)\s*(#.*)?", re.ASCII)


@dataclass(frozen=True)
class Placement:
    """How many ranks run where."""

    ranks: Mapping[str, int]  # by host, in the order of the hostfile
    hostfile: Path | None = None  # None: all on this machine
    gpus: tuple[int, ...] = ()  # those of this machine that are used; none: its cores
    chosen: str = ""  # deepspeed's --include for these hosts and slots; empty: all of the hostfile

    @property
    def world(self) -> int:
        """Ranks on all hosts."""
        return sum(self.ranks.values())

    def slots(self, host: str) -> int:
        """The slots that a host must have for those of its ranks to be there: GPUs, if it has any."""
        chosen = {part.partition(":")[0]: part.partition(":")[2] for part in self.chosen.split("@")}
        return max(map(int, chosen[host].split(","))) + 1 if host in chosen else self.ranks[host]


def unfit(placement: Placement, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why hosts cannot run the ranks that are placed on them, each in words with the remedy.

    Args:
        facts: by host, as launch/probe.py tells them.
    """
    problems: list[str] = []
    known: dict[str | None, str] = {}
    for host, told in facts.items():
        other = known.setdefault(told["identity"], host)
        if other != host and told["identity"] is not None:
            problems.append(f"{host}: it is the same host as {other}; name it once, with all its slots in that line")
    most = max((told["gpus"] for told in facts.values()), default=0)
    for host, told in facts.items():
        gpus, slots = told["gpus"], placement.slots(host)
        if most and gpus < slots:
            remedy = f"lower its slots in {placement.hostfile}, or take fewer with --num-gpus"
            if not gpus:
                remedy = f"leave it out with --exclude {host}, or look at `nvidia-smi -L` there"
            problems.append(f"{host}: {slots} slots are to be used, but {gpus} GPUs are found there; {remedy}")
    return problems


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
        raise ConfigError(
            f"{path}: cannot be read as a hostfile, which has a line `HOST slots=N` for each host: {error}"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{path}, line {number}: given {text!r}; expected `HOST slots=N`, such as `node1 slots=8`"
            )
        host = match["host"]
        if host in slots:
            raise ConfigError(f"{path}, line {number}: the host {host} is given twice; add its slots up in one line")
        if int(match["slots"]) == 0:
            raise ConfigError(
                f"{path}, line {number}: the host {host} has slots=0; give it a rank or more, or take its line out"
            )
        slots[host] = int(match["slots"])
    if not slots:
        raise ConfigError(f"{path}: there is no host in it; it has a line `HOST slots=N` for each host")
    return slots


def place(
    hostfile: Path | None = None,
    per_host: int | None = None,
    *,
    include: str = "",
    exclude: str = "",
    hosts: int | None = None,
) -> Placement:
    """Decides where the ranks go.

    Args:
        hostfile: the hosts; None: this machine.
        per_host: ranks on each host; None: as many as it has slots or GPUs, and CPU_RANKS without a GPU.
        include: hosts and slots to use alone, as deepspeed writes them: `node1@node2:0,2`.
        exclude: hosts and slots to leave out.
        hosts: how many hosts to use, the first ones of the hostfile; None: all.
    Raises:
        ConfigError: a bad hostfile, hosts or slots that are not in it, or more ranks than slots or GPUs.
    """
    if per_host is not None and per_host < 1:
        raise ConfigError(f"--num-gpus {per_host}: expected 1 or more ranks on each host")
    if hostfile is not None:
        offered = read_hostfile(hostfile)
        return _placed(offered, _chosen(offered, hostfile, per_host, include, exclude, hosts), hostfile)
    for option, given in (("--include", include), ("--exclude", exclude), ("--num-nodes", hosts)):
        if given not in ("", None):
            raise ConfigError(
                f"{option} {given}: it chooses among the hosts of a --hostfile, and none is given. On this machine, "
                "CUDA_VISIBLE_DEVICES=0,2 chooses among the GPUs."
            )
    gpus = visible_gpus()
    if not gpus:
        return Placement({"localhost": per_host or min(CPU_RANKS, cores())})
    if per_host is not None and per_host > len(gpus):
        raise ConfigError(
            f"--num-gpus {per_host}: this machine has {len(gpus)} GPU{'s' * (len(gpus) > 1)} to use "
            f"({', '.join(map(str, gpus))}). Ask for fewer, or set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return Placement({"localhost": per_host or len(gpus)}, gpus=gpus[:per_host])


def without(placement: Placement, gone: Container[str]) -> Placement | None:
    """The same placement without some of its hosts; None if no other is left."""
    assert placement.hostfile is not None
    offered = read_hostfile(placement.hostfile)
    slots = _filter(offered, placement.chosen, placement.hostfile, "--include") if placement.chosen else _all(offered)
    left = {host: slots[host] for host in placement.ranks if host not in gone}
    return _placed(offered, left, placement.hostfile) if left else None


def _placed(offered: Mapping[str, int], slots: Mapping[str, list[int]], hostfile: Path) -> Placement:
    all_of_it = slots == _all(offered)
    named = [host for host in slots if "@" in host]
    if named and not all_of_it:
        raise ConfigError(
            f"{hostfile}: deepspeed cannot choose among hosts when one is given as {named[0]}; give the user name in "
            "~/.ssh/config instead, or make a hostfile with only the hosts to use"
        )
    chosen = "@".join(f"{host}:{','.join(map(str, taken))}" for host, taken in slots.items())
    return Placement({h: len(taken) for h, taken in slots.items()}, hostfile, chosen="" if all_of_it else chosen)


def _all(offered: Mapping[str, int]) -> dict[str, list[int]]:
    return {host: list(range(count)) for host, count in offered.items()}


def _chosen(
    offered: Mapping[str, int], hostfile: Path, per_host: int | None, include: str, exclude: str, hosts: int | None
) -> dict[str, list[int]]:
    """Slots by host after the options that choose, which deepspeed does not combine either."""
    if include and exclude:
        raise ConfigError(f"--include {include} and --exclude {exclude}: give one of them")
    if (include or exclude) and (hosts or per_host):
        raise ConfigError("--include and --exclude name hosts and slots: leave --num-nodes and --num-gpus out")
    slots = _all(offered)
    if include:
        named = _filter(offered, include, hostfile, "--include")
        return {host: named[host] for host in slots if host in named}
    if exclude:
        named = _filter(offered, exclude, hostfile, "--exclude")
        left = {host: [k for k in all_of if k not in named.get(host, ())] for host, all_of in slots.items()}
        left = {host: taken for host, taken in left.items() if taken}
        if not left:
            raise ConfigError(f"--exclude {exclude}: no slot of {hostfile} is left")
        return left
    if hosts is not None:
        if not 1 <= hosts <= len(slots):
            raise ConfigError(f"--num-nodes {hosts}: {hostfile} has {len(slots)} hosts; ask for 1 to {len(slots)}")
        slots = dict(list(slots.items())[:hosts])
    if per_host is not None:
        for host, taken in slots.items():
            if per_host > len(taken):
                raise ConfigError(f"--num-gpus {per_host}: the host {host} in {hostfile} has only slots={len(taken)}")
        slots = {host: taken[:per_host] for host, taken in slots.items()}
    return slots


def _filter(offered: Mapping[str, int], text: str, hostfile: Path, option: str) -> dict[str, list[int]]:
    """Slots by host of `HOST[:SLOT,...][@HOST...]`, each of which must be in the hostfile."""
    slots: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in offered:
            raise ConfigError(
                f"{option} {text}: the host {host!r} is not in {hostfile}, which has {', '.join(offered)}"
            )
        numbers = listed.split(",") if colon else list(map(str, range(offered[host])))
        for number in numbers:
            if not number.isdecimal() or int(number) >= offered[host]:
                raise ConfigError(
                    f"{option} {text}: slot {number!r} of {host}; expected numbers from 0 to {offered[host] - 1}, such "
                    f"as {host}:0 or {host}:0,1"
                )
        slots[host] = sorted({*slots.get(host, ()), *map(int, numbers)})
    return slots


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
    return tuple(range(listed_gpus()))
