"""Standard output and error whose reader may go: what is printed then is lost, and nothing fails for it."""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from contextlib import suppress
from typing import Any

STREAMS = {"stdout": 1, "stderr": 2}


class _Output(io.FileIO):
    """A descriptor that takes what cannot be written: the reader of a pipe has gone, or is slow where nobody waits for
    it, or a disk is full.
    """

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def bear_loss() -> None:
    """From here on, a print to standard output or error never raises. Streams that were replaced are left alone."""
    for name, number in STREAMS.items():
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with suppress(OSError, ValueError):
            stream.flush()
            raw = io.BufferedWriter(_Output(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def is_abandoned() -> bool:
    """Whether standard output or error is a pipe, or a socket as sshd makes it, that nobody reads any more."""
    poll = select.poll()
    for number in STREAMS.values():
        with suppress(OSError):
            mode = os.fstat(number).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
