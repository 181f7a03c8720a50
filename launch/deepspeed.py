"""The `deepspeed` command: composed, run, watched to its end, and its exit code made honest.

    placement = place(hostfile=None)
    words = command("configs/quickstart.yaml", [], placement)
    code = run(words, environment(placement), Path("runs/quickstart/exit.json"))

Why it is watched: `deepspeed` exits with 0 when its inner launcher was killed, and dies of SIGTERM alone; both times
the ranks train on. So the job is a session of its own, the ranks get the signal directly, and the record that rank 0
leaves in the run folder decides together with deepspeed's exit code.
"""

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from data.settings import ConfigError
from launch.hosts import Placement, cores
from pretrain.config import EXIT_PREEMPTED, RunConfig, check_data, check_layout

GRACE_S = 60.0  # for the ranks to save and leave after a signal
STRAGGLER_S = 3.0  # for what is left when there is nothing to save
UNKILLABLE_S = 10.0  # after which a process that survives SIGKILL is reported
POLL_S = 0.1
SITE_HOSTFILE = Path("/job/hostfile")  # deepspeed takes this one unasked, where it exists


def check(cfg: RunConfig, placement: Placement) -> None:
    """Raises ConfigError unless `cfg` can run on `placement` with the data that are prepared."""
    if cfg.run.exists() and not cfg.run.is_dir():
        raise ConfigError(f"run={cfg.run}: the run folder is a file; set another folder with run=FOLDER")
    if cfg.parallel.vocab == "node" and len(set(placement.ranks.values())) > 1:
        hosts = ", ".join(f"{host} {ranks}" for host, ranks in placement.ranks.items())
        raise ConfigError(
            f"parallel.vocab=node: every host must run the same number of ranks, but they run {hosts}. "
            f"Set --num-gpus {min(placement.ranks.values())}, or parallel.vocab=world."
        )
    check_layout(cfg, placement.world, max(placement.ranks.values()))
    check_data(cfg)


def command(
    config: str, overrides: Sequence[str], placement: Placement, *, module: str = "pretrain", port: int | None = None
) -> list[str]:
    """The `deepspeed` command that runs `module` on every rank of `placement`.

    Args:
        config: path of the config, the same on every host.
        overrides: `key=value` settings.
        placement: where the ranks go.
        module: what the ranks run.
        port: where the ranks meet; None: a free one.
    """
    counts = sorted(set(placement.ranks.values()))
    arguments = [config, *overrides]
    if placement.hostfile is not None:
        # force_multi: else deepspeed runs a single remote host's ranks here.
        where = ["--hostfile", str(placement.hostfile), "--force_multi"]
        if len(counts) == 1:
            where += ["--num_gpus", str(counts[0])]
        arguments = [_for_remote_shell(argument) for argument in arguments]
    elif placement.gpus != tuple(range(len(placement.gpus))):
        where = ["--include", "localhost:" + ",".join(map(str, placement.gpus))]
    else:
        where = ["--num_gpus", str(placement.world)]
    if placement.hostfile is None and SITE_HOSTFILE.exists():
        where += ["--hostfile", os.devnull]
    executable = Path(sys.executable).with_name("deepspeed")
    meet = ["--master_port", str(port or free_port())]
    return [
        str(executable),
        *where,
        *meet,
        "--no_local_rank",
        "--log_level",
        "critical",
        "--module",
        module,
        *arguments,
    ]


