"""The runs of a study as processes: several at once, told to stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from common.exits import EXIT_PREEMPTED
from common.machine import cores

LAUNCH = [sys.executable, "-m", "launch", "run"]
Work = TypeVar("Work")


class Stopped(Exception):
    """A run ended by neither of its ways: `code` is that of its launcher."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name}: exit code {code}")
        self.code = code


class Jobs:
    """Up to `count` launchers at once, each with `options` of `overtone run`."""

    def __init__(self, options: Sequence[str], count: int) -> None:
        self.options, self.count = options, count
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._told: set[subprocess.Popen[bytes]] = set()
        self._telling = threading.Lock()

    def launch(self, config: Path) -> int:
        """Runs a job to its end; its exit code. None is started once it was told to stop."""
        if self.stopped:
            return EXIT_PREEMPTED
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // self.count))} if self.count > 1 else {}
        # in a session of its own: what signals a whole group, as Ctrl-C and timeout do, reaches it through `stop` alone
        words = [*LAUNCH, str(config), *self.options]
        job = subprocess.Popen(words, env={**threads, **os.environ}, start_new_session=True)
        self._running.add(job)
        try:
            if self.stopped:  # meanwhile
                self._tell(job)
            return job.wait()
        finally:
            self._running.discard(job)

    def stop(self) -> None:
        """Tells all that run to save and to end, once: a second signal would kill a launcher that saves."""
        if self.stopped:
            return
        self.stopped = True
        for job in list(self._running):
            self._tell(job)

    def _tell(self, job: subprocess.Popen[bytes]) -> None:
        with self._telling:
            if job not in self._told:
                self._told.add(job)
                job.terminate()

    def each(self, work: Callable[[Work], None], items: Sequence[Work]) -> None:
        """Calls `work` for each, `count` at a time. Once one raises, the others are told to stop, and what was raised
        first is raised here. SIGTERM, SIGHUP and Ctrl-C stop all.
        """
        raised: list[BaseException] = []

        def guarded(item: Work) -> None:
            try:
                work(item)
            except BaseException as error:  # raised again below, in the thread that asked
                raised.append(error)
                self.stop()

        with self._listening(), ThreadPoolExecutor(self.count) as pool:
            for item in items:
                pool.submit(guarded, item)
        if raised:
            raise raised[0]

    @contextmanager
    def _listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
