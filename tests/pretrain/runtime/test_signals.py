"""A signal that asks to stop keeps its meaning from the first import to the exit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from common.exits import EXIT_PREEMPTED
from pretrain.config import dump
from pretrain.runtime.signals import StopSignal
from tests.support.commands import call
from tests.support.tiny import make_data, tiny_config

TOLD = """
import os, signal, sys
import pretrain.loop
from pretrain.__main__ import main

work = getattr(pretrain.loop.Run, sys.argv[2])

def told(self, *rest):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    return work(self, *rest)

setattr(pretrain.loop.Run, sys.argv[2], told)
sys.exit(main([sys.argv[1]]))
"""


def test_a_signal_that_came_while_it_was_blocked_is_heard() -> None:
    """A launcher starts its ranks so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.SIGNALS)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignal() as stop:
            assert stop.received == "SIGUSR1"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("when", "code", "step"), [("__init__", EXIT_PREEMPTED, 1), ("train", EXIT_PREEMPTED, 1), ("close", 0, 3)]
)
def test_signals_while_a_run_is_loaded_and_closed(tmp_path: Path, when: str, code: int, step: int) -> None:
    make_data(tmp_path / "data")
    cfg = tiny_config(run=str(tmp_path / "run"), data__path=str(tmp_path / "data"), train__steps=3)
    (tmp_path / "config.yaml").write_text(dump(cfg))
    ended = call("-c", TOLD, str(tmp_path / "config.yaml"), when)
    assert ended.returncode == code, ended.stderr
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (left["code"], left["step"]) == (code, step)
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
