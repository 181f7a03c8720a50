"""Asks hosts over ssh, all at once, what launch/probe.py says there; one that does not answer is named in seconds."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.checkout import python_path
from common.errors import ConfigError
from launch.hosts import Placement, unfit
from launch.probe import MARK

CONNECT_S = 8  # for a host to accept the connection
ANSWER_S = 60.0  # for Python to start there
# ssh takes the first value that it is given for an option: the user's, in PDSH_SSH_ARGS_APPEND, go before these. Ours
# never ask for a password, and bear a minute of silence: a host that is gone is noticed sooner by the other ranks.
SSH_OPTIONS = ("BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=5", "ServerAliveCountMax=12")
Facts = dict[str, Any]


def ssh_arguments() -> str:
    """What pdsh adds to its ssh commands: the user's PDSH_SSH_ARGS_APPEND, then ours. Raises ConfigError if the former
    is malformed.
    """
    ours, users = " ".join(f"-o {option}" for option in SSH_OPTIONS), os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    try:
        shlex.split(users)
    except ValueError as error:
        raise ConfigError(
            f"PDSH_SSH_ARGS_APPEND={users}: not arguments as a shell reads them ({error}); mend it, or unset it"
        ) from None
    return f"{users} {ours}".strip()


def ask(hosts: Sequence[str], words: Sequence[str] = ("-m", "launch.probe")) -> dict[str, Facts | str]:
    """By host, what a program of this checkout prints there (after MARK, as JSON), or why there is no answer."""
    with ThreadPoolExecutor(64) as pool:
        return dict(zip(hosts, pool.map(lambda host: _ask(host, words), hosts), strict=True))


def _ask(host: str, words: Sequence[str]) -> Facts | str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in python_path().items()]
    there = f"cd {shlex.quote(os.getcwd())} && {' '.join([*variables, shlex.join([sys.executable, *words])])}"
    command = ["ssh", *shlex.split(ssh_arguments()), host, there]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"{host}: connected, but no answer within {ANSWER_S:.0f} s; look at its load and its file systems"
    marked = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    if ran.returncode == 0 and marked:
        facts: Facts = json.loads(marked[-1].removeprefix(MARK))
        return facts
    said = " ".join(ran.stderr.split())[-500:] or f"exit code {ran.returncode}"
    if ran.returncode == 255:
        return f"{host}: cannot be reached by ssh without a password ({said}). Try `ssh {host} true`"
    return (
        f"{host}: {sys.executable} did not run in {os.getcwd()} ({said}). The checkout and its .venv must be at the "
        "same path on every host"
    )


def answers(placement: Placement) -> dict[str, Facts]:
    """The facts of every host of a placement.

    Raises:
        ConfigError: hosts that cannot be reached or cannot run the job, each with the remedy.
    """
    by_host = ask(list(placement.ranks))
    problems = [answer for answer in by_host.values() if isinstance(answer, str)]
    answered = {host: facts for host, facts in by_host.items() if not isinstance(facts, str)}
    problems += unfit(placement, answered)
    if problems:
        raise ConfigError(f"{placement.hostfile}: " + "; ".join(problems))
    return answered
