"""A `deepspeed` command run, watched to its end, and its exit code made honest.

Why it is watched: `deepspeed` exits with 0 when its inner launcher was killed, and dies of SIGTERM alone; both times
the ranks train on. So the job is a session of its own, the ranks are told to stop by a signal of ours (or by the lease,
a file in the run folder that they read, where they are on other hosts), and what the job's own ranks leave in the run
folder decides together with deepspeed's exit code. deepspeed's launchers never hear a signal that asks to stop: theirs
to it is to kill each rank that has not left within 30 s, however long a step takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from common.exits import EXIT_BAD_INPUT, EXIT_PREEMPTED
from common.output import is_abandoned
from common.processes import kill, running_module
from common.processes import members as members_of
from launch import failures
from launch.hosts import Placement
from launch.lease import Lease, lease_of
from launch.reach import ask
from pretrain.runtime.claim import Claim
from pretrain.runtime.endings import CUT_OFF, FAILURES, Exit, read_exit, read_failures

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # ask to stop
GRACE_S = 90.0  # for the ranks to save and leave after a signal: checkpoint.stop_s
STRAGGLER_S = 3.0  # for what is left when there is nothing to save
FAILED_S = 20.0  # from the first rank's failure to the end of all: those that can end themselves need 15
REFUSED_S = 5.0  # where that rank refused what it was given: those that it did not meet wait for it
UNKILLABLE_S = 10.0  # after which a process that survives SIGKILL is reported
RECORD_S = 10.0  # for rank 0's record to show up in a run folder that another host writes
POLL_S = 0.1
SSH_FAILED = 255  # ssh's code for itself


@dataclass(frozen=True)
class End:
    """How a job ended."""

    code: int
    reason: str
    told: bool  # this launcher was told to stop
    cut_off: bool = False  # stopped after a save though nobody asked: the way to the ranks was lost


DONE = End(0, "done", told=False)


def run(
    words: Sequence[str],
    added: Mapping[str, str],
    claim: Claim,
    placement: Placement,
    *,
    node: int | None = None,
    module: str = "pretrain",
    grace_s: float = GRACE_S,
) -> End:
    """Runs the command to its end; nothing of the job is left running on this machine, nor, a few seconds later, on
    others.

    The first SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this process goes on to the ranks so that they save and leave; the
    second one kills the job.

    Args:
        words: by `command`.
        added: by `environment`.
        claim: on the run folder, by `take`. Rank 0 leaves `exit.json` in it before it exits,
            `{"job": str, "code": int, "reason": str, ...}`, and a rank that fails a record in `failures/`.
        placement: where the ranks are.
        node: this launcher starts the ranks of this host alone, and other hosts have launchers of their own; None: of
            all hosts.
        module: what the ranks run.
        grace_s: seconds between the signal and the end of what is left.
    Returns:
        The code is rank 0's record's unless that is 0; else deepspeed's, 128 + signal for a killed rank; 1 if deepspeed
        says 0 but rank 0 left no record, or a rank failed; 2 if the first rank that failed says so; 1 if a launcher of
        deepspeed's was killed, though the ranks saved; else 0.
    """
    remote = placement.hostfile is not None and node is None
    with _signals() as received, Lease(lease_of(claim.run, node), claim.job) as lease:
        with _blocked():
            job = subprocess.Popen(words, env={**os.environ, **added}, stdin=subprocess.DEVNULL, start_new_session=True)
        left: list[int] = []
        try:
            if _wait(job, received, claim):
                left = _end(job, received, lease, claim, module, remote, grace_s)
        finally:
            kill(members_of(job.pid))
        child = job.wait()
        if remote and _is_lost(child):  # ssh or pdsh may be what ended, and the ranks train on
            _await_record(claim, lease, received, grace_s)
    found = _record_of(claim, RECORD_S if (remote or bool(node)) and (child == 0 or received) else 0)
    code, reason = exit_code(child, found, remote, received)
    if code not in (0, EXIT_PREEMPTED) or (code == 0 and read_failures(claim.run, claim.job)):
        gone = _reap(placement, claim.job) if remote else frozenset()
        code, reason = _explained(code, reason, claim, placement, gone)
    if left:
        code, reason = code or 1, f"{reason}; processes that cannot be killed: {left}"
    if code:
        print(f"launch: exit code {code}: {reason}", file=sys.stderr, flush=True)
    cut_off = not received and found is not None and found.code == EXIT_PREEMPTED and _is_lost(child)
    return End(code, reason, bool(received), cut_off)


@contextmanager
def _blocked() -> Iterator[None]:
    """What is started here never gets a signal that asks to stop, unless it unblocks them, as ranks do."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(job: subprocess.Popen[bytes], received: list[int], claim: Claim) -> bool:
    """Waits until deepspeed ends or a signal comes; False if a rank failed and the rest did not end in time.

    A reader of this launcher's output that has gone asks to stop, as SIGPIPE would.
    """
    failed = looked = None
    limit_s = FAILED_S
    while job.poll() is None and not received:
        now = time.monotonic()
        if looked is None or now - looked > 1:
            looked = now
            failures = read_failures(claim.run, claim.job) if failed is None else []
            if failures:
                failed, limit_s = now, REFUSED_S if failures[0].code == EXIT_BAD_INPUT else FAILED_S
            if is_abandoned():
                received.append(signal.SIGPIPE)
        if failed is not None and now - failed > limit_s:
            print(f"launch: {limit_s:.0f} s after a rank failed, killing the others", file=sys.stderr, flush=True)
            return False
        time.sleep(POLL_S)
    return True


