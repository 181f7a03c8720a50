"""Preparation: what the folder holds, that it is reproducible, reused, refused, and never half there."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from common.errors import ConfigError
from common.settings import validate
from common.workers import Workers
from data import prepare as module
from data.__main__ import main
from data.config import DataConfig
from data.prepare import prepare
from data.shards import open_split, read_manifest, verify_folder
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WORDS = "harmonic loss measures the distance between a hidden state and every prototype of vocabulary"


def text(number: int) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS.split(), size=40)) + f" {number}.\n"


TEXTS = [text(number) for number in range(400)]


def write_corpus(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "path": str(tmp_path / "prepared"),
        "source": {"kind": "files", "paths": [str(tmp_path / "corpus.jsonl")]},
        "tokenizer": {"vocab_size": 350},
        "shard_tokens": 2000,
        "val_fraction": 0.1,
        **changes,
    }


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    return validate(DataConfig, settings(tmp_path, **changes))


def quiet(line: str) -> None:
    pass


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder prepared once, to be copied by tests that damage it."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder / "corpus.jsonl", TEXTS)
    prepare(config(folder), quiet)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def decoded(folder: Path, split: str) -> list[str]:
    tokenizer, data = Tokenizer(folder / "tokenizer.model"), open_split(folder, split)
    bounds = [*data.document_starts().tolist(), data.tokens]
    return [
        tokenizer.decode(data.read(start, end - start - 1).tolist())
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that shows a second more for each document, so that there are many commits."""
    ticks = count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def assert_same(one: Path, other: Path) -> None:
    """All files but the manifest are equal to the byte, and the manifest but for where the text was."""
    assert names(one) == names(other)
    for name in set(names(one)) - {"manifest.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [{**read_manifest(folder), "inputs": None, "settings": None} for folder in (one, other)]
    assert manifests[0] == manifests[1]


def held_out(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < fraction


# ---- what is written


def test_every_document_is_there_once_in_order(prepared):
    folder = prepared / "prepared"
    assert decoded(folder, "val") == [text for text in TEXTS if held_out(text, 0.1)]
    assert decoded(folder, "train") == [text for text in TEXTS if not held_out(text, 0.1)]
    data = open_split(folder, "train")
    np.testing.assert_array_equal(data.document_bytes(), [len(text.encode()) for text in decoded(folder, "train")])
    ends = [*data.document_starts().tolist()[1:], data.tokens]
    assert all(data.read(end - 1, 1) == data.eos_id for end in ends)
    manifest = verify_folder(folder)
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert manifest["dropped"] == {"empty": 0, "short": 0, "duplicates": 0, "overlapping": 0}
    assert names(prepared) == ["corpus.jsonl", "prepared"]


def test_preparation_is_deterministic(corpus, prepared, monkeypatch):
    """Neither the number of processes, nor batches, nor commits matter."""
    monkeypatch.setattr(module, "BATCH_CHARS", 4000)
    hurry(monkeypatch)
    for workers in (1, 2, 3):
        manifest = prepare(config(corpus, path=str(corpus / f"by-{workers}")), quiet, workers)
        assert manifest["fingerprint"] == read_manifest(prepared / "prepared")["fingerprint"]
        assert_same(corpus / f"by-{workers}", prepared / "prepared")
    assert not [name for name in names(corpus) if "draft" in name]


def test_the_split_of_a_document_depends_on_nothing_but_its_text(corpus):
    given = {"vocab_size": 350}
    prepare(config(corpus, tokenizer=given), quiet)
    before = set(decoded(corpus / "prepared", "val"))
    write_corpus(corpus / "corpus.jsonl", [text(1000), *reversed(TEXTS), text(1001)])
    prepare(config(corpus, tokenizer=given, path=str(corpus / "other"), dtype="uint32"), quiet)
    assert set(decoded(corpus / "other", "val")) - {text(1000), text(1001)} == before
    prepare(config(corpus, path=str(corpus / "more"), val_fraction=0.3), quiet)
    assert before < set(decoded(corpus / "more", "val"))


def test_duplicates_and_empty_documents_are_dropped_and_counted(corpus, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 3000)  # duplicates within a batch and across batches
    write_corpus(corpus / "corpus.jsonl", [*TEXTS, TEXTS[3], TEXTS[3], "", " ", *TEXTS[:50], "one more"])
    manifest = prepare(config(corpus), quiet)
    assert manifest["dropped"] == {"empty": 2, "short": 0, "duplicates": 52, "overlapping": 0}
    assert sorted(decoded(corpus / "prepared", "train") + decoded(corpus / "prepared", "val")) == sorted(
        [*TEXTS, "one more"]
    )


def test_seen_hashes_are_a_set():
    random = np.random.default_rng(0)
    seen, known = module.Seen(), set()
    digests = random.integers(1, 5000, size=10_000).astype(np.uint64) * np.uint64(1 << 6)  # many with equal low bits
    for digest in [*digests.tolist(), 0, 2**64 - 1, 0]:
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    assert len(seen) == len(known) > 3000


def test_a_limit_takes_the_first_documents(corpus):
    prepare(config(corpus, limit_documents=100), quiet)
    found = decoded(corpus / "prepared", "train") + decoded(corpus / "prepared", "val")
    assert sorted(found) == sorted(TEXTS[:100])


def test_a_given_tokenizer_is_used(corpus, prepared):
    model = prepared / "prepared" / "tokenizer.model"
    given = {"vocab_size": 350, "model": str(model)}
    manifest = prepare(config(corpus, tokenizer=given, source={"kind": "embedded"}, limit_documents=90), quiet)
    assert (corpus / "prepared" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert manifest["tokenizer_sha256"] == Tokenizer(model).sha256
    with pytest.raises(ConfigError, match=r"vocab_size=400, but .* has 350 pieces; set it to 350"):
        prepare(config(corpus, tokenizer={**given, "vocab_size": 400}, path=str(corpus / "other")), quiet)
    assert not (corpus / "other").exists()


def test_a_given_tokenizer_that_changes_text_is_told_once(corpus, monkeypatch):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(corpus / "lossy"), vocab_size=60, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = Tokenizer(corpus / "lossy.model").vocab_size
    told: list[str] = []
    given = config(corpus, tokenizer={"vocab_size": size, "model": str(corpus / "lossy.model")})
    prepare(given, told.append)
    (line,) = [line for line in told if "does not give every text back" in line]
    assert "lossy.model" in line and "'a  b' becomes 'a b'" in line and "leave data.tokenizer.model out" in line
    prepare(given, told.append)
    assert len([line for line in told if "does not give every text back" in line]) == 1


def test_the_sample_is_even_capped_and_without_held_out_documents(corpus):
    cfg = config(corpus, tokenizer={"vocab_size": 350, "train_bytes": 20_000})
    sample = module._sample(cfg)
    size = sum(map(len, sample))
    assert 19_000 < size <= 20_000
    assert not any(held_out(text, cfg.val_fraction) for text in sample)
    places = sorted(TEXTS.index(text) for text in sample)
    assert places[0] < 60 and places[-1] > 340  # from the whole of the corpus
    write_corpus(corpus / "corpus.jsonl", [*reversed(TEXTS), *TEXTS])
    assert module._sample(cfg) == sample


# ---- reuse and refusal


def test_prepared_data_is_reused(corpus, capsys):
    first = prepare(config(corpus))
    before = {name: (corpus / "prepared" / name).stat().st_mtime_ns for name in names(corpus / "prepared")}
    capsys.readouterr()
    assert prepare(config(corpus)) == first
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"reusing {corpus / 'prepared'}")
    (corpus / "corpus.jsonl").unlink()  # the raw text is not needed any more
    shutil.move(corpus / "prepared", corpus / "moved")
    assert prepare(config(corpus, path=str(corpus / "moved")), quiet) == first
    assert {name: (corpus / "moved" / name).stat().st_mtime_ns for name in names(corpus / "moved")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 0.2}, "data.val_fraction was 0.1 and is now 0.2"),
        ({"tokenizer": {"vocab_size": 360}}, "data.tokenizer.vocab_size was 350 and is now 360"),
        ({"dtype": "uint32"}, "data.dtype was 'uint16' and is now 'uint32'"),
        ({"source": {"kind": "embedded"}}, "data.source.kind was 'files' and is now 'embedded'"),
    ],
)
def test_data_of_other_settings_is_refused(prepared, changes, message):
    with pytest.raises(ConfigError) as error:
        prepare(config(prepared, **changes), quiet)
    assert message in str(error.value)
    assert "Set data.path to another folder" in str(error.value)
    verify_folder(prepared / "prepared")


