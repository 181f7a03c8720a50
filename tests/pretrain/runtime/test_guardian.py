"""A frozen rank is killed by the process beside it, and no other is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

RANK = """
import os, signal, sys, time
from pretrain.runtime.guardian import Guardian

guardian = Guardian("rank 3 on a host")
guardian.hear(60.0)
print(guardian._process.pid, flush=True)
time.sleep(0.5)  # for it to start
if sys.argv[1] == "frozen":
    guardian.hear(1.0)
    os.kill(os.getpid(), signal.SIGSTOP)
elif sys.argv[1] == "told":
    os.kill(guardian._process.pid, signal.SIGTERM)
    os.kill(guardian._process.pid, signal.SIGUSR1)
    guardian.hear(1.0)
    os.kill(os.getpid(), signal.SIGSTOP)
elif sys.argv[1] == "exits":
    os._exit(5)
guardian.dismiss()
"""


@pytest.mark.parametrize(
    ("how", "code"), [("frozen", -signal.SIGKILL), ("told", -signal.SIGKILL), ("exits", 5), ("dismisses", 0)]
)
def test_a_frozen_rank_is_killed(how: str, code: int) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", RANK, how], stdout=pipe, stderr=pipe, text=True) as rank:
        assert rank.stdout is not None
        guardian = psutil.Process(int(rank.stdout.readline()))
        told = rank.communicate(timeout=60)[1]
        assert rank.returncode == code, told
        assert ("rank 3 on a host: killed after 1 s without a sign of life" in told) == (code < 0), told
        deadline = time.monotonic() + 20
        while guardian.is_running():
            assert time.monotonic() < deadline, "its guardian outlives it"
            time.sleep(0.01)
