"""A signal that asks a rank to stop is remembered until the ranks agree on it; without torch.

A launcher starts its job with these signals blocked (`launch/job.py`): whoever sends them to every process of a job, as
Slurm does, then reaches the ranks alone, and not deepspeed's launchers, which would kill the ranks within 30 s.
"""

from __future__ import annotations

import signal
from types import FrameType

from common.command import end_at_once, leaves_at_once


class StopSignal:
    """Remembers a SIGTERM, SIGINT or SIGUSR1; a second SIGINT interrupts at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*self.SIGNALS, signal.SIGHUP})
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            if leaves_at_once():
                end_at_once()
            raise KeyboardInterrupt("interrupted twice: not saved")
        self.received = signal.Signals(number).name
