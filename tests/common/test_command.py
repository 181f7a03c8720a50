"""What all commands share."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from common import command


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_torch_is_imported_and_what_it_made_is_never_looked_through(enabled) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with command.importing():
            assert not gc.isenabled()
            made: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= frozen + len(made)
        assert not any(one is made for one in gc.get_objects()), "a collection does not come by"
        with pytest.raises(ImportError), command.importing():
            raise ImportError("no torch")
        assert gc.isenabled() == enabled, "nor does a failed import end collections"
    finally:
        (gc.enable if before else gc.disable)()


INTERRUPTED = """
import argparse, atexit, os, signal, sys
from common import command

signal.signal(signal.SIGINT, signal.default_int_handler)
tell = lambda: os.kill(os.getpid(), signal.SIGINT)

def swallowing():
    try:
        with command.importing():
            tell()
    except BaseException:
        pass
    return 0

def cleaning():
    try:
        tell()
    finally:
        tell()

def late():
    atexit.register(tell)  # before the command's own
    print("done")

work = {"at work": tell, "while it imports": swallowing, "while it cleans up": cleaning, "at its end": late}
sys.exit(command.run(lambda asked: work[sys.argv[1]](), argparse.Namespace()))
"""


@pytest.mark.parametrize(
    ("when", "code"), [("at work", 130), ("while it imports", 130), ("while it cleans up", 130), ("at its end", 0)]
)
def test_ctrl_c_ends_a_command_without_a_traceback(when: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, when], capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert (ended.stdout, ended.stderr) == (("", "interrupted\n") if code else ("done\n", ""))


def test_ctrl_c_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "import_module", interrupted)
    assert command.dispatch(["a"], {"a": "some.module"}, "about") == 130
    assert capsys.readouterr().err == "interrupted\n"
