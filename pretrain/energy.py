"""GPU energy of a run's phases, measured by Zeus; None where nothing was measured, never zero.

One monitor per node, on its local rank 0, over that node's GPUs. A window is closed only where somebody logs: a
window shorter than the counter's update would read zero, and closing one waits for the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pretrain.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """What a phase took, of the whole world."""

    seconds: float
    gpu_j: float | None  # None: some node has no energy counter

    def __add__(self, other: Spent) -> Spent:
        joules = None if self.gpu_j is None or other.gpu_j is None else self.gpu_j + other.gpu_j
        return Spent(self.seconds + other.seconds, joules)


class Counter(Protocol):
    """The part of zeus.monitor.ZeusMonitor that is used here."""

    def begin_window(self, key: str) -> None: ...
    def end_window(self, key: str) -> Any: ...


def zeus_counter(ranks: Ranks) -> Counter | None:
    """Zeus on this node's GPUs if this rank measures for its node; None if another does, or where there is no
    counter.
    """
    if ranks.local_rank or ranks.device.type != "cuda":
        return None
    try:
        from zeus.monitor import ZeusMonitor

        return ZeusMonitor(gpu_indices=list(range(ranks.local_world)))
    except Exception as error:  # no NVML, no permission, an unknown GPU: the run goes on, unmeasured
        log.warning("GPU energy is not measured on this node: %r", error)
        return None


class Meter:
    """Times phases and, with a counter, their GPU energy. `counters` is how many nodes the world has."""

    def __init__(self, ranks: Ranks, counter: Counter | None) -> None:
        self.ranks, self.counter = ranks, counter
        self.nodes = max(1, ranks.world // max(1, ranks.local_world))
        self._began: float | None = None
        self._phase = ""

    def begin(self, phase: str) -> None:
        """Opens a window: one at a time."""
        assert self._began is None, f"{self._phase} is still open"
        self._phase = phase
        if self.counter is not None:
            self.counter.begin_window(phase)
        self._began = time.perf_counter()

    def end(self) -> Spent:
        """Closes the window and sums the nodes' joules. Every rank calls it."""
        assert self._began is not None, "no window is open"
        joules, measured = 0.0, 0
        if self.counter is not None:
            found = self.counter.end_window(self._phase).gpu_energy
            joules, measured = float(sum(found.values())), int(bool(found))
        elif self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        self._began = None
        total, counted = self.ranks.sum(torch.tensor([joules, measured], dtype=torch.float64)).tolist()
        return Spent(seconds, total if counted == self.nodes else None)

    @contextmanager
    def window(self, phase: str) -> Iterator[list[Spent]]:
        """`with meter.window("eval") as spent: ...`, then `spent[0]`."""
        spent: list[Spent] = []
        self.begin(phase)
        yield spent
        spent.append(self.end())
