"""Prepared data are whole or absent: killed runs, full disks, damaged sources, and how the next run goes on."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import ConfigError
from data import pipeline, tokenizer_training, writing
from data import prepare as preparing
from data.draft import Draft
from data.prepare import prepare
from data.shard_writer import ShardWriter
from tests.support.corpus import (
    ROOT,
    TEXTS,
    Killed,
    assert_same,
    config,
    hurry,
    killed_at,
    names,
    quiet,
    settings,
    write_corpus,
)


def test_a_damaged_source_leaves_nothing(corpus):
    with (corpus / "corpus.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(ConfigError, match="line 401: not valid JSON"):
        prepare(config(corpus), quiet)
    assert names(corpus) == ["corpus.jsonl"]


def test_too_little_space_is_noticed_before_any_work(corpus, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    monkeypatch.setattr(tokenizer_training, "documents", lambda *_: pytest.fail("the corpus was read"))
    with pytest.raises(ConfigError, match="the shards need about .* GB"):
        prepare(config(corpus), quiet)
    assert names(corpus) == ["corpus.jsonl"]


@pytest.mark.parametrize("at", ["add", "publish"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_after_a_full_disk_the_next_run_goes_on(corpus, prepared, monkeypatch, at, code):
    def full(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    if at == "add":
        monkeypatch.setattr(ShardWriter, "add", full)
    else:
        monkeypatch.setattr("data.draft.publish", full)
    with pytest.raises(ConfigError, match="the disk is full. Free some space and run this again"):
        prepare(config(corpus), quiet)
    assert names(corpus) == ["corpus.jsonl", "prepared.draft"]
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_training, "train", lambda *_: pytest.fail("a tokenizer was trained again"))
    prepare(config(corpus), quiet)
    assert_same(corpus / "prepared", prepared / "prepared")
    assert names(corpus) == ["corpus.jsonl", "prepared"]


def test_a_folder_that_cannot_be_written_is_named(corpus):
    (corpus / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(config(corpus, path=str(corpus / "file" / "prepared")), quiet)


def killed(corpus: Path, how: int, at: int, workers: int) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process that sends itself a signal before its `at`-th document from now."""
    (corpus / "config.yaml").write_text(yaml.safe_dump({"data": settings(corpus)}))
    code = f"""
import os, sys
from itertools import count
from types import SimpleNamespace
import data.__main__ as m
from data import pipeline, writing

inner, taken = writing.Writing.take, count()
def take(*given):
    if next(taken) == {at}:
        os.kill(os.getpid(), {int(how)})
    inner(*given)

if __name__ == "__main__":
    writing.Writing.take, pipeline.BATCH_CHARS = take, 2000
    writing.time = SimpleNamespace(monotonic=count().__next__)  # a second each document: a commit each 15
    sys.exit(m.main(["prepare", {str(corpus / "config.yaml")!r}, "--workers", "{workers}"]))
"""
    script = corpus / "killed.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    script.unlink()
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_a_killed_run_is_continued_to_the_same_bytes(corpus, prepared, workers):
    for at in (0, 157, 97):
        assert killed(corpus, signal.SIGKILL, at, workers).returncode == -signal.SIGKILL
        assert {"prepared.draft", "prepared.draft.lock"} <= set(names(corpus))
        assert "prepared" not in names(corpus)
    told: list[str] = []
    prepare(config(corpus), told.append, workers)
    done = int(told[0].split(": ")[1].split()[0])
    assert told[0].startswith("going on with") and done == 150 + 90
    assert_same(corpus / "prepared", prepared / "prepared")
    assert set(names(corpus)) == {"corpus.jsonl", "config.yaml", "prepared"}


def test_ctrl_c_ends_the_command_and_keeps_what_is_done(corpus, prepared):
    found = killed(corpus, signal.SIGINT, 200, 2)
    assert (found.returncode, found.stderr) == (130, "interrupted\n")
    assert set(names(corpus)) == {"corpus.jsonl", "config.yaml", "prepared.draft"}
    prepare(config(corpus), quiet)
    assert_same(corpus / "prepared", prepared / "prepared")


def test_a_run_may_end_at_any_step(corpus, prepared, monkeypatch):
    """Every write of a file, every commit and every step to the final name may be the last one, again and again."""
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 4000)
    hurry(monkeypatch)
    steps = [(ShardWriter, "save"), (ShardWriter, "_close_shard"), (Draft, "commit")]
    steps += [(preparing, "write_manifest"), (ShardWriter, "close"), (preparing, "make_tokenizer")]
    left = 0
    for where, name in steps:
        inner = getattr(where, name)

        def step(*given: Any, inner: Any = inner) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            done = inner(*given)
            left -= 1
            if left == 0:
                raise Killed
            return done

        monkeypatch.setattr(where, name, step)
    deaths = 0
    for turn in range(1000):
        left = 1 + turn % 9 + turn // 10
        try:
            prepare(config(corpus), quiet, 1)
            break
        except Killed:
            deaths += 1
    assert deaths > 20
    assert_same(corpus / "prepared", prepared / "prepared")
    assert names(corpus) == ["corpus.jsonl", "prepared"]


