"""Child processes with a limit of time: one that passes it is killed with everything below it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.2


def start(
    words: Sequence[str], output: IO[bytes] | int | None = None, errors: IO[bytes] | int | None = None,
    group: bool = False, extra: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """A child in the checkout's root, with this process's environment and `extra`.

    Args:
        group: whether it leads a process group, and a session, of its own.
    """
    return subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **(extra or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
        start_new_session=group,
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; it is not reaped, so that its number, and its group's, still mean it."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(process: subprocess.Popen[bytes]) -> int:
    """Kills what is left of a child: itself, everything below it and the group that it leads. Returns its code."""
    if process.returncode is not None:
        return process.returncode
    below = []
    with suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    for one in below:
        with suppress(psutil.Error):
            one.kill()
    return process.wait()


def finish(process: subprocess.Popen[bytes], limit_s: float, tick: Callable[[], None] = lambda: None) -> int | None:
    """Waits for a child, calling `tick` now and then; its code, or None if the limit passed. Nothing of it is left."""
    deadline = time.monotonic() + limit_s
    try:
        while not ended(process):
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)
            tick()
        code = process.returncode
        if code is None:
            with suppress(ProcessLookupError, PermissionError):  # what it left running in its group
                if os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return code
    finally:
        end(process)


def tail(text: str, lines: int = 40) -> str:
    """The end of an output, short enough for a page."""
    return "\n".join(text.rstrip().splitlines()[-lines:])[-4000:]
