"""A counter that plays back readings, as NVML and RAPL would give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pretrain.energy.meter import Reading


@dataclass
class Replay:
    """Each call gives the next reading, an exception being raised; the last one stays."""

    trace: Sequence[Reading | Exception]
    missing: dict[str, str] = field(
        default_factory=lambda: {"cpu": "RAPL: no permission", "dram": "RAPL: no permission"}
    )
    taken: int = 0

    def read(self) -> Reading:
        reading = self.trace[min(self.taken, len(self.trace) - 1)]
        self.taken += 1
        if isinstance(reading, Exception):
            raise reading
        return reading


def gpus(*readings: float | Sequence[float]) -> list[Reading | Exception]:
    """Readings of a node that only has GPU counters; a number is that of a single GPU."""
    return [{"gpu": [float(one)] if isinstance(one, int | float) else list(one)} for one in readings]
