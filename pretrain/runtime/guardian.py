"""A small process beside a rank that kills it once it is frozen: what is stopped, or holds Python's lock for good, can
neither end itself nor be ended by SIGTERM, and deepspeed's launcher on its host would wait for it for ever.

The rank's watch writes a line with a number of seconds to it every second. When no line comes for as long as the last
one said, the rank is killed. The guardian ends with the rank, whose end closes the pipe. Python's standard library
alone: it starts in a few hundredths of a second, and takes a few MB.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from typing import IO

LOOK_S = 1.0


class Guardian:
    """The rank's end of it."""

    def __init__(self, name: str) -> None:
        """`name`: the rank and its host, for what the guardian prints."""
        words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), name]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def hear(self, patience_s: float) -> None:
        """The rank lives; it may be silent for `patience_s` from now on."""
        with suppress(OSError):  # it was killed: the rank can do without
            os.write(self._pipe.fileno(), f"{patience_s}\n".encode())

    def dismiss(self) -> None:
        """Ends it, and waits for that."""
        self._pipe.close()
        self._process.wait()


def guard(rank: int, name: str) -> None:
    """Kills the process `rank`, this one's parent, unless lines come on standard input in time."""
    patience_s, silent_s = float("inf"), 0.0
    while silent_s < patience_s:
        # Looks are counted, not seconds: whoever stops a whole job, and has it go on, stops its guardians too.
        if select.select([0], [], [], LOOK_S)[0]:
            said = os.read(0, 65536).split()
            if not said:
                return
            patience_s, silent_s = float(said[-1]), 0.0
        else:
            silent_s += LOOK_S
    if os.getppid() == rank:
        print(f"{name}: killed after {silent_s:.0f} s without a sign of life: it was frozen", file=sys.stderr)
        os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    # What asks ranks to stop may be sent to all processes of a job; this one is needed until its rank has saved.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with suppress(BrokenPipeError):
        guard(int(sys.argv[1]), sys.argv[2])
