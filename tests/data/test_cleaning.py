"""Cleaning and mixtures: what is dropped, that held-out text and its near copies are never in train, and shares."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from data import pipeline
from data.manifest import read_manifest
from data.overlap import RUN_WORDS, overlap, runs_of, union
from data.prepare import prepare
from data.shards import open_split
from tests.support.corpus import (
    TEXTS,
    Killed,
    assert_same,
    config,
    decoded,
    held_out,
    hurry,
    killed_at,
    quiet,
    text,
    write_corpus,
)

LETTERS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx", "yz"]


def prose(seed: int, words: int = 60) -> str:
    """Words that no other seed repeats in the same order."""
    random = np.random.default_rng(seed)
    return " ".join("".join(random.choice(LETTERS, size=3)) for _ in range(words))


# ---- runs of words


def test_copies_that_look_different_have_the_same_runs():
    plain = "the harmonic loss measures how far a hidden state is from each of the prototypes of a vocabulary"
    altered = (
        "The harmonic loss measures, how far\na hidden   STATE is -- from each of the (prototypes) of a Vocabulary."
    )
    assert len(runs_of(plain)) == len(plain.split()) - RUN_WORDS + 1
    np.testing.assert_array_equal(runs_of(plain), runs_of(altered))
    assert overlap(runs_of("x y z " + plain), runs_of(plain)) == pytest.approx(6 / 9)
    assert overlap(runs_of(plain.replace("hidden", "visible")), runs_of(plain)) == 0  # a word in the middle of all runs
    assert len(runs_of("")) == len(runs_of(" -- ")) == 0
    assert overlap(runs_of("Two  words"), runs_of("two words!")) == 1
    assert overlap(runs_of("two words and more"), runs_of("two words")) == 0


def test_text_without_blanks_is_compared_by_characters():
    assert len(runs_of("調和損失は隠れ状態と各プロトタイプの距離を測る")) == 23 - RUN_WORDS + 1


@given(st.lists(st.sets(st.integers(0, 2**64 - 1))))
def test_the_union_is_that_of_sets(sets):
    parts = [np.array(sorted(values), dtype=np.uint64) for values in sets]
    assert union(iter(parts)).tolist() == sorted(set().union(*sets))


# ---- cleaning


def test_short_documents_are_dropped(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", [*TEXTS, "x" * 19, "é" * 20, "", "y" * 19])
    manifest = prepare(config(tmp_path, min_chars=20), quiet)
    assert manifest["dropped"] == {"empty": 1, "short": 2, "duplicates": 0, "overlapping": 0}
    found = decoded(tmp_path / "prepared", "train") + decoded(tmp_path / "prepared", "val")
    assert sorted(found) == sorted([*TEXTS, "é" * 20])


def test_duplicates_may_stay(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", [*TEXTS, *TEXTS[:50]])
    manifest = prepare(config(tmp_path, deduplicate=False), quiet)
    assert manifest["dropped"]["duplicates"] == 0
    train, val = decoded(tmp_path / "prepared", "train"), decoded(tmp_path / "prepared", "val")
    assert sorted(train + val) == sorted([*TEXTS, *TEXTS[:50]])
    assert not set(train) & set(val)


def near_copies(tmp_path: Path) -> tuple[list[str], list[str]]:
    """Writes a corpus; returns its documents, and the near copies of held-out ones among them."""
    originals = [prose(seed) for seed in range(200)]
    val = [text for text in originals if held_out(text, 0.1)]
    assert len(val) > 8
    copies = []
    for number, source in enumerate(val):
        words = source.split()
        halves = [" ".join(words[:30]), prose(10_000 + number, 30)]  # 18 of its 48 runs, so 0.375
        quoted = prose(20_000 + number, 54) + " " + " ".join(words[20:36])  # 4 of 58: a quotation
        # The hash must not hold them out themselves.
        copies += [text for text in ("\n".join(halves), source.upper() + "!") if not held_out(text, 0.1)]
        originals += [quoted]
    documents = [*copies[::2], *originals, *copies[1::2]]  # before the originals and after them
    write_corpus(tmp_path / "corpus.jsonl", documents)
    return documents, copies


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_near_copies_of_held_out_documents_are_never_in_train(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 3000)
    documents, copies = near_copies(tmp_path)
    manifest = prepare(config(tmp_path, val_overlap=0.2, tokenizer={"vocab_size": 320}), quiet, workers)
    assert manifest["dropped"]["overlapping"] == len(copies) > 10
    train, val = decoded(tmp_path / "prepared", "train"), decoded(tmp_path / "prepared", "val")
    assert val == [text for text in documents if held_out(text, 0.1)]
    assert train == [text for text in documents if not held_out(text, 0.1) and text not in copies]
    known = union(runs_of(text) for text in val)
    assert max(overlap(runs_of(text), known) for text in train) < 0.2


def test_near_copies_stay_if_nobody_asks(tmp_path):
    documents, _ = near_copies(tmp_path)
    manifest = prepare(config(tmp_path, tokenizer={"vocab_size": 320}), quiet)
    assert manifest["dropped"] == {"empty": 0, "short": 0, "duplicates": 0, "overlapping": 0}
    assert sum(entry["documents"] for entry in manifest["splits"].values()) == len(documents)


def test_a_killed_run_keeps_the_held_out_runs(tmp_path, monkeypatch):
    near_copies(tmp_path)
    settings = {"val_overlap": 0.2, "tokenizer": {"vocab_size": 320}}
    prepare(config(tmp_path, path=str(tmp_path / "whole"), **settings), quiet)
    hurry(monkeypatch)
    killed_at(monkeypatch, 100, 150)
    for _ in range(2):
        with pytest.raises(Killed):
            prepare(config(tmp_path, **settings), quiet)
        monkeypatch.setattr(pipeline, "HeldOutRuns", lambda *_: pytest.fail("they were looked for again"))
    prepare(config(tmp_path, **settings), quiet)
    assert_same(tmp_path / "prepared", tmp_path / "whole")


# ---- mixtures


@pytest.fixture
def mixture(tmp_path) -> dict:
    """Three sources: the second has long documents, the third shares some with the first."""
    sources = {
        "web": [text(number) for number in range(300)],
        "books": [" ".join(text(1000 + number + k) for k in range(0, 8)) for number in range(0, 320, 8)],
        "code": [text(2000 + number) for number in range(90)] + [text(number) for number in range(10)],
    }
    for name, texts in sources.items():
        write_corpus(tmp_path / f"{name}.jsonl", texts)
    return {
        "kind": "mixture",
        "sources": {
            name: {"weight": weight, "source": {"kind": "files", "paths": [str(tmp_path / f"{name}.jsonl")]}}
            for name, weight in {"web": 5, "books": 3.5, "code": 1.5}.items()
        },
    }


def texts_of(folder: Path, source: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{source}.jsonl").read_text().splitlines()]


def documents_by_source(folder: Path) -> Iterator[tuple[str, str]]:
    for name in ("train", "val"):
        split = open_split(folder, name)
        for number, found in zip(split.document_sources().tolist(), decoded(folder, name), strict=True):
            yield split.sources[number], found


def test_shares_are_as_the_weights_and_every_document_knows_its_source(tmp_path, mixture):
    told: list[str] = []
    manifest = prepare(config(tmp_path, source=mixture), told.append)
    folder = tmp_path / "prepared"
    assert manifest["sources"] == ["web", "books", "code"]
    totals = {
        name: sum(manifest["splits"][split]["sources"][name]["tokens"] for split in ("train", "val"))
        for name in manifest["sources"]
    }
    longest = max(np.diff(open_split(folder, "train").document_starts()).max(), 1)
    whole = sum(totals.values())
    for name, weight in {"web": 0.5, "books": 0.35, "code": 0.15}.items():
        assert abs(totals[name] - weight * whole) <= 2 * longest
    (line,) = (line for line in told if "the mixture ends" in line)
    ended = line.split(" with ")[1].split(",")[0]
    found = list(documents_by_source(folder))
    for name in totals:
        texts = [text for source, text in found if source == name]
        raw = texts_of(tmp_path, name)
        assert set(texts) <= set(raw)
        assert (set(raw) <= {text for _, text in found}) == (name == ended)
    for split in ("train", "val"):
        data, entry = open_split(folder, split), manifest["splits"][split]
        assert data.source_counts == entry["sources"]
        assert sum(counts["tokens"] for counts in data.source_counts.values()) == data.tokens
        of_tokens = data.token_sources(np.arange(data.tokens))
        np.testing.assert_array_equal(
            np.bincount(of_tokens, minlength=3), [data.source_counts[name]["tokens"] for name in data.sources]
        )
        lengths = np.diff(data.document_starts(), append=data.tokens)
        np.testing.assert_array_equal(of_tokens, np.repeat(data.document_sources(), lengths))
        for number, name in enumerate(data.sources):
            here = data.document_sources() == number
            assert data.source_counts[name]["documents"] == here.sum()
            assert data.source_counts[name]["text_bytes"] == data.document_bytes()[here].sum()


@pytest.mark.slow
def test_a_mixture_is_the_same_for_any_number_of_processes_and_after_kills(tmp_path, mixture, monkeypatch):
    settings = {"source": mixture, "val_overlap": 0.5, "min_chars": 10}
    prepare(config(tmp_path, path=str(tmp_path / "whole"), **settings), quiet)
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 3000)
    prepare(config(tmp_path, path=str(tmp_path / "two"), **settings), quiet, 2)
    assert_same(tmp_path / "two", tmp_path / "whole")
    hurry(monkeypatch)
    killed_at(monkeypatch, 50, 120, 170)
    for _ in range(3):
        with pytest.raises(Killed):
            prepare(config(tmp_path, **settings), quiet)
    prepare(config(tmp_path, **settings), quiet)
    assert_same(tmp_path / "prepared", tmp_path / "whole")


def test_duplicates_across_sources_are_dropped_once(tmp_path, mixture):
    mixture["sources"]["code"]["weight"] = 1000.0
    mixture["sources"]["books"]["weight"] = 0.001
    manifest = prepare(config(tmp_path, source=mixture, val_fraction=0.3), quiet)
    found = [text for _, text in documents_by_source(tmp_path / "prepared")]
    assert len(set(found)) == len(found)
    assert manifest["dropped"]["duplicates"] >= 1  # the first documents of web are among those of code


def test_a_mixture_with_a_limit_and_with_an_empty_source(tmp_path, mixture):
    manifest = prepare(config(tmp_path, source=mixture, limit_documents=60, path=str(tmp_path / "limited")), quiet)
    assert sum(entry["documents"] for entry in manifest["splits"].values()) == 60
    (tmp_path / "code.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ConfigError, match="no document holds any text"):
        prepare(config(tmp_path, source=mixture), quiet)
    assert read_manifest(tmp_path / "limited") == manifest


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "source.sources: given an empty mapping"),
        ({"a": {"weight": 0, "source": {"kind": "embedded"}}}, "source.sources.a.weight: given 0"),
        ({"a": {"source": {"kind": "embedded"}}}, "source.sources.a.weight: missing"),
        ({"a": {"weight": 1, "source": {"kind": "mixture"}}}, 'source.sources.a.source.kind: given "mixture"'),
    ],
)
def test_mixtures_that_are_none(tmp_path, sources, message):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, source={"kind": "mixture", "sources": sources})
    assert message in str(error.value)
