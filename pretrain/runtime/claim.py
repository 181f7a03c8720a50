"""One job at a time in a run folder: its lock, and who holds it.

Whoever writes in a run folder holds its lock first, or is of the job that does. A job that `overtone run` started holds
it by its launcher and by its first rank, any other by its first rank: the folder is free when these processes have
ended, however they did. What the ranks leave there of their end carries the job's id, so that it is never taken for
another's.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from common.errors import ConfigError
from common.files import SMALL_BYTES, check_writable, lock, read_bounded, unwritable
from common.strict_json import from_json, to_json
from common.variables import JOB_VARIABLE

LOCK = "lock"  # in the run folder; its first line is the `Holder`, the second the first rank of a launcher's job
STOP = "stop"  # what a launcher's lease says when its ranks are to save and leave


def _command() -> str:
    """This process's command, as one would give it again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


@dataclass(frozen=True)
class Holder:
    """Who took a run folder last: the lock tells whether it still has it."""

    job: str
    launcher: bool  # and not the first rank itself
    hosts: tuple[str, ...] = ()  # a launcher's
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    command: str = field(default_factory=_command)
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))


class Held(ConfigError):
    """Another job has the run folder: `holder`, None if it does not say who it is."""

    def __init__(self, run: Path, holder: Holder | None) -> None:
        who = ""
        if holder is not None:
            who = f": `{holder.command}`, process {holder.pid} on {holder.host} since {holder.since}"
        left = ", or ranks whose launcher was killed still do" if holder is None or holder.launcher else ""
        super().__init__(
            f"{run}: another job trains in this folder{who}{left}. Nothing of it was touched. Wait for it, end its "
            "processes, or give another folder (run=...)"
        )
        self.holder = holder


class Claim:
    """A hold on a run folder for the job `job`; it ends with `release`, the `with`, or this process."""

    def __init__(self, run: Path, job: str, file: TextIO, joined: bool) -> None:
        self.run, self.job = run, job
        self.joined = joined  # a launcher has the folder for this job
        self._file = file

    def release(self) -> None:
        """Lets others have the folder: the lock goes with its file."""
        self._file.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(run: Path, me: Holder, name: str = LOCK) -> Claim:
    """Takes a run folder, or joins the launcher that has it for the same job; touches nothing of anybody else's.

    Args:
        me: who takes it.
        name: of the lock, where each host has a launcher of its own and all but the first have one beside.
    Raises:
        Held: another job has it.
        ConfigError: it cannot be written.
    """
    fresh = not os.path.exists(run)
    if fresh:
        check_writable(run)  # or a folder would be made in vain
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / name).open("a+", encoding="utf-8")  # what is in it stays until the lock is held
        try:
            if lock(file):
                if not fresh:
                    check_writable(run)
                file.truncate(0)
                file.write(to_json(asdict(me)) + "\n")
                joined = False
            elif not me.launcher and lock(file, shared=True) and _awaits(file, me.job):
                file.write(to_json({"rank": 0, "host": me.host, "pid": me.pid}) + "\n")
                joined = True
            else:
                raise Held(run, holder(run, name))
            file.flush()
            if not lock(file, shared=True):  # so that the first rank can join
                raise Held(run, holder(run, name))
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise unwritable(run, error) from None
    return Claim(run, me.job, file, joined)


def _awaits(file: TextIO, job: str) -> bool:
    """Whether the launcher that has the lock has it for this job, whose first rank did not come yet."""
    file.seek(0)
    lines = file.read(SMALL_BYTES).splitlines()
    first = _read(lines[0]) if len(lines) == 1 else None
    return first is not None and first.launcher and first.job == job


def holder(run: Path, name: str = LOCK) -> Holder | None:
    """Who took a run folder last; None if nobody did, or did not say."""
    try:
        return _read(read_bounded(run / name, SMALL_BYTES).decode().partition("\n")[0])
    except (OSError, ValueError):
        return None


def _read(line: str) -> Holder | None:
    try:
        values = from_json(line)
        return Holder(**{**values, "hosts": tuple(values["hosts"])})
    except (ValueError, TypeError, KeyError):
        return None


def may_write(run: Path, job: str | None) -> bool:
    """Whether a job was the last to take a run folder: a process of it that does not hold the lock may write there."""
    last = holder(run)
    return last is not None and last.job == job


def new_job() -> str:
    """An id that no other job has."""
    return uuid.uuid4().hex


def job_of(environment: Mapping[str, str]) -> str | None:
    """The job that this process is of, by what the launcher said; None if there is no launcher of ours.

    Raises:
        ConfigError: it is no name.
    """
    job = environment.get(JOB_VARIABLE)
    if job is not None and not re.fullmatch(r"[0-9A-Za-z_-]+", job):
        raise ConfigError(
            f"{JOB_VARIABLE}={job!r}: expected letters, digits and dashes, as `overtone run` sets it; `unset` it"
        )
    return job
