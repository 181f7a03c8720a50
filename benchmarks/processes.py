"""Processes that benchmarks and tests start: in the checkout, waited for, and ended with everything below them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import psutil

from common.processes import kill

ROOT = Path(__file__).resolve().parents[1]
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
    left = below(process.pid)
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    kill(left)
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
        return end(process)  # kills what it left running in its group
    finally:
        end(process)


def until(
    happened: Callable[[], bool],
    limit_s: float,
    poll_s: float = POLL_S,
    running: Callable[[], bool] = lambda: True,
) -> bool:
    """Waits until something is so; False if the limit passed, or what it is waited for no longer runs."""
    deadline = time.monotonic() + limit_s
    while not happened():
        if not running() or time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True


def alive(pid: int) -> bool:
    """Whether it runs: a process that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def below(pid: int) -> list[psutil.Process]:
    """The descendants of a process; none if it has ended."""
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


class Job:
    """A command whose output goes to a file; with the `with`, what is left of it ends."""

    def __init__(
        self,
        words: Sequence[str],
        output: Path,
        start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
        **options: Any,
    ) -> None:
        """`start` takes what `subprocess.Popen` takes, `options` among it; the folder is the checkout's root."""
        self.output = output
        with output.open("wb") as file:
            options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
            self.process = start(words, stdout=file, stderr=subprocess.STDOUT, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def running(self) -> bool:
        """Whether the command itself has not ended; it is reaped if it has."""
        return self.process.poll() is None

    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text()

    def until(self, happened: Callable[[], bool], limit_s: float, poll_s: float = 0.005) -> bool:
        """Waits until something is so; False if the limit passed or the job ended first."""
        return until(happened, limit_s, poll_s, self.running)

    def wait_for(self, happened: Callable[[], bool], limit_s: float = 240.0) -> None:
        """As `until`, but what does not happen is an AssertionError with the output."""
        assert self.until(happened, limit_s, 0.05), self.said()

    def end(self, limit_s: float = 240.0) -> int:
        """Waits for its end; its exit code."""
        return self.process.wait(limit_s)

    def processes(self) -> list[psutil.Process]:
        """It and its descendants, while it runs."""
        return [psutil.Process(self.process.pid), *below(self.process.pid)] if self.running() else []

    def kill(self) -> None:
        """Ends it and its descendants."""
        kill(self.processes())
        self.process.wait()


def tail(text: str, lines: int = 40) -> str:
    """The end of an output, short enough for a page."""
    return "\n".join(text.rstrip().splitlines()[-lines:])[-4000:]
