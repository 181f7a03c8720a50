"""Progress: a bar on a terminal, and elsewhere a line now and then that says how long it will take."""

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

from common import progress as module
from common.progress import progress


def test_lines_tell_the_time_left(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    told: list[str] = []
    with progress("encoding", told.append) as tell:
        for second in range(101):
            clock.now = float(second)
            tell(0.5 + second / 400, f"{second} MB")  # it began in the middle
    assert told == [
        "encoding: 57.5%, 30 MB, 2 min 50 s left",
        "encoding: 65.0%, 60 MB, 2 min 20 s left",
        "encoding: 72.5%, 90 MB, 1 min 50 s left",
    ]


def test_a_terminal_gets_a_bar_and_a_pipe_does_not():
    code = "from common.progress import progress, say\nwith progress('encoding', say) as tell: tell(0.25, '7 MB')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run(command, stdout=theirs, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    assert "encoding" in shown and "25%" in shown and "7 MB" in shown
