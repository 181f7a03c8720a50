"""Processes of this host: those of a session, and those that run a module."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from contextlib import suppress

import psutil


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session, those that lost their parent included."""
    living = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def running_module(processes: Iterable[psutil.Process], module: str) -> list[psutil.Process]:
    """Those that run `python -m MODULE`, without what they forked, which has the same command line."""
    parents = {}
    for process in processes:
        with suppress(psutil.Error):
            if ("-m", module) in itertools.pairwise(process.cmdline()):
                parents[process] = process.ppid()
    pids = {process.pid for process in parents}
    return [process for process, parent in parents.items() if parent not in pids]


def kill(processes: Iterable[psutil.Process]) -> None:
    """Sends SIGKILL to those that still run; the others are left out."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
