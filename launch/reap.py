"""`python -m launch.reap JOB` on a host ends what is left there of the job with that id, a frozen rank say.

The job's processes are known by the variable that names it, so that no other job is met. Needs Linux and
Python's standard library alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from launch.probe import MARK


def holders(variable: bytes) -> list[int]:
    """Process ids of the processes whose environment began with `variable`, NAME=VALUE, in it."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if variable in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids


if __name__ == "__main__":
    pids = holders(b"OVERTONE_JOB=" + os.fsencode(sys.argv[1]))
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    sys.stdout.write(MARK + json.dumps({"killed": pids}, allow_nan=False) + "\n")
