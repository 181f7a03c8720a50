"""Lines of metrics.jsonl that are no records are named and kept aside; the others stay."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import records
from pretrain.analysis.summary import summarise
from pretrain.config import dump
from pretrain.recorder import Recorder
from pretrain.records import Eval, Record, Save, Train, scan
from pretrain.report import main as report
from pretrain.run_folder import RunFolder
from tests.support.tiny import tiny_config


def train(step: int, since: int) -> Train:
    taken = step - since
    return Train(step=step, seconds=1.0, loss=2.0, tokens=step, losses=[2.0] * taken, grad_norms=[1.0] * taken)


def lines(*steps: int, since: int = 0) -> list[bytes]:
    """Of steps that follow each other, the first one on `since`."""
    return [train(step, before).line().encode() for before, step in zip((since, *steps), steps, strict=False)]


WRONG: dict[str, tuple[bytes, str]] = {
    "null": (b"null", "expected an object"),
    "a number": (b"17", "expected an object"),
    "a list": (b"[1]", "expected an object"),
    "nothing": (b"", "Expecting value"),
    "zeros of a crash": (b"\0" * 300, "Expecting value"),
    "no UTF-8": (lines(2)[0].replace(b"train", b"tr\xffin"), "can't decode"),
    "a flipped bit in a name": (lines(2)[0].replace(b'"step"', b'"stdp"'), "missing .* 'step'"),
    "a flipped bit in JSON": (lines(2)[0].replace(b":", b";", 1), "delimiter"),
    "no step": (b'{"kind": "train", "seconds": 1.0, "loss": 2.0}', "'step'"),
    "a step of text": (b'{"kind": "save", "step": "2", "seconds": 1.0}', "step='2'"),
    "a step that is true": (b'{"kind": "save", "step": true, "seconds": 1.0}', "step='True'"),
    "a negative step": (b'{"kind": "save", "step": -2, "seconds": 1.0}', "step=-2: expected 0 or more"),
    "a huge step": (b'{"kind": "save", "step": 1%s, "seconds": 1.0}' % (b"0" * 30), "step='1000"),
    "seconds of null": (b'{"kind": "save", "step": 2, "seconds": null}', "seconds='None'"),
    "seconds beyond a float": (b'{"kind": "save", "step": 2, "seconds": 1e999}', "seconds='inf'"),
    "losses of text": (lines(2)[0].replace(b"[2.0", b'["2"'), "losses="),
    "a kind of no text": (b'{"kind": [], "step": 2}', r"kind='\[\]'"),
    "an unknown kind": (b'{"kind": "noise", "step": 2}', "noise"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "half a character": (b'{"kind": "counters", "step": 2, "measured": ["\\ud800"], "missing": {}}', "surrogates"),
}


@pytest.mark.parametrize("harm", WRONG)
def test_a_wrong_line_is_named_and_the_others_stay(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line, told = WRONG[harm]
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(b"\n".join([*lines(1), line, *lines(3, 5, since=1)]) + b"\n" + lines(6)[0][:-7])
    before = run.metrics.read_bytes()
    (wrong,) = scan(run.metrics).wrong
    assert wrong.startswith("line 2: ") and len(wrong) < 200
    assert re.search(told, wrong), wrong
    assert [record.step for record in run.records(Record)] == [1, 3, 5]
    assert f"{run.metrics}, line 2: " in caplog.text and "line 5" not in caplog.text
    caplog.clear()
    Recorder(run, 3, 10, tensorboard=False).close()
    assert "line 2" in caplog.text and "is kept as metrics.jsonl.damaged-1" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == before
    caplog.clear()
    Recorder(run, 3, 10, tensorboard=False).close()
    assert not caplog.text, "it is told once"
    assert run.metrics.read_bytes() == b"".join(line + b"\n" for line in lines(1, 3))


def test_steps_without_a_record_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By readers, those between others; by a run that goes on, those up to its checkpoint too, if they were its own."""
    run = RunFolder(tmp_path)

    def told(step: int, own: bool) -> list[str]:
        caplog.clear()
        Recorder(run, step, 10, tensorboard=False, own=own).close()
        return [message.rpartition("is left of ")[2] for message in caplog.messages]

    assert told(4, own=True) == ["steps 1 to 4"] and told(4, own=False) == [], "the file is not there"
    assert told(4, own=True) == ["steps 1 to 4"] and told(4, own=False) == [], "it is empty"
    run.metrics.write_bytes(b'"text"')  # as half a line, which is dropped
    assert told(4, own=True) == ["steps 1 to 4"] and told(0, own=True) == []
    run.metrics.write_bytes(b"\n".join([*lines(4, 6, since=3), *lines(9, 12, since=8)]) + b"\n")
    caplog.clear()
    assert [record.step for record in run.records(Train)] == [4, 6, 9, 12]
    assert caplog.messages == [f"{run.metrics}: no record is left of steps 7 to 8"], "steps 1 to 3 were another run's"
    assert told(12, own=True) == told(12, own=False) == ["steps 7 to 8"]
    assert told(10, own=True) == ["steps 7 to 8, step 10"] and told(9, own=True) == ["steps 7 to 8"]
    run.metrics.write_bytes(b"".join(lines(step, since=step - 1)[0] + b"\n" for step in range(2, 99, 2)))
    assert told(98, own=True) == ["step 3, step 5, step 7, 45 more such places"]


