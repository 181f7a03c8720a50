"""Preparation: what the folder holds, and that it is reproducible."""

from collections import Counter

import numpy as np
import pytest

from common.errors import ConfigError
from data import pipeline, tokenizer_training, writing
from data.manifest import read_manifest
from data.prepare import prepare
from data.shards import open_split, verify_folder
from data.tokenizer import Tokenizer
from tests.support.corpus import TEXTS, assert_same, config, decoded, held_out, hurry, names, quiet, text, write_corpus


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
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 4000)
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
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 3000)  # duplicates within a batch and across batches
    write_corpus(corpus / "corpus.jsonl", [*TEXTS, TEXTS[3], TEXTS[3], "", " ", *TEXTS[:50], "one more"])
    manifest = prepare(config(corpus), quiet)
    assert manifest["dropped"] == {"empty": 2, "short": 0, "duplicates": 52, "overlapping": 0}
    assert sorted(decoded(corpus / "prepared", "train") + decoded(corpus / "prepared", "val")) == sorted(
        [*TEXTS, "one more"]
    )


def test_seen_hashes_are_a_set():
    random = np.random.default_rng(0)
    seen, known = writing.Seen(), set()
    digests = random.integers(1, 5000, size=10_000).astype(np.uint64) * np.uint64(1 << 6)  # many with equal low bits
    for digest in [*digests.tolist(), 0, 2**64 - 1, 0]:
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    assert len(seen) == len(known) > 3000


def test_a_limit_takes_the_first_documents(corpus):
    prepare(config(corpus, limit_documents=100), quiet)
    found = decoded(corpus / "prepared", "train") + decoded(corpus / "prepared", "val")
    assert sorted(found) == sorted(TEXTS[:100])


@pytest.mark.slow
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
    sample = tokenizer_training.sample(cfg)
    size = sum(map(len, sample))
    assert 19_000 < size <= 20_000
    assert not any(held_out(text, cfg.val_fraction) for text in sample)
    places = sorted(TEXTS.index(text) for text in sample)
    assert places[0] < 60 and places[-1] > 340  # from the whole of the corpus
    write_corpus(corpus / "corpus.jsonl", [*reversed(TEXTS), *TEXTS])
    assert tokenizer_training.sample(cfg) == sample


def test_every_document_of_parquet_files_is_taken(corpus, monkeypatch):
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