def _reap(placement: Placement, job: str) -> frozenset[str]:
    """Ends what is left of the job on its hosts; returns the hosts that do not answer, where it ends by itself."""
    answers = ask(list(placement.ranks), ["-m", "launch.reap", job])
    return frozenset(host for host, answer in answers.items() if isinstance(answer, str))


def _explained(code: int, reason: str, claim: Claim, placement: Placement, gone: Set[str]) -> tuple[int, str]:
    """Prints who failed first, with the traceback; returns the job's code and reason with that known."""
    verdict = failures.first(read_failures(claim.run, claim.job), placement, gone)
    if verdict is None:
        return code, reason
    if verdict.traceback and verdict.code != EXIT_BAD_INPUT:
        print(f"launch: rank {verdict.rank} on {verdict.host}:\n{verdict.traceback.rstrip()}", file=sys.stderr)
    if placement.world > 1:
        print(f"launch: what each rank left is in {claim.run / FAILURES}", file=sys.stderr, flush=True)
    if verdict.code == EXIT_BAD_INPUT:
        return EXIT_BAD_INPUT, str(verdict)
    return code or 1, str(verdict) if code in (0, 1) else f"{reason}; {verdict}"


def exit_code(child: int, record: Exit | None, remote: bool = False, told: Sequence[int] = ()) -> tuple[int, str]:
    """The job's exit code and why, from deepspeed's (negative: the signal that killed it) and rank 0's record.

    Args:
        record: None: rank 0 left none of this job.
        remote: whether the ranks are on hosts of a hostfile, reached by this launcher.
        told: the signals that told this launcher to stop; of several, the second had the job killed.
    """
    cut = remote and (child == SSH_FAILED or (record is not None and record.reason.startswith(CUT_OFF)))
    # deepspeed passes a rank's negative code on, modulo 256
    killed = 256 - child if child > 256 - signal.NSIG and not cut else 0
    if record is not None and record.code:
        reason = record.reason
        if record.step is not None:
            reason += f" (step {record.step})"
        if record.code == EXIT_PREEMPTED:
            if not told and _is_lost(child) and not cut:
                return 1, f"a launcher of deepspeed's was killed; the ranks saved and left: {reason}"
            reason += "; the same command goes on from there"
        elif killed:
            reason = f"a rank was killed by {_name(killed)}; rank 0: {reason}"
        return record.code, reason
    if remote and child == SSH_FAILED:
        return 1, "the connection to a host failed, or ended"
    if child == -signal.SIGKILL and told:  # by this launcher
        if record is not None:
            return 0, "done"  # the ranks had left, and deepspeed was slow to follow
        if len(told) == 1:
            return 128 + told[0], f"stopped by {_name(told[0])}, and killed before there was anything saved"
        return 128 - child, "killed by a second signal, without a save"
    if child < 0:
        return 128 - child, f"deepspeed was killed by {_name(-child)}"
    if killed:
        return 128 + killed, f"a rank was killed by {_name(killed)}"
    if child:
        return child, "a rank failed; its traceback is above"
    if record is None:
        reason = "deepspeed reports success, but rank 0 left no record of its end"
        if remote:
            reason += "; the run folder must be one that this machine shares with the first host"
        return 1, reason
    return 0, "done"


