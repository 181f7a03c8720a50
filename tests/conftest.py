"""How tests are spread over processes, and which are started first."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest

from common.machine import cores

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many processes at once, and the same sums in all of them

# In the background of a shell without job control it is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = tuple(Path(__file__).parent / folder for folder in ("benchmarks", "system"))


gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection looks through it again (those that DeepSpeed asks for are many)."""
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, since one mostly waits."""
    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What measures and what starts launchers is slow. Tests that make hosts start first, then others that are slow:
    they mostly wait for processes and timeouts, and beside them the other workers have the cores.
    """
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: [item.get_closest_marker(mark) is None for mark in ("hosts", "slow")])
