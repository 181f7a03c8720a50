"""The three splits: chosen by the hash of a document's text alone, apart from each other, the third only if asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.errors import ConfigError
from data.inspection import inspect
from data.manifest import MANIFEST, read_manifest
from data.nanogpt import import_nanogpt
from data.prepare import prepare
from data.shards import open_split, verify_folder
from data.tokenizer_training import sample
from tests.support.corpus import (
    TEXTS,
    Killed,
    assert_same,
    config,
    decoded,
    held_out,
    hurry,
    killed_at,
    names,
    quiet,
    write_corpus,
)

SPLITS = ("train", "val", "test")


def in_test(text: str, fraction: float) -> bool:
    return not held_out(text, 1 - fraction)


def splits_of(folder: Path) -> dict[str, list[str]]:
    return {name: decoded(folder, name) for name in SPLITS}


def test_test_is_the_upper_end_of_the_hashes_and_val_what_it_was(corpus):
    prepare(config(corpus, path=str(corpus / "two")), quiet)
    manifest = prepare(config(corpus, test_fraction=0.2), quiet)
    found = splits_of(corpus / "prepared")
    assert found["val"] == decoded(corpus / "two", "val") == [text for text in TEXTS if held_out(text, 0.1)]
    assert found["test"] == [text for text in TEXTS if in_test(text, 0.2)]
    assert found["train"] == [text for text in TEXTS if not held_out(text, 0.1) and not in_test(text, 0.2)]
    assert sorted(sum(found.values(), [])) == sorted(TEXTS) and len(found["test"]) > 60
    assert tuple(manifest["splits"]) == SPLITS
    assert manifest["fingerprint"] != read_manifest(corpus / "two")["fingerprint"]


def test_without_a_fraction_a_folder_is_as_it_always_was(corpus):
    """Its settings do not know of the third split, and a folder of before fits the settings of today."""
    manifest = prepare(config(corpus, test_fraction=0.0), quiet)
    assert tuple(manifest["splits"]) == ("train", "val") and "test_fraction" not in manifest["settings"]
    assert not [name for name in names(corpus / "prepared") if name.startswith("test")]
    before = (corpus / "prepared" / MANIFEST).read_bytes()
    told: list[str] = []
    assert prepare(config(corpus), told.append) == manifest
    assert any(line.startswith("reusing") for line in told) and (corpus / "prepared" / MANIFEST).read_bytes() == before


def test_another_share_is_another_folder(corpus):
    prepare(config(corpus), quiet)
    with pytest.raises(ConfigError, match=r"data\.test_fraction was 0\.0 and is now 0\.1"):
        prepare(config(corpus, test_fraction=0.1), quiet)
    prepare(config(corpus, test_fraction=0.1, path=str(corpus / "three")), quiet)
    with pytest.raises(ConfigError, match=r"data\.test_fraction was 0\.1 and is now 0\.0"):
        prepare(config(corpus, path=str(corpus / "three")), quiet)
    with pytest.raises(ConfigError, match=r"val_fraction=0\.4 and test_fraction=0\.6 leave no document to train on"):
        config(corpus, val_fraction=0.4, test_fraction=0.6)
    with pytest.raises(ConfigError, match="test_fraction: given -0.1"):
        config(corpus, test_fraction=-0.1)


def test_a_split_without_documents_is_refused(corpus):
    with pytest.raises(
        ConfigError, match=r"the test split is empty: 400 documents in all; take a larger data\.test_fr"
    ):
        prepare(config(corpus, test_fraction=1e-6), quiet)


def test_asking_for_what_there_is_not_names_the_setting(corpus):
    prepare(config(corpus), quiet)
    with pytest.raises(ConfigError, match=r"no split 'test'; it has train, val\. Set data\.test_fraction"):
        open_split(corpus / "prepared", "test")
    with pytest.raises(ConfigError, match=r"no split 'tset'; it has train, val$"):
        open_split(corpus / "prepared", "tset")


def test_a_killed_run_goes_on_with_all_three(corpus, monkeypatch):
    settings = {"test_fraction": 0.2, "val_overlap": 0.9}
    prepare(config(corpus, path=str(corpus / "whole"), **settings), quiet)
    hurry(monkeypatch)
    killed_at(monkeypatch, 60, 130, 300)
    for _ in range(3):
        with pytest.raises(Killed):
            prepare(config(corpus, **settings), quiet)
    with pytest.raises(ConfigError, match=r"was begun differently: data\.test_fraction was 0\.2 and is now 0\.0"):
        prepare(config(corpus, val_overlap=0.9), quiet)
    prepare(config(corpus, **settings), quiet)
    assert_same(corpus / "prepared", corpus / "whole")


def test_copies_and_near_copies_of_a_held_out_document_are_never_in_train(tmp_path):
    random = np.random.default_rng(3)
    words = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(400)]
    originals = [" ".join(random.choice(words, 60)) for _ in range(300)]
    apart = [text for text in originals if held_out(text, 0.1) or in_test(text, 0.1)]
    copies = [text.upper() + "!" for text in apart]
    copies = [text for text in copies if not held_out(text, 0.1) and not in_test(text, 0.1)]
    of_test = [text for text in copies if in_test(text[:-1].lower(), 0.1)]
    assert len(of_test) > 10 and len(copies) - len(of_test) > 10
    write_corpus(tmp_path / "corpus.jsonl", [*copies, *originals, *apart])
    settings = {"tokenizer": {"vocab_size": 320}, "test_fraction": 0.1}
    manifest = prepare(config(tmp_path, val_overlap=0.2, **settings), quiet)
    assert manifest["dropped"]["overlapping"] == len(copies) and manifest["dropped"]["duplicates"] == len(apart)
    found = splits_of(tmp_path / "prepared")
    assert not set(copies) & set(found["train"]) and sorted(found["val"] + found["test"]) == sorted(apart)
    prepare(config(tmp_path, path=str(tmp_path / "twice"), deduplicate=False, **settings), quiet)
    twice = splits_of(tmp_path / "twice")
    assert sorted(twice["test"]) == sorted(2 * found["test"]) and sorted(twice["val"]) == sorted(2 * found["val"])
    assert not set(twice["train"]) & {*twice["val"], *twice["test"]}


def test_the_tokenizer_sees_nothing_of_what_is_held_out(corpus):
    seen = sample(config(corpus, test_fraction=0.3))
    assert sorted(seen) == sorted(text for text in TEXTS if not held_out(text, 0.1) and not in_test(text, 0.3))


def test_a_mixture_has_all_three_and_shares_hold_over_them(tmp_path):
    write_corpus(tmp_path / "a.jsonl", TEXTS[:200])
    write_corpus(tmp_path / "b.jsonl", TEXTS[200:])
    sources = {
        name: {"weight": weight, "source": {"kind": "files", "paths": [str(tmp_path / f"{name}.jsonl")]}}
        for name, weight in (("a", 3), ("b", 1))
    }
    manifest = prepare(config(tmp_path, source={"kind": "mixture", "sources": sources}, test_fraction=0.2), quiet)
    totals = {name: sum(manifest["splits"][split]["sources"][name]["tokens"] for split in SPLITS) for name in sources}
    assert totals["a"] / totals["b"] == pytest.approx(3, rel=0.05)
    assert all(manifest["splits"]["test"]["sources"][name]["documents"] for name in sources)


def test_the_third_split_is_shown_and_verified(corpus):
    prepare(config(corpus, test_fraction=0.2), quiet)
    folder = corpus / "prepared"
    console = Console(width=100, record=True, file=(corpus / "shown").open("w"))
    inspect(folder, console)
    assert f"{open_split(folder, 'test').documents}" in console.export_text().split("\ntest")[1]
    verify_folder(folder)
    shard = folder / "test-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"test-00000\.bin: SHA-256"):
        verify_folder(folder)


def test_token_files_of_a_third_split_are_taken_if_there_are_any(tmp_path):
    ids = np.array([5, 6, 7, 50256] * 20, dtype=np.uint16)
    for number, name in enumerate(SPLITS, start=1):
        ids[: 4 * number].tofile(tmp_path / f"{name}.bin")
    import_nanogpt(tmp_path, tmp_path / "out", log=quiet)
    assert {name: open_split(tmp_path / "out", name).documents for name in SPLITS} == {"train": 1, "val": 2, "test": 3}
    (tmp_path / "test.bin").unlink()
    import_nanogpt(tmp_path, tmp_path / "two", log=quiet)
    assert list(json.loads((tmp_path / "two" / MANIFEST).read_text())["splits"]) == ["train", "val"]
    with pytest.raises(ConfigError, match=r"no split 'test'; it has train, val\. Import a folder in which there is"):
        open_split(tmp_path / "two", "test")