def test_a_run_killed_before_its_last_step_is_finished(corpus, prepared, monkeypatch):
    def died(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("data.draft.publish", died)
    with pytest.raises(Killed):
        prepare(config(corpus), quiet)
    monkeypatch.undo()
    assert not (corpus / "prepared.draft" / "journal.json").exists()
    monkeypatch.setattr(writing, "read", lambda *_: pytest.fail("the corpus was read again"))
    prepare(config(corpus), quiet)
    assert_same(corpus / "prepared", prepared / "prepared")


def test_a_damaged_file_keeps_what_came_before_it(corpus, prepared):
    given = {"vocab_size": 350, "model": str(prepared / "prepared" / "tokenizer.model")}
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    for part in range(2):
        rows = pyarrow.table({"text": TEXTS[200 * part : 200 * part + 200]})
        parquet.write_table(rows, corpus / f"{part}.parquet", row_group_size=50, compression="none")
    whole = (corpus / "1.parquet").read_bytes()
    at = whole.index(TEXTS[300].encode())  # the first of its third row group
    (corpus / "1.parquet").write_bytes(whole[: at - 300] + bytes(400) + whole[at + 100 :])
    cfg = config(corpus, tokenizer=given, source={"kind": "files", "paths": [str(corpus / "*.parquet")]})
    with pytest.raises(ConfigError, match=r"1\.parquet(,|: unreadable after) row \d+ \(row group [12]\)"):
        prepare(cfg, quiet)
    assert names(corpus) == ["0.parquet", "1.parquet", "corpus.jsonl", "prepared.draft"]
    (corpus / "1.parquet").write_bytes(whole)
    told: list[str] = []
    prepare(cfg, told.append)
    assert told[0].startswith("going on") and 250 <= int(told[0].split(": ")[1].split()[0]) <= 300
    assert_same(corpus / "prepared", prepared / "prepared")


def test_a_run_killed_at_its_limit_is_finished(corpus, monkeypatch):
    def died(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(writing, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(preparing, "split_entry", died)
    with pytest.raises(Killed):
        prepare(config(corpus, limit_documents=20, val_fraction=0.5), quiet)
    monkeypatch.undo()
    manifest = prepare(config(corpus, limit_documents=20, val_fraction=0.5), quiet)
    assert sum(entry["documents"] for entry in manifest["splits"].values()) == 20


def test_a_draft_of_other_settings_is_not_continued(corpus, monkeypatch):
    hurry(monkeypatch)
    killed_at(monkeypatch, 100)
    with pytest.raises(Killed):
        prepare(config(corpus), quiet)
    before = (corpus / "prepared.draft" / "journal.json").read_bytes()
    with pytest.raises(ConfigError, match="begun differently: data.dtype was 'uint16' and is now 'uint32'.*delete the"):
        prepare(config(corpus, dtype="uint32"), quiet)
    write_corpus(corpus / "corpus.jsonl", TEXTS[:100])
    assert (corpus / "prepared.draft" / "journal.json").read_bytes() == before
    (corpus / "corpus.jsonl").rename(corpus / "other.jsonl")
    with pytest.raises(ConfigError, match="begun differently: .*the files of files"):
        prepare(config(corpus, source={"kind": "files", "paths": [str(corpus / "other.jsonl")]}), quiet)
    (corpus / "prepared.draft" / "train-00000.bin").write_bytes(b"")
    (corpus / "other.jsonl").rename(corpus / "corpus.jsonl")
    with pytest.raises(ConfigError, match="train-00000.bin: 0 bytes, but the manifest says"):
        prepare(config(corpus), quiet)


def test_a_draft_without_documents_is_begun_anew(corpus, prepared, monkeypatch):
    def died(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(preparing, "write_documents", died)
    with pytest.raises(Killed):
        prepare(config(corpus, tokenizer={"vocab_size": 360}), quiet)
    assert {"journal.json", "tokenizer.model"} <= set(names(corpus / "prepared.draft"))
    monkeypatch.undo()
    told: list[str] = []
    prepare(config(corpus), told.append)
    assert told[0].startswith("starting anew") and "vocab_size was 360 and is now 350" in told[0]
    assert_same(corpus / "prepared", prepared / "prepared")


def test_two_runs_do_not_meet(corpus):
    (corpus / "prepared.draft").mkdir()
    with (corpus / "prepared.draft.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is preparing it"):
            prepare(config(corpus), quiet)
    assert (corpus / "prepared.draft").exists()