def test_the_fewest_lines_are_out_of_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for steps, wrong in (
        ([2, 4, 900_000, 6, 8], [3]),
        ([2, 4, 1, 6, 8], [3]),
        ([2, 4, 4, 6], [2]),
        ([6, 8, 2, 4, 9], [1, 2]),
        ([1, 2, 3], []),
    ):
        run.metrics.write_bytes(b"".join(line + b"\n" for line in lines(*steps)))
        found = scan(run.metrics)
        assert [int(told.split()[1][:-1]) for told in found.wrong] == wrong, (steps, found.wrong)
    late = [*lines(2), Save(step=1, seconds=1.0).line().encode(), Eval(step=2, seconds=1.0, loss=1.0).line().encode()]
    run.metrics.write_bytes(b"".join(line + b"\n" for line in late))
    assert not scan(run.metrics).wrong, "a save ends when training is further"


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 4096)
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(lines(1)[0] + b"\n" + b"x" * 50_000 + b"\n" + lines(2)[0] + b"\n" + b"x" * 4096)
    found = scan(run.metrics)
    assert found.wrong == ["line 2: it is too long", "line 4: it is too long"]
    assert [record.step for record in found.records] == [1, 2]


@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_what_is_no_file_is_refused_by_report_and_set_aside_by_a_run(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(dump(tiny_config(run=str(tmp_path))))
    if what == "pipe":
        os.mkfifo(run.metrics)
    elif what == "folder":
        (run.metrics / "inside").mkdir(parents=True)
    else:
        run.metrics.symlink_to(tmp_path / "nowhere")
    assert report([str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    Recorder(run, 0, 10, tensorboard=False).close()
    assert run.metrics.read_bytes() == b"" and not run.metrics.is_symlink()
    assert os.path.lexists(tmp_path / "metrics.jsonl.damaged-1") and not (tmp_path / "nowhere").exists()


def test_a_report_tells_what_it_left_out(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(dump(tiny_config(run=str(tmp_path), data__path=str(tmp_path / "data"))))
    run.metrics.write_bytes(b"\n".join([*lines(1), b"null", *lines(2, 3)]) + b"\n")
    assert summarise(tmp_path)["lines_left_out"] == 1 and summarise(tmp_path)["train_seconds"] == 3.0
    assert report([str(tmp_path)]) == 0
    assert "wrong lines of metrics.jsonl: 1; what they recorded is in no figure" in capfd.readouterr().out
    run.metrics.write_bytes(b"\n".join([*lines(1), *lines(3, since=2)]) + b"\n")
    assert summarise(tmp_path)["steps_without_record"] == ["step 2"]
    assert report([str(tmp_path)]) == 0
    assert "no record is left of step 2, which no figure has" in capfd.readouterr().out


WHOLE = b"".join(line + b"\n" for line in lines(1, 2, 3, 4))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_that_change_cost_their_own_lines_alone(changes: list[tuple[int, int]]) -> None:
    text = bytearray(WHOLE)
    for place, byte in changes:
        text[place] = byte
    path = Path(tempfile.gettempdir()) / f"metrics-{os.getpid()}.jsonl"
    path.write_bytes(text)
    try:
        found = scan(path)
    finally:
        path.unlink()
    hit = {WHOLE[:place].count(b"\n") + 1 for place, _ in changes}
    hit |= {number + 1 for number in hit if WHOLE.splitlines(True)[number - 1] not in bytes(text)}  # joined to the next
    assert len(found.records) >= 4 - len(hit), (found.wrong, hit)
