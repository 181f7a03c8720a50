"""The launcher's hold on a run folder, and the file by which it tells the ranks that it lives.

A job that trains is never disturbed: `take` waits only for ranks whose launcher is gone, which save and leave by
themselves, and else refuses.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import ConfigError
from common.files import SMALL_BYTES, read_bounded, replace_file, writing
from launch.hosts import Placement
from pretrain.runtime.claim import LOCK, STOP, Claim, Held, Holder, hold, holder, new_job
from pretrain.runtime.endings import set_aside_failures

LEASE_S = 1.0  # between two signs of life
PATIENCE_S = 120.0  # for ranks whose launcher is gone to save and leave; for the first host's launcher to begin


class Lease:
    """The file by which this launcher tells the ranks, wherever they are, that it lives or that they are to stop; when
    it is removed, the ranks end.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        self._over = threading.Event()
        self._job = job  # so that ranks do not take another job's lease for theirs
        self._text: str | None = None
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        with writing(self.path.parent):
            replace_file(self.path, f"{self._job} 0")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # the folder is gone, and the lease with it
            self.path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Asks the ranks to save and leave."""
        self._text = STOP
        self._write(STOP)

    def _renew(self) -> None:
        count = 0
        while not self._over.wait(LEASE_S):
            count += 1
            self._write(self._text or str(count))

    def _write(self, text: str) -> None:
        # Not flushed: a disk that is busy with a checkpoint would hold the sign of life up. Two threads write.
        with suppress(OSError):  # the file system may come back; if not, the ranks take this launcher for dead
            draft = self.path.with_name(f"draft-{self.path.name}-{threading.get_ident()}")
            draft.write_text(f"{self._job} {text}")
            os.replace(draft, self.path)


def lease_of(run: Path, node: int | None = None) -> Path:
    """The lease of the launcher on a host; `node` counts only those hosts that have a launcher of their own."""
    return (run / f"lease-{node or 0}").absolute()


def _renewal(lease: Path) -> Callable[[], bool]:
    """Tells whether a lease is seen to change: then its launcher lives."""
    first = _text_of(lease)
    return lambda: _text_of(lease) not in ("", first)


def _text_of(lease: Path) -> str:
    with suppress(OSError, ValueError):
        return read_bounded(lease, SMALL_BYTES).decode()
    return ""


def take(run: Path, placement: Placement, node: int | None = None, patience_s: float = PATIENCE_S) -> Claim:
    """Takes a run folder for a job of this launcher's, which is then the only one that writes there.

    Args:
        placement: where the ranks go.
        node: this launcher starts the ranks of this host alone; all but the first are of the job that the first begins.
        patience_s: for how long ranks whose launcher is gone, or the first host's launcher, are waited for.
    Raises:
        ConfigError: another job trains there, or the first host's launcher does not begin.
    """
    if node:
        return _take_beside(run, placement, node, patience_s)
    me = Holder(new_job(), launcher=True, hosts=tuple(placement.ranks))
    renewed, deadline, announced = _renewal(lease_of(run)), time.monotonic() + patience_s, False
    while True:
        try:
            claim = hold(run, me)
            break
        except Held as held:
            alone = held.holder is None or not held.holder.launcher
            if alone or renewed() or time.monotonic() > deadline:
                raise
        if not announced and time.monotonic() > deadline - patience_s + 3 * LEASE_S:
            announced = True
            gone = f"launch: {run}: its launcher is gone; waiting until its ranks have left"
            print(gone, file=sys.stderr, flush=True)
        time.sleep(LEASE_S / 4)
    set_aside_failures(run)
    return claim


def _take_beside(run: Path, placement: Placement, node: int, patience_s: float) -> Claim:
    """Joins the job that the first host's launcher begins; a second launcher of one host is refused."""
    hosts, deadline = tuple(placement.ranks), time.monotonic() + patience_s
    first = lease_of(run)
    renewed = _renewal(first)
    while True:
        current = holder(run)
        if current is not None and renewed() and _text_of(first).split()[:1] == [current.job]:
            if current.hosts != hosts:
                raise Held(run, current)
            return hold(run, Holder(current.job, launcher=True, hosts=hosts), f"{LOCK}-{node}")
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--launcher none: the launcher of {hosts[0]} did not begin in {run} within {patience_s:.0f} s; give "
                "the same command there, with a run folder that all hosts share"
            )
        time.sleep(LEASE_S / 4)
