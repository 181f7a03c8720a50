"""Commands as processes of their own, which do not import the program anew: see tests/support/ranks.py."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from tests.support.ranks import Caller, context


def _python(caller: Any, folder: str, option: str, program: str, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


class Command:
    """`python -m program ...` or `python -c program ...`, started."""

    def __init__(self, option: str, program: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
        self.args = (option, program, *arguments)
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        caller = Caller(environment, *(file.fileno() for file in self._files))
        self._process = context().Process(
            target=_python, args=(caller, os.getcwd(), option, program, arguments), daemon=True
        )
        self._process.start()

    @property
    def stdout(self) -> str:
        return self._text(0)

    @property
    def stderr(self) -> str:
        return self._text(1)

    def _text(self, which: int) -> str:
        file = self._files[which].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()  # the process writes at the file's position

    def wait_for(self, words: str, seconds: float = 240) -> None:
        """Until it has said them on standard output."""
        deadline = time.monotonic() + seconds
        while words not in self.stdout:
            assert self._process.is_alive() and time.monotonic() < deadline, self.stderr
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float = 300) -> int:
        """The exit code, -N after signal N.

        Raises:
            TimeoutExpired: it goes on.
        """
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, seconds, self.stdout, self.stderr)
        return code


def call(option: str, program: str, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A Command at its end."""
    command = Command(option, program, *arguments, **settings)
    try:
        code = command.wait()
    finally:
        command.kill()
    return subprocess.CompletedProcess(command.args, code, command.stdout, command.stderr)
