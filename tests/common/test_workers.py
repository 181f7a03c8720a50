"""Worker processes end with the one that started them, and one that dies is told."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from common.errors import ConfigError
from common.workers import Workers

ROOT = Path(__file__).parents[2]


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    code = (
        "import os; from common.workers import Workers; from operator import neg\n"
        "if __name__ == '__main__':\n"
        "    pool = Workers(neg, 2)\n"
        "    for n in range(6): print(pool.result(pool.submit(n)))\n"
        "    print(*pool._pool._processes, flush=True); os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "killed.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, tmp_path / "killed.py"], env=environment, capture_output=True, text=True)
    *results, processes = found.stdout.splitlines()
    assert results == ["0", "-1", "-2", "-3", "-4", "-5"]

    def lives(pid: int) -> bool:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    deadline = time.monotonic() + 60
    while any(lives(int(process)) for process in processes.split()):
        assert time.monotonic() < deadline, "workers are still there"
        time.sleep(0.1)


def test_a_worker_that_dies_is_told():
    with Workers(_die, 2) as pool, pytest.raises(ConfigError, match="a worker process was killed"):
        for _ in range(6):
            pool.result(pool.submit(os.getpid()))


def _die(parent: int) -> None:
    if os.getpid() != parent:  # the first items are done there
        os.kill(os.getpid(), signal.SIGKILL)
