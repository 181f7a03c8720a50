"""Work spread over processes: a function is sent once to each of them, then items go out and results come back."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from common.errors import ConfigError

HERE = 4  # items that are worked on in this process first: most small jobs end before processes are worth their start

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Generic[Item, Result]):
    """Calls `work(item)` in `count` processes; with one, in this process, and so for the first HERE items of any count.

    `work` must be picklable. The processes end with this one, however it ends.
    """

    def __init__(self, work: Callable[[Item], Result], count: int) -> None:
        self.count = count
        self._work = work
        self._asked = 0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, item: Item) -> Future[Result]:
        """Sends an item to be worked on; `result` waits for what comes of it."""
        self._asked += 1
        if self.count > 1 and self._asked > HERE:
            if self._pool is None:
                spawn = multiprocessing.get_context("spawn")  # libraries have threads by now, which a fork would break
                self._pool = ProcessPoolExecutor(self.count, spawn, initializer=_begin, initargs=(self._work,))
            with _unheard():
                return self._pool.submit(_apply, item)
        done: Future[Result] = Future()
        done.set_result(self._work(item))
        return done

    def result(self, asked: Future[Result]) -> Result:
        """Waits for a result. Raises ConfigError if a process was killed."""
        try:
            return asked.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a worker process was killed, as happens when memory runs out; run the command again, with fewer of "
                "them: it goes on from what is finished"
            ) from None


@contextmanager
def _unheard() -> Iterator[None]:
    """A process that is started in the block does not hear Ctrl-C, from its first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_here: Any = None  # the work of this worker process


def _begin(work: Callable[[Any], Any]) -> None:
    global _here
    _here = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent handles it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a parent that is killed leaves its workers waiting for work for ever
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _apply(item: Any) -> Any:
    return _here(item)
