"""Energy of a run's phases in joules, from its nodes' counters, read by Zeus; None if not measured, never zero.

One counter per node, on its local rank 0, over that node's GPUs, CPU packages and DRAM; where ranks see their own GPU
alone, each counts that. A window is the difference of two readings. A counter that did not move in a window was not
updated in it: that window is not measured, and its joules are in the next one, so that sums lose nothing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from pretrain.records import JOULES, PARTS
from pretrain.runtime.ranks import Ranks

log = logging.getLogger(__name__)

NO_COUNTER = "no energy counter"
WRAP_NOTICED_S = 5.0  # Zeus looks once a second whether a counter of the CPU has wrapped
PAUSE_S = 0.1

Reading = Mapping[str, list[float]]  # part -> joules of each device since some fixed time


@dataclass(frozen=True)
class Spent:
    """What a phase took, of the whole world."""

    seconds: float
    joules: Mapping[str, float] = field(default_factory=dict)  # by part that every node measured; 0: not moved

    @property
    def total_j(self) -> float | None:
        """Of all parts that were measured; None if none was."""
        return sum(self.joules.values()) if self.joules else None

    def as_dict(self) -> dict[str, float | None]:
        """`gpu_j`, `cpu_j` and `dram_j`, None where the phase was not measured or too short to be."""
        return {field: self.joules.get(part) or None for part, field in JOULES.items()}


class Counter(Protocol):
    """The energy counters of one node."""

    missing: dict[str, str]  # part -> why it cannot be read

    def read(self) -> Reading:
        """All parts that are not missing. A reading falls only until a wrap-around was noticed. May raise anything."""
        ...


class ZeusCounter:
    """Of the parts `owed`: NVML's (or AMD SMI's) counters of the first `gpus` visible GPUs, and RAPL's of all CPU
    packages and their DRAM.

    RAPL's can be read by root, by whom root gave the right to read them, or through Zeus' daemon (docs/energy.md).
    """

    def __init__(self, gpus: int, owed: Sequence[str] = PARTS) -> None:
        self.missing: dict[str, str] = {}
        self._readers: dict[str, Callable[[], list[float]]] = {}
        openers = {"gpu": lambda: self._gpus(gpus), "cpu": self._packages, "dram": self._memory}
        for part in owed:
            try:
                reader = openers[part]()
                reader()
                self._readers[part] = reader
            except Exception as error:  # no library, no device, no permission: the run goes on, unmeasured
                self.missing[part] = str(error) or repr(error)

    def read(self) -> Reading:
        """Joules of each device since its counter began, by part. Raises whatever Zeus raises."""
        return {part: reader() for part, reader in self._readers.items()}

    def _gpus(self, count: int) -> Callable[[], list[float]]:
        if not count:
            raise LookupError("no GPU is used")
        from zeus.device import get_gpus

        gpus = get_gpus()
        if not all(gpus.supports_get_total_energy_consumption(k) for k in range(count)):
            raise LookupError("a GPU has no energy counter (NVIDIA's have one since Volta)")
        return lambda: [gpus.get_total_energy_consumption(k) / 1e3 for k in range(count)]  # from mJ

    def _packages(self) -> Callable[[], list[float]]:
        from zeus.device import get_cpus
        from zeus.device.cpu import rapl_is_available

        if not rapl_is_available():
            raise LookupError("this machine shows no RAPL counters")
        cpus = get_cpus()
        zones = {k: Path(cpus.rapl_dir) / f"intel-rapl:{cpu.cpu_index}" for k, cpu in enumerate(cpus.cpus)}
        # A zone "psys" of laptops is the whole machine: it would count the packages twice.
        self._zones = [k for k, zone in zones.items() if (zone / "name").read_text().startswith("package")]
        if not self._zones:
            raise LookupError("RAPL shows no CPU package")
        self._cpus = cpus
        return lambda: [cpus.get_total_energy_consumption(k).cpu_mj / 1e3 for k in self._zones]

    def _memory(self) -> Callable[[], list[float]]:
        if "cpu" in self.missing:
            raise LookupError(self.missing["cpu"])
        cpus = self._cpus
        if not all(cpus.supports_get_dram_energy_consumption(k) for k in self._zones):
            raise LookupError("RAPL shows no DRAM for these CPU packages")
        return lambda: [cpus.get_total_energy_consumption(k).dram_mj / 1e3 for k in self._zones]


def zeus_counter(ranks: Ranks) -> Counter | None:
    """This rank's counters: of its node if it measures for that, of its GPU if no other rank sees it; else None."""
    if not (owed := owed_by(ranks)):
        return None
    if ranks.device.type != "cuda":
        return ZeusCounter(0, owed)
    return ZeusCounter(1 if ranks.own_gpu else min(ranks.local_world, torch.cuda.device_count()), owed)