def environment(placement: Placement) -> dict[str, str]:
    """Variables that the job gets in addition to this process's; what the user has set stays."""
    added = {}
    tools = str(Path(sys.executable).parent)  # ninja, which compiles DeepSpeed's and our C++
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        added["PATH"] = os.environ.get("PATH", os.defpath) + os.pathsep + tools  # last: two ninjas in turn rebuild all
    if placement.hostfile is None and not placement.gpus:
        threads = max(1, cores() // placement.world)  # else every rank starts a thread for every core
        added |= {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    return {name: value for name, value in added.items() if name == "PATH" or name not in os.environ}


def one_line(words: Sequence[str], added: Mapping[str, str]) -> str:
    """The command and its variables as one line that a shell can run."""
    variables = [
        f"PATH=$PATH:{shlex.quote(value.rpartition(os.pathsep)[2])}"
        if name == "PATH"
        else f"{name}={shlex.quote(value)}"
        for name, value in added.items()
    ]
    return " ".join([*variables, shlex.join(words)])


def free_port() -> int:
    """A free port below those that the system hands out by itself, so that it stays free while the ranks start."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError("no free port between 20000 and 32000 on this machine, for the ranks to meet on")


def _for_remote_shell(argument: str) -> str:
    """deepspeed gives arguments to the remote shell bare, or in double quotes if they hold a space."""
    if " " not in argument:
        return shlex.quote(argument)
    for special in "\\$`":
        argument = argument.replace(special, "\\" + special)
    return argument


def check_tools(placement: Placement) -> None:
    """Raises ConfigError unless the programs that the command needs are installed."""
    if not Path(sys.executable).with_name("deepspeed").is_file():
        raise ConfigError(
            f"deepspeed is not installed beside {sys.executable}: run `make setup` and use .venv/bin/python"
        )
    if placement.hostfile is not None and not (shutil.which("pdsh") and shutil.which("ssh")):
        raise ConfigError("--hostfile: deepspeed reaches other hosts with pdsh and ssh; install both on this machine")


def run(
    words: Sequence[str],
    added: Mapping[str, str],
    record: Path,
    *,
    remote: bool = False,
    module: str = "pretrain",
    grace_s: float = GRACE_S,
) -> int:
    """Runs the command to its end and returns an honest exit code; nothing of the job is left running on this machine.

    The first SIGTERM, SIGINT or SIGHUP to this process goes on to the ranks, as one SIGTERM, so that they save and
    leave; the second one kills the job.

    Args:
        words: by `command`.
        added: by `environment`.
        record: the file that rank 0 leaves just before it exits: `{"code": int, "reason": str, "step": int}`.
        remote: the ranks are not on this machine.
        module: what the ranks run.
        grace_s: seconds between the signal and the end of what is left.
    Returns:
        The record's code unless that is 0; else deepspeed's, 128 + signal for a killed rank; 1 if deepspeed says 0 but
        rank 0 left no record; else 0.
    """
    record.unlink(missing_ok=True)  # of an earlier run
    with _signals() as received:
        job = subprocess.Popen(words, env={**os.environ, **added}, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while job.poll() is None and not received:
                time.sleep(POLL_S)
            left = _end(job, received, record, module, remote, grace_s)
        finally:
            _kill(job.pid)
        child = job.wait()
    code, reason = exit_code(child, _read(record), remote)
    if left:
        code, reason = code or 1, f"{reason}; processes that cannot be killed: {left}"
    if code:
        print(f"launch: exit code {code}: {reason}", file=sys.stderr, flush=True)
    return code


def exit_code(child: int, record: Mapping[str, Any] | None, remote: bool = False) -> tuple[int, str]:
    """The job's exit code and why, from deepspeed's (negative: the signal that killed it) and rank 0's record."""
    killed = 256 - child if child > 256 - signal.NSIG else 0  # deepspeed passes a rank's negative code on, modulo 256
    if record is not None and record["code"]:
        reason = f"{record.get('reason')} (step {record.get('step')})"
        if record["code"] == EXIT_PREEMPTED:
            reason += "; the same command goes on from there"
        elif killed:
            reason = f"a rank was killed by {_name(killed)}; rank 0: {reason}"
        return record["code"], reason
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


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(record: Path) -> dict[str, Any] | None:
    """The record; None if there is none, or none that can be read: then it does not tell how the run ended."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("code"), int) else None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask to stop, but for those that are ignored, as under nohup."""
    received: list[int] = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(
    job: subprocess.Popen[bytes], received: list[int], record: Path, module: str, remote: bool, grace_s: float
) -> list[int]:
    """Ends what is left of the job once it was told to stop, or once deepspeed ended; returns what cannot be killed."""
    ranks: list[psutil.Process] = []
    deadline = None
    while True:
        ended, members = job.poll() is not None, _members(job.pid)
        waiting = remote and bool(received) and not record.exists()  # deepspeed does not wait for the other hosts
        if ended and not members and (not waiting or (deadline is not None and time.monotonic() > deadline)):
            return []
        if deadline is None:
            ranks = _tell(job, members, module, remote)
            deadline = time.monotonic() + (grace_s if ranks or waiting else STRAGGLER_S)
        elif ended and not waiting and not set(ranks) & set(members):  # helpers, whose ranks have left
            deadline = min(deadline, time.monotonic() + STRAGGLER_S)
        late = time.monotonic() - deadline
        if len(received) > 1 or late > 0:
            _kill(job.pid)
        if late > UNKILLABLE_S:
            return [process.pid for process in members]
        time.sleep(POLL_S)


def _tell(
    job: subprocess.Popen[bytes], members: list[psutil.Process], module: str, remote: bool
) -> list[psutil.Process]:
    """Tells the job to stop; returns the ranks on this machine that were told."""
    if remote and job.poll() is None:
        print("launch: telling the hosts to stop; a second signal kills", file=sys.stderr, flush=True)
        job.send_signal(signal.SIGTERM)
        return []
    ranks = _ranks(members, module)
    if ranks:
        why = "" if job.poll() is None else "deepspeed ended without its ranks; "
        told = f"launch: {why}telling {len(ranks)} ranks to save and stop; a second signal kills"
        print(told, file=sys.stderr, flush=True)
    for process in ranks or members:
        with suppress(psutil.Error):
            process.terminate()
    return ranks


def _members(session: int) -> list[psutil.Process]:
    """The living processes of a session, orphans included."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _ranks(members: Sequence[psutil.Process], module: str) -> list[psutil.Process]:
    """Those that run `-m module`, without the helpers that they forked, which have the same command line."""
    found = {}
    for process in members:
        with suppress(psutil.Error):
            if ("-m", module) in pairwise(process.cmdline()):
                found[process.pid] = (process, process.ppid())
    return [process for process, parent in found.values() if parent not in found]


def _kill(session: int) -> None:
    for process in _members(session):
        with suppress(psutil.Error):
            process.kill()
