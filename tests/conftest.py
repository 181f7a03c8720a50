"""Which tests are started first."""

from __future__ import annotations

import pytest

# Those that mostly wait, for timeouts and processes: beside them the other workers have the cores for themselves.
FIRST = ("test_hosts_job.py", "test_slurm.py", "test_hosts_doctor.py", "test_main_job.py", "test_chaos.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