def test_data_of_other_files_is_refused(corpus):
    prepare(config(corpus), quiet)
    write_corpus(corpus / "corpus.jsonl", [*TEXTS, "one more"])
    with pytest.raises(ConfigError, match=r"prepared differently: the source's files \(.*corpus.jsonl\)"):
        prepare(config(corpus), quiet)


def test_damaged_data_is_not_reused(corpus, prepared):
    shutil.copytree(prepared / "prepared", corpus / "prepared")
    cfg = config(corpus, source={"kind": "files", "paths": [str(prepared / "corpus.jsonl")]})
    prepare(cfg, quiet)
    model = corpus / "prepared" / "tokenizer.model"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ConfigError, match="tokenizer.model: SHA-256"):
        prepare(cfg, quiet)
    model.write_bytes(whole)
    with (corpus / "prepared" / "train-00001.bin").open("ab") as stream:
        stream.write(b"xx")
    with pytest.raises(ConfigError, match="train-00001.bin"):
        prepare(cfg, quiet)


def test_a_folder_of_something_else_is_left_alone(corpus):
    (corpus / "prepared").mkdir()
    (corpus / "prepared" / "train-00000.bin").write_text("mine")
    with pytest.raises(ConfigError, match="holds no prepared data"):
        prepare(config(corpus), quiet)
    assert (corpus / "prepared" / "train-00000.bin").read_text() == "mine"
    with pytest.raises(ConfigError, match="holds no prepared data"):
        prepare(config(corpus, path=str(corpus / "corpus.jsonl")), quiet)
    with pytest.raises(ConfigError, match="holds no prepared data"):
        prepare(config(corpus, path="/"), quiet)


