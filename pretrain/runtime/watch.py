"""Every rank's watch over the others, so that nothing hangs: a rank that waits for what is gone ends itself.

A thread looks every second for what says that the job is over:

- another rank has failed, or shows no sign of life (rank 0 keeps the signs, in the store where the ranks met);
- rank 0, its host or the network to it is gone;
- this rank's main thread did not get on in the time that it was given (`timeouts` in the config);
- the launcher asks to stop, has ended the job, or is gone, which its lease tells: a file in the run folder that it
  rewrites every second and removes at the end. deepspeed's launcher on this host is gone: the parent is another. Nobody
  reads what this rank prints: the connection to its host has ended.

A launcher that is gone is no failure of training: the rank tells itself to save and stop, as after SIGTERM. All else
ends the process with code 1. What it knows is then in `failures/rank-N.json` (a `Failure`) and, unless the failure is
its own exception, `failures/rank-N.stacks`; the launcher reads who failed first from them. A rank whose job does not
have the run folder leaves nothing there. If not even the thread gets on, another process ends this one (`guardian.py`).
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_PREEMPTED
from common.files import SMALL_BYTES, read_bounded
from common.output import is_abandoned
from common.strict_json import to_json
from common.variables import LEASE_VARIABLE
from pretrain.config import RunConfig
from pretrain.runtime.agreement import sees
from pretrain.runtime.claim import STOP, Claim, Holder, hold, job_of, may_write, new_job
from pretrain.runtime.endings import (
    CUT_OFF,
    FAILURES,
    Failure,
    launched_run,
    leave_exit,
    leave_failure,
    set_aside_failures,
)
from pretrain.runtime.guardian import Guardian
from pretrain.runtime.rendezvous import why_apart

BEAT_S = 1.0  # between two signs of life, and two looks
LOST_S = 3.0  # after which a store that refuses is gone, and rank 0 with it
FIRST = 3  # times as long a silence is borne until the first step is done: libraries that are loaded hold Python's lock
LEAVE_S = 5.0  # for the record to be written, on a file system that may be gone too
SECOND_S = 2.5  # that who merely lost another ends after it: deepspeed looks every second, and tells one rank's code
LINGER_S = 4.0  # that rank 0 keeps the store for the others to read in it why they end

# Where a stack is, and the phase that it is in: the first line that fits any of its frames.
PHASES: tuple[tuple[str, str | None, str], ...] = (
    ("pretrain/runtime/meeting.py", None, "rendezvous"),
    ("pretrain/runtime/ranks.py", "start", "rendezvous"),
    ("pretrain/runtime/ranks.py", "with_groups", "rendezvous"),
    ("pretrain/checkpoints/saver.py", None, "save"),
    ("pretrain/loop.py", "finish_save", "save"),
    ("pretrain/checkpoints/resume.py", None, "load"),
    ("pretrain/checkpoints/loading.py", None, "load"),
    ("torch/distributed/", None, "collective"),
    ("model/vocab_parallel.py", None, "collective"),  # waits for what it began before
    ("deepspeed/comm/", None, "collective"),
    ("pretrain/batches.py", None, "data"),
    ("data/shards.py", None, "data"),
    ("pretrain/analysis/scoring.py", None, "evaluation"),
    ("deepspeed/runtime/", "backward", "backward"),
    ("deepspeed/runtime/", "step", "update"),
    ("pretrain/engine.py", "train_step", "forward"),
    ("pretrain/loop.py", "train", "loop"),
)
COLLECTIVE_ERRORS = (
    *("gloo/transport", "Gloo", "NCCL", "ProcessGroup", "TCPStore"),
    *("Connection closed by peer", "Connection reset by peer", "recvValue failed"),
)


def phase_of(stack: Iterable[tuple[str, str]]) -> str:
    """The phase of training that a stack of (file, function) is in; `start` before there is any."""
    frames = [(file.replace(os.sep, "/"), function) for file, function in stack if function != "<module>"]
    for part, function, phase in PHASES:
        if any(part in file and function in (None, name) for file, name in frames):
            return phase
    return "start"


def _is_collective(error: BaseException, phase: str) -> bool:
    """Whether an exception says that another rank is gone, rather than that this one failed."""
    of_torch = type(error).__module__ == "torch.distributed"  # DistStoreError and its like
    return of_torch or phase == "collective" or any(word in str(error) for word in COLLECTIVE_ERRORS)


@dataclass(frozen=True)
class Stopping:
    """A stop that a watch asked its rank for: nobody sent a signal."""

    reason: str
    code: int  # that the run ends with once it has saved


class _Sign(threading.Thread):
    """Asks for a sign of life every second, in a thread of its own because the asking may block for ever."""

    def __init__(self, name: str, ask: Callable[[], bool]) -> None:
        super().__init__(name=name, daemon=True)
        self._ask, self._over = ask, threading.Event()
        self.heard = time.monotonic()
        self.error: Exception | None = None  # of the last asking

    def run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if self._ask():
                    self.heard = time.monotonic()
                self.error = None
            except Exception as problem:  # what it means is decided by who looks
                self.error = problem
                if isinstance(problem, RuntimeError):  # of the store, which does not connect again
                    return

    def silent_s(self) -> float:
        return time.monotonic() - self.heard

    def leave(self) -> None:
        self._over.set()
        self.join(BEAT_S)


class Watch:
    """This rank's watch; it begins with the `with`, before torch is imported, and ends with it.

    An exception that leaves the `with` is recorded and ends the process.
    """

    def __init__(self, cfg: RunConfig, environment: Mapping[str, str]) -> None:
        self.cfg = cfg
        self.rank, self.world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        self.host = socket.gethostname()
        self.job = job_of(environment)  # None: not known yet
        self._claim: Claim | None = None  # on the first rank
        self._parent = os.getppid() if "RANK" in environment else None  # by hand, the shell may end before
        lease = environment.get(LEASE_VARIABLE)
        first_here = environment.get("LOCAL_RANK", "0") == "0"
        self._lease = Path(lease) if lease and first_here else None
        self._lease_words: list[str] = []  # its owner, and a count or STOP
        self._owner = self.job  # of the lease; None: whoever it is when this rank begins
        self._lease_sign: _Sign | None = None
        self._beat: _Sign | None = None
        self._told: Failure | None = None  # by another rank
        self._heard: dict[int, tuple[bytes, float]] = {}  # on rank 0: the last sign of each other rank, and when
        self._mark, self._limit_s = time.monotonic(), cfg.timeouts.rendezvous_s
        self._leaving = False
        self._have_met = False  # until the first pulse that sets a limit
        self._starting = True  # until the first pulse after the ranks have joined that sets a limit
        self.stopping: Stopping | None = None  # what this watch asked its rank for
        self._stop_by = float("inf")
        self._meeting = {name: environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
        self._guardian: Guardian | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._ending = threading.Lock()
        self._store: Any = None

    def __enter__(self) -> Watch:
        if self.job is not None:
            with suppress(ConfigError):  # which is told once the input was checked
                self.hold()
        if self._lease is not None and self._lease.exists():
            with suppress(OSError, ValueError, IndexError):  # the sign tells of that
                self._read_lease()  # before any other start could replace it
            self._lease_sign = _Sign("lease", self._read_lease)
            self._lease_sign.start()
        if self.world > 1:
            self._guardian = Guardian(f"rank {self.rank} on {self.host}")
            self._reassure()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self.fail(error)
        self._over.set()
        for thread in (self._beat, self._lease_sign):
            if thread is not None:
                thread.leave()
        self._thread.join(BEAT_S)
        faulthandler.cancel_dump_traceback_later()
        if self._guardian is not None:
            self._guardian.dismiss()
        if self._claim is not None:
            self._claim.release()

    def hold(self) -> None:
        """Takes the run folder for this rank's job, on the first rank; the others are to be told its id.

        Raises:
            ConfigError: another job has it, it cannot be written, or the launcher has another one on its machine.
        """
        if self.rank == 0 and self._claim is None:
            self._check_lease()
            job, self.job = self.job or new_job(), None  # whoever is refused is of no job, whatever the variable says
            self._claim = hold(self.cfg.run, Holder(job, launcher=False))
            self.job = job
            if not self._claim.joined:
                set_aside_failures(self.cfg.run)

    def _check_lease(self) -> None:
        """Raises ConfigError if the launcher's lease is not here: its run folder is another, and what the ranks leave
        of their end would never reach it.
        """
        if self._lease is None or sees(self._lease):
            return
        raise ConfigError(
            f"run={self.cfg.run}: on {self.host} there is no {self._lease.name}, which the launcher keeps in its run "
            f"folder ({LEASE_VARIABLE}={self._lease}). Put the run folder on storage that the machine where you launch "
            f"and all hosts share; or, if no launcher runs, `unset {LEASE_VARIABLE}`"
        )

    def join(self, address: str, port: int) -> None:
        """Shows signs of life from here on, in the store at `address` where the ranks have met."""
        if self.world == 1:
            return
        from torch.distributed import TCPStore

        # A client of its own: the process group's one is blocked while a group is made.
        timeout = timedelta(seconds=FIRST * self.cfg.timeouts.heartbeat_s)
        self._starting = True
        self._store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._show()
        now = time.monotonic()
        self._heard = {rank: (b"", now) for rank in range(1, self.world)} if self.rank == 0 else {}
        self._beat = _Sign("beat", self._show)
        self._beat.start()

    def pulse(self, limit_s: float | None = None) -> None:
        """The main thread gets on; the next pulse comes within `limit_s` (None: as was said before)."""
        self._mark = time.monotonic()
        if limit_s is not None:
            self._limit_s = limit_s
            self._starting, self._have_met = False, True
            self._reassure()

    def _silence_s(self) -> float:
        """For how long another rank, or this one's threads, may show no sign of life."""
        return self.cfg.timeouts.heartbeat_s * (FIRST if self._starting else 1)

    def _reassure(self) -> None:
        """Tells the guardian that this rank lives, and how long it may be silent."""
        if self._guardian is not None:
            before_s = 0.0 if self._beat is not None else self.cfg.timeouts.rendezvous_s
            self._guardian.hear(max(before_s, self._silence_s() + LEAVE_S + LOST_S))

    def leave(self) -> None:
        """The work is done: from here on, ranks that go are no loss. What is left to do has the time of a pass."""
        self._leaving = True
        self.pulse(self.cfg.timeouts.collective_s)

    def fail(self, error: BaseException, code: int = 1) -> NoReturn:
        """Records an exception of the main thread, tells the other ranks, and ends the process with `code`."""
        frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
        phase = phase_of(frames)
        text = "".join(traceback.format_exception(error))
        kind = "collective" if code == 1 and _is_collective(error, phase) else "error"
        if kind == "collective" and phase not in ("rendezvous", "save"):
            phase = "collective"
        what = str(error) if code != 1 else "".join(traceback.format_exception_only(error)).strip()
        if code == 1:
            print(text, file=sys.stderr, flush=True)
        self._end(kind, what, phase=phase, text=text, code=code)

    # ---- the thread that looks

    def _look(self) -> None:
        while not self._over.wait(BEAT_S):
            self._reassure()
            if self._beat is not None:  # if not even this thread gets on, nothing in Python can end the process
                faulthandler.dump_traceback_later(self._silence_s() + LEAVE_S, exit=True)
            self._look_up()
            if self._told is not None:
                told = self._told
                self._end("told", f"ended because rank {told.rank} on {told.host} {_did(told)}", [told.rank])
            self._look_around()
            late_s = time.monotonic() - self._mark
            if self.world > 1 and late_s > self._limit_s:
                late = "stuck", f"did not get on for {late_s:.0f} s"
                self._end(*(late if self._have_met else why_apart(self._meeting, self.host, late_s)))

    def _look_up(self) -> None:
        """At the launchers: asks this rank to stop if one is gone, and ends it if it does not."""
        silent_s = 0.0 if self._lease_sign is None else self._lease_sign.silent_s()
        if self._lease_sign is not None and isinstance(self._lease_sign.error, FileNotFoundError):
            self._end("told", "the launcher ended the job")
        if self._lease_words[:1] not in ([], [self._owner]):
            self._stop("the launcher is gone, and another one has begun")
        elif self._lease_words[1:] == [STOP]:
            self._stop("the launcher asked to stop", patient=True)  # which ends the job when it has waited enough
        elif silent_s > self.cfg.timeouts.heartbeat_s:
            self._stop(f"no sign of life from the launcher for {silent_s:.0f} s")
        elif self._parent is not None and os.getppid() != self._parent:
            self._stop(f"deepspeed's launcher on {self.host} was killed", code=1)
        elif is_abandoned():
            self._stop(f"{CUT_OFF} {self.host} ended: nobody reads what its ranks print")
        if self.stopping is not None and time.monotonic() > self._stop_by:
            self._end("told", f"{self.stopping.reason}, and no save within {self.cfg.checkpoint.stop_s:.0f} s")

    def _look_around(self) -> None:
        """At the other ranks."""
        if self._beat is None or self._leaving:
            return
        limit_s = self._silence_s()
        silent_s = self._beat.silent_s()
        if silent_s > (LOST_S if self._beat.error else limit_s):
            why = f": {self._beat.error}" if self._beat.error else ""
            self._end("lost", f"rank 0 cannot be reached for {silent_s:.0f} s{why}", [0])
        now = time.monotonic()
        quiet = [rank for rank, (_, heard) in list(self._heard.items()) if now - heard > limit_s]
        if quiet:
            names = ", ".join(map(str, quiet))
            self._end("lost", f"no sign of life from rank {names} for {limit_s:.0f} s", quiet)

    def _stop(self, reason: str, code: int = EXIT_PREEMPTED, patient: bool = False) -> None:
        if self.stopping is None:
            self.stopping = Stopping(reason, code)
            self._stop_by = float("inf") if patient else time.monotonic() + self.cfg.checkpoint.stop_s
            print(f"rank {self.rank} on {self.host}: {reason}; saving and stopping", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _read_lease(self) -> bool:
        assert self._lease is not None
        before, self._lease_words = self._lease_words, read_bounded(self._lease, SMALL_BYTES).decode().split()
        self._owner = self._owner or self._lease_words[0]
        return self._lease_words != before

    def _show(self) -> bool:
        """This rank's sign of life; reads whether another has failed and, on rank 0, the others' signs."""
        self._store.set(f"watch/beat/{self.rank}", repr(time.monotonic()))
        if self._store.check(["watch/failed"]):
            self._told = Failure(**json.loads(self._store.get("watch/failed")))
        names = {f"watch/beat/{rank}": rank for rank in self._heard}
        if names and not self._store.check(list(names)):
            names = {name: rank for name, rank in names.items() if self._store.check([name])}
        if names:
            for rank, sign in zip(names.values(), self._store.multi_get(list(names)), strict=True):
                if sign != self._heard[rank][0]:
                    self._heard[rank] = (sign, time.monotonic())
        return True

    # ---- the end

    def _end(
        self, kind: str, error: str, suspects: Sequence[int] = (), phase: str = "", text: str = "", code: int = 1
    ) -> NoReturn:
        """Leaves the record, tells the others, and ends the process: politeness would wait for who is gone."""
        if not self._ending.acquire(blocking=False):
            while True:  # the other thread is at it
                time.sleep(1)
        if not phase:
            main = sys._current_frames().get(threading.main_thread().ident or 0)
            phase = phase_of(
                (frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_stack(main)
            )
            text = "".join(traceback.format_stack(main))
        failure = Failure(self.rank, self.host, time.time(), kind, phase, error, text, code, list(suspects), self.job)
        if kind not in ("error", "told"):
            print(f"rank {self.rank} on {self.host}, in {phase}: {error}", file=sys.stderr, flush=True)
        for work in (self._leave, self._tell):
            thread = threading.Thread(target=work, args=(failure,), daemon=True)
            thread.start()
            thread.join(LEAVE_S)
        sys.stdout.flush()
        if kind == "collective":
            time.sleep(SECOND_S)
        for child in multiprocessing.active_children():  # they would live on: Zeus has one for the CPU's counters
            child.terminate()
        os._exit(code)

    def _leave(self, failure: Failure) -> None:
        folder = self.cfg.run / FAILURES
        if failure.job is None or not may_write(self.cfg.run, failure.job):
            return
        if failure.kind not in ("error", "collective"):
            folder.mkdir(exist_ok=True)
            with (folder / f"rank-{self.rank}.stacks").open("w") as file:
                faulthandler.dump_traceback(file)
        leave_failure(self.cfg.run, failure)
        if self.rank == 0 and failure.code != EXIT_BAD_INPUT:  # a job that was refused is no end of the run
            leave_exit(self.cfg.run, failure.job, failure.code, failure.error, None)

    def _tell(self, failure: Failure) -> None:
        if self._store is None:
            return
        with suppress(Exception):  # the store may be what is gone
            short = to_json(asdict(failure) | {"traceback": ""})
            self._store.compare_set("watch/failed", "", short)
            ended = self._store.add("watch/ended", 1)
            deadline = time.monotonic() + LINGER_S
            while self.rank == 0 and ended < self.world and time.monotonic() < deadline:
                time.sleep(0.1)
                ended = self._store.add("watch/ended", 0)


def leave_refusal(environment: Mapping[str, str], rank: int, error: ConfigError) -> None:
    """Records that a rank refused its config, in the run folder of its launcher: its own cannot be known."""
    run = launched_run(environment)
    with suppress(ConfigError, OSError):
        job = job_of(environment)
        if run is not None and job is not None and may_write(run, job):
            now, host = time.time(), socket.gethostname()
            failure = Failure(rank, host, now, "error", "start", str(error), "", EXIT_BAD_INPUT, [], job)
            leave_failure(run, failure)


def _did(failure: Failure) -> str:
    if failure.kind == "lost":
        return f"said: {failure.error}"
    return f"failed in {failure.phase}: {failure.error.splitlines()[0] if failure.error else ''}"
