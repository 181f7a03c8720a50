"""How far a long job is: a bar with the time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common.units import time_left

REPORT_SECONDS = 30

Log = Callable[[str], Any]
Tell = Callable[[float, str], None]  # share done, from 0 to 1, and how much that is in words


def say(line: str) -> None:
    """Prints a line of a log."""
    print(line, flush=True)  # a log file or a pipe shows it at once


@contextmanager
def progress(what: str, log: Log) -> Iterator[Tell]:
    """Gives a function to tell how far the job is, as often as one likes: shown on a terminal, else logged in every
    REPORT_SECONDS at most.

    Args:
        what: the job, in a word or two.
        log: takes the lines; only `say` makes a bar on a terminal.
    """
    if log is say and sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[amount]}"))
        with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
            task = bar.add_task(what, total=1.0, amount="")
            yield lambda share, amount: bar.update(task, completed=share, amount=amount)
        return
    began = reported = time.monotonic()
    first: float | None = None  # a job that goes on where it stopped does not start at 0

    def tell(share: float, amount: str) -> None:
        nonlocal reported, first
        first = share if first is None else first
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS and share > first:
            reported = now
            left = (now - began) * (1 - share) / (share - first)
            log(f"{what}: {share:.1%}, {amount}, {time_left(left)} left")

    yield tell