def owed_by(ranks: Ranks) -> tuple[str, ...]:
    """The parts that a rank measures, for its node or of its own."""
    if ranks.local_rank == 0:
        return PARTS
    return ("gpu",) if ranks.own_gpu else ()


class Meter:
    """Times phases and measures their energy. Every rank makes one and calls it alike; `counter` is None on ranks that
    do not measure.
    """

    def __init__(self, ranks: Ranks, counter: Counter | None) -> None:
        self.ranks, self.counter = ranks, counter
        self.nodes = max(1, ranks.world // max(1, ranks.local_world))
        self._owed = Tally(part for parts in ranks.gather(owed_by(ranks)) for part in parts)
        self.missing: dict[str, str] = {}  # part -> why it is not measured: some node cannot
        self._failure: str | None = None  # of this node's counter, while it measured
        self._last: Reading = {}
        self._start: Reading = {}
        self._began: float | None = None
        self._phase = ""
        self._agree()

    @property
    def measured(self) -> tuple[str, ...]:
        """The parts that every node measures."""
        return tuple(part for part in PARTS if part not in self.missing)

    def _agree(self) -> None:
        """Gathers from all nodes what they cannot measure, and why. Collective."""
        mine: dict[str, str] = {}
        if owed := owed_by(self.ranks):
            mine = dict.fromkeys(owed, self._failure or NO_COUNTER) if self.counter is None else self.counter.missing
        for rank, missing in enumerate(self.ranks.gather(mine)):
            where = f" (node of rank {rank})" if self.nodes > 1 else ""
            self.missing = {**{part: why + where for part, why in missing.items()}, **self.missing}

    def _read(self) -> Reading:
        """This node's counters, none of them below what it was; nothing where none can be read."""
        if self.counter is None:
            return {}
        try:
            deadline = time.monotonic() + WRAP_NOTICED_S
            reading = self.counter.read()
            while fallen := [part for part in self._last if any(_below(reading[part], self._last[part]))]:
                if time.monotonic() > deadline:
                    raise ValueError(f"the counter of {fallen[0]} went back")
                time.sleep(PAUSE_S)
                reading = self.counter.read()
            self._last = reading
            return reading
        except Exception as error:  # the run goes on, unmeasured
            log.warning("energy is no longer measured on this node: %r", error)
            self.counter, self._failure = None, f"the counter failed: {error!r}"
            return {}

    def begin(self, phase: str) -> None:
        """Opens a window: one at a time."""
        assert self._began is None, f"{self._phase} is still open"
        self._phase = phase
        self._synchronize()
        self._start = self._read()
        self._began = time.perf_counter()

    def end(self) -> Spent:
        """Closes the window and sums the nodes' joules. Every rank calls it."""
        assert self._began is not None, "no window is open"
        self._synchronize()
        seconds = time.perf_counter() - self._began
        self._began = None
        stop = self._read()
        mine = [[sum(stop[part]) - sum(self._start[part]), 1.0] if part in stop else [0.0, 0.0] for part in PARTS]
        summed = self.ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        counted = {
            part: joules for part, (joules, parts) in zip(PARTS, summed, strict=True) if parts == self._owed[part]
        }
        if any(part not in counted for part in self.measured):
            self._agree()
        return Spent(seconds, {part: counted[part] for part in self.measured})

    def _synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def window(self, phase: str) -> Iterator[list[Spent]]:
        """`with meter.window("eval") as spent: ...`, then `spent[0]`."""
        spent: list[Spent] = []
        self.begin(phase)
        yield spent
        spent.append(self.end())


def _below(now: list[float], before: list[float]) -> Iterator[bool]:
    return (a < b for a, b in zip(now, before, strict=True))