def test_an_empty_folder_is_taken(corpus):
    (corpus / "prepared").mkdir()
    prepare(config(corpus), quiet)
    verify_folder(corpus / "prepared")


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused(corpus, prepared, fraction, split):
    given = {"vocab_size": 350, "model": str(prepared / "prepared" / "tokenizer.model")}
    with pytest.raises(ConfigError, match=f"the {split} split is empty: 400 documents in all; take a"):
        prepare(config(corpus, val_fraction=fraction, tokenizer=given), quiet)
    assert names(corpus) == ["corpus.jsonl"]


# ---- never half there


def test_a_damaged_source_leaves_nothing(corpus):
    with (corpus / "corpus.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(ConfigError, match="line 401: not valid JSON"):
        prepare(config(corpus), quiet)
    assert names(corpus) == ["corpus.jsonl"]


def test_too_little_space_is_noticed_before_any_work(corpus, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    monkeypatch.setattr(module, "documents", lambda *_: pytest.fail("the corpus was read"))
    with pytest.raises(ConfigError, match="the shards need about .* GB"):
        prepare(config(corpus), quiet)
    assert names(corpus) == ["corpus.jsonl"]


@pytest.mark.parametrize("at", ["add", "publish"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_after_a_full_disk_the_next_run_goes_on(corpus, prepared, monkeypatch, at, code):
    def full(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    if at == "add":
        monkeypatch.setattr(module.ShardWriter, "add", full)
    else:
        monkeypatch.setattr("data.draft.publish", full)
    with pytest.raises(ConfigError, match="the disk is full. Free some space and run this again"):
        prepare(config(corpus), quiet)
    assert names(corpus) == ["corpus.jsonl", "prepared.draft"]
    monkeypatch.undo()
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("a tokenizer was trained again"))
    prepare(config(corpus), quiet)
    assert_same(corpus / "prepared", prepared / "prepared")
    assert names(corpus) == ["corpus.jsonl", "prepared"]


def test_a_folder_that_cannot_be_written(corpus):
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
import data.prepare as p, data.__main__ as m

inner, taken = p._Writing.take, count()
def take(*given):
    if next(taken) == {at}:
        os.kill(os.getpid(), {int(how)})
    inner(*given)

if __name__ == "__main__":
    p._Writing.take, p.BATCH_CHARS = take, 2000
    p.time = SimpleNamespace(monotonic=count().__next__)  # a second each document: a commit each 15
    sys.exit(m.main(["prepare", {str(corpus / "config.yaml")!r}, "--workers", "{workers}"]))
"""
    script = corpus / "killed.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    script.unlink()
    return found


@pytest.mark.parametrize("workers", [1, 2])
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


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, *places: int) -> None:
    """Runs end before they take these documents, counted over all runs."""
    taken, inner = count(), module._Writing.take

    def take(*given: Any) -> None:
        if next(taken) in places:
            raise Killed
        inner(*given)

    monkeypatch.setattr(module._Writing, "take", take)


def test_a_run_may_end_at_any_step(corpus, prepared, monkeypatch):
    """Every write of a file, every commit and every step to the final name may be the last one, again and again."""
    monkeypatch.setattr(module, "BATCH_CHARS", 4000)
    hurry(monkeypatch)
    steps = [(module.ShardWriter, "save"), (module.ShardWriter, "_close_shard"), (module.Draft, "commit")]
    steps += [(module, "write_manifest"), (module.ShardWriter, "close"), (module, "_make_tokenizer")]
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
    monkeypatch.setattr(module, "read", lambda *_: pytest.fail("the corpus was read again"))
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

    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "split_entry", died)
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

    monkeypatch.setattr(module, "_write", died)
    with pytest.raises(Killed):
        prepare(config(corpus, tokenizer={"vocab_size": 360}), quiet)
    assert {"journal.json", "tokenizer.model"} <= set(names(corpus / "prepared.draft"))
    monkeypatch.undo()
    told: list[str] = []
    prepare(config(corpus), told.append)
    assert told[0].startswith("starting anew") and "vocab_size was 360 and is now 350" in told[0]
    assert_same(corpus / "prepared", prepared / "prepared")


def test_workers_end_with_a_run_that_is_killed(corpus):
    code = (
        "import os; from common.workers import Workers; from operator import neg\n"
        "if __name__ == '__main__':\n"
        "    pool = Workers(neg, 2)\n"
        "    for n in range(6): print(pool.result(pool.submit(n)))\n"
        "    print(*pool._pool._processes, flush=True); os.kill(os.getpid(), 9)\n"
    )
    (corpus / "killed.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, corpus / "killed.py"], env=environment, capture_output=True, text=True)
    *results, processes = found.stdout.splitlines()
    assert results == ["0", "-1", "-2", "-3", "-4", "-5"]

    def lives(pid: int) -> bool:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    deadline = time.monotonic() + 60
    while any(lives(int(process)) for process in processes.split()):
        assert time.monotonic() < deadline, "workers are still there"
        time.sleep(0.1)


def test_a_worker_that_dies_is_told(corpus):
    with Workers(_die, 2) as pool, pytest.raises(ConfigError, match="a worker process was killed"):
        for _ in range(6):
            pool.result(pool.submit(os.getpid()))


def _die(parent: int) -> None:
    if os.getpid() != parent:  # the first items are done there
        os.kill(os.getpid(), signal.SIGKILL)


def test_two_runs_do_not_meet(corpus):
    (corpus / "prepared.draft").mkdir()
    with (corpus / "prepared.draft.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is preparing it"):
            prepare(config(corpus), quiet)
    assert (corpus / "prepared.draft").exists()


# ---- other sources, and the command


def test_a_dataset_of_parquet_files(corpus, monkeypatch):
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (corpus / "hub").mkdir()
    for part in range(2):
        rows = pyarrow.table({"text": TEXTS[200 * part : 200 * part + 200]})
        parquet.write_table(rows, corpus / "hub" / f"train-0000{part}-of-00002.parquet")
    prepare(config(corpus, source={"kind": "openwebtext", "name": str(corpus / "hub")}), quiet)
    found = Counter(decoded(corpus / "prepared", "train") + decoded(corpus / "prepared", "val"))
    assert found == Counter(TEXTS)


def test_the_command(corpus, capsys):
    file = corpus / "config.yaml"
    file.write_text(yaml.safe_dump({"data": settings(corpus), "model": {"anything": "of others"}}))
    assert main(["prepare", str(file), "data.val_fraction=2e-1"]) == 0
    assert "bytes/token" in capsys.readouterr().out
    assert read_manifest(corpus / "prepared")["settings"]["val_fraction"] == 0.2
    assert main(["verify", str(file)]) == 0
    assert "every file matches its hash" in capsys.readouterr().out
    assert main(["prepare", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {corpus / 'prepared'} was prepared differently")
    (corpus / "prepared" / "val-00000.bin").write_bytes(b"")
    assert main(["verify", str(file)]) == 2
    assert "val-00000.bin: 0 bytes" in capsys.readouterr().err


def test_the_command_without_a_data_section(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {}")
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 2
    assert "there is no `data:` section" in capsys.readouterr().err


def test_the_command_line():
    found = subprocess.run(
        [sys.executable, "-m", "data", "prepare", "none.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: none.yaml: there is no such file") and "Traceback" not in found.stderr
    help_text = subprocess.run([sys.executable, "-m", "data", "-h"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "prepare" in help_text and "verify" in help_text
