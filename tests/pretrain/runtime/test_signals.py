"""A signal that asks to stop keeps its meaning from the first import to the exit."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest

from common.exits import EXIT_INTERRUPTED, EXIT_PREEMPTED
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


EARLY = """
import os, signal, sys
import pretrain.config
from pretrain.__main__ import main

load = pretrain.config.load

def told(*given):
    for name in sys.argv[2].split():
        os.kill(os.getpid(), getattr(signal, name))
    return load(*given)

pretrain.config.load = told
sys.exit(main([sys.argv[1]]))
"""
TWICE = TOLD.replace("SIGTERM", "SIGINT").replace("SIGUSR1", "SIGINT")


def prepared(folder: Path) -> str:
    make_data(folder / "data")
    cfg = tiny_config(run=str(folder / "run"), data__path=str(folder / "data"), train__steps=3)
    (folder / "config.yaml").write_text(dump(cfg))
    return str(folder / "config.yaml")


def test_a_signal_before_the_config_is_read_stops_after_the_first_step(tmp_path: Path) -> None:
    ended = call("-c", EARLY, prepared(tmp_path), "SIGTERM")
    assert ended.returncode == EXIT_PREEMPTED and "stopped at step 1" in ended.stderr, ended.stderr


@pytest.mark.parametrize("when", ["before the config is read", "train"])
def test_ctrl_c_twice_leaves_at_once(tmp_path: Path, when: str) -> None:
    program, words = (TWICE, when) if when == "train" else (EARLY, "SIGINT SIGINT")
    ended = call("-c", program, prepared(tmp_path), words)
    assert ended.returncode == EXIT_INTERRUPTED and "Traceback" not in ended.stderr, ended.stderr
    assert "interrupted" in ended.stderr and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_signal_that_came_while_it_was_blocked_is_heard() -> None:
    """A launcher starts its ranks so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.SIGNALS)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads of the tests have not blocked it
        with StopSignal() as stop:
            assert stop.received == "SIGUSR1"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("when", "code", "step"), [("__init__", EXIT_PREEMPTED, 1), ("train", EXIT_PREEMPTED, 1), ("close", 0, 3)]
)
def test_signals_while_a_run_is_loaded_and_closed(tmp_path: Path, when: str, code: int, step: int) -> None:
    ended = call("-c", TOLD, prepared(tmp_path), when)
    assert ended.returncode == code, ended.stderr
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (left["code"], left["step"]) == (code, step)
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
