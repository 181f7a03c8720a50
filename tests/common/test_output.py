"""Output whose reader has gone: printing goes on, and it is noticed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common import output

PRINTS = """
import logging, sys
from common.output import bear_loss, is_abandoned
bear_loss()
print("heard", flush=True)
sys.stdin.read()  # until the reader has gone
for _ in range(3):
    print("x" * 100_000)
    print("y", file=sys.stderr)
logging.error("z")
sys.exit(7 if is_abandoned() else 8)
"""


@pytest.mark.parametrize("gone", [("stdout",), ("stderr",), ("stdout", "stderr"), ()])
def test_what_is_printed_for_nobody_is_no_error(gone: tuple[str, ...]) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PRINTS], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"heard\n"
        for name in gone:
            getattr(process, name).close()
            setattr(process, name, None)
        told = process.communicate(timeout=60)
        assert process.returncode == (7 if gone else 8), told


def test_only_a_reader_that_has_gone_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (reads, writes), pair = os.pipe(), socket.socketpair()
    with (tmp_path / "file").open("w") as file, pair[0], pair[1]:
        for number, end in ((writes, lambda: os.close(reads)), (pair[0].fileno(), pair[1].close)):
            monkeypatch.setattr(output, "STREAMS", {"stdout": file.fileno(), "stderr": number})
            assert not output.is_abandoned()
            end()
            assert output.is_abandoned()
    os.close(writes)
    monkeypatch.setattr(output, "STREAMS", {"stdout": 987_654})
    assert not output.is_abandoned(), "a closed descriptor was closed on purpose"