def _is_lost(child: int) -> bool:
    """Whether deepspeed's exit code is not that of ranks which saved: it, or ssh, was killed or ended before them."""
    return child <= 0 or child in (SSH_FAILED, 128 + signal.SIGKILL)


def _await_record(claim: Claim, lease: Lease, received: list[int], patience_s: float) -> None:
    """Tells ranks that may train on to save and leave, and waits for the record of the first; a signal ends that."""
    if not _have_left_words(claim):
        print("launch: the way to the ranks is lost; telling them to save and stop", file=sys.stderr, flush=True)
        lease.stop()
        deadline, told = time.monotonic() + patience_s, len(received)
        while _read(claim) is None and len(received) == told and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _record_of(claim: Claim, patience_s: float) -> Exit | None:
    """The job's record, waited for if another host writes it."""
    deadline = time.monotonic() + patience_s
    while (record := _read(claim)) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return record


def _read(claim: Claim) -> Exit | None:
    """The job's record; None if there is none of it: then it does not tell how the run ended."""
    record = read_exit(claim.run)
    return record if record is not None and record.job == claim.job else None


def _have_left_words(claim: Claim) -> bool:
    """Whether a rank of the job has ended, and said so."""
    return _read(claim) is not None or bool(read_failures(claim.run, claim.job))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask to stop, but for those that are ignored, as under nohup."""
    received: list[int] = []
    before = {}
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(
    job: subprocess.Popen[bytes],
    received: list[int],
    lease: Lease,
    claim: Claim,
    module: str,
    remote: bool,
    grace_s: float,
) -> list[int]:
    """Ends what is left of the job once it was told to stop, or once deepspeed ended; returns what cannot be killed."""
    ranks: list[psutil.Process] = []
    deadline = None
    while True:
        ended, members = job.poll() is not None, members_of(job.pid)
        if ended and not members:
            return []
        if deadline is None:
            ranks = _tell(job, members, lease, module, remote)
            patience_s = grace_s if ranks or remote else STRAGGLER_S
            if not (ranks or remote or ended or _have_left_words(claim)):
                patience_s = 0.0  # deepspeed, left alone, would start them yet
            deadline = time.monotonic() + patience_s
        elif ended and not remote and not set(ranks) & set(members):  # helpers, whose ranks have left
            deadline = min(deadline, time.monotonic() + STRAGGLER_S)
        late = time.monotonic() - deadline
        if len(received) > 1 or late > 0:
            kill(members_of(job.pid))
        if late > UNKILLABLE_S:
            return [process.pid for process in members]
        time.sleep(POLL_S)


def _tell(
    job: subprocess.Popen[bytes], members: list[psutil.Process], lease: Lease, module: str, remote: bool
) -> list[psutil.Process]:
    """Tells the job to stop; returns the ranks on this machine that were told."""
    ranks = [] if remote else running_module(members, module)
    if ranks or remote:
        why = "" if job.poll() is None else "deepspeed ended without its ranks; "
        whom = "the hosts" if remote else f"{len(ranks)} ranks"
        print(f"launch: {why}telling {whom} to save and stop; a second signal kills", file=sys.stderr, flush=True)
    if remote:
        lease.stop()
        return []
    for process in ranks or members:
        with suppress(psutil.Error):
            process.terminate()
    return ranks
