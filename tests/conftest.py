"""How tests are spread over processes, and which are started first."""

from __future__ import annotations

import os
import signal

import pytest

from common.machine import cores

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many processes at once, and the same sums in all of them

# In the background of a shell without job control it is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The longest, which mostly wait for processes and timeouts: beside them the other workers have the cores.
FIRST = (
    "test_hosts_job.py",
    "test_main_job.py",
    "test_slurm.py",
    "test_chaos.py",
    "test_two_jobs.py",
    "test_hopper.py",
    "test_gpu_benchmark.py",
    "test_hosts_doctor.py",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, since one mostly waits."""
    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
