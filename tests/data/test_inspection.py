"""Inspection: the statistics are those of the documents."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from data import inspection as module
from data.__main__ import main
from data.inspection import Statistics, statistics
from data.nanogpt import import_nanogpt
from data.prepare import prepare
from data.shards import open_split
from data.tokenizer import Tokenizer
from tests.data.test_nanogpt import some_streams, write
from tests.support.corpus import TEXTS, config, decoded, quiet, settings, write_corpus
from tests.support.shards import make_folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspection")
    write_corpus(folder / "corpus.jsonl", [*TEXTS, "🎉 [bold] ☃"])
    prepare(config(folder), quiet)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": settings(folder)}))
    return folder


def test_counts_and_lengths_are_those_of_the_documents(prepared, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1000)
    folder = prepared / "prepared"
    tokenizer, split = Tokenizer(folder / "tokenizer.model"), open_split(folder, "train")
    found = statistics(split)
    documents = [tokenizer.encode(text) for text in decoded(folder, "train")]
    assert found.lengths.tolist() == [len(ids) for ids in documents]
    counts = Counter(i for ids in documents for i in (*ids, tokenizer.eos_id))
    assert {i: n for i, n in enumerate(found.counts.tolist()) if n} == counts
    assert [n for _, n in found.frequent()] == sorted(counts.values(), reverse=True)[:20]
    in_bytes = sum(n for i, n in counts.items() if tokenizer.piece(i).startswith("<0x"))
    assert found.share(tokenizer.byte_ids()) == in_bytes / split.tokens > 0
    assert len(tokenizer.byte_ids()) == 256


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_the_histogram_holds_every_document_once(lengths):
    found = Statistics(np.array(lengths), np.zeros(1, dtype=np.int64))
    histogram = found.histogram()
    assert [count for _, _, count in histogram] == [
        sum(low <= length <= high for length in lengths) for low, high, _ in histogram
    ]
    assert sum(count for _, _, count in histogram) == len(lengths)
    assert found.quantiles()[0] == min(lengths) and found.quantiles()[1] == max(lengths)
    assert found.quantiles()[0.5] == sorted(lengths)[(len(lengths) - 1) // 2]


def test_the_command(prepared, capsys):
    assert main(["inspect", str(prepared / "config.yaml")]) == 0
    told = capsys.readouterr().out
    for expected in (
        "train",
        "val",
        "bytes/token",
        "tokens per document: 0% ",
        "single bytes",
        "most frequent: '",
        "#",
    ):
        assert expected in told
    val = decoded(prepared / "prepared", "val")
    assert any(text.split("\n")[0][:60] in told for text in val)
    assert main(["inspect", str(prepared / "config.yaml"), f"data.path={prepared / 'none'}"]) == 2
    assert "no prepared data here" in capsys.readouterr().err


def test_imported_data_without_a_vocabulary(tmp_path, capsys):
    import_nanogpt(write(tmp_path / "in", **some_streams()), tmp_path / "out", log=quiet)
    module.inspect(tmp_path / "out")
    told = capsys.readouterr().out
    assert "imported without a vocabulary" in told and "50256 0." in told and "single bytes" not in told


def test_a_tokenizer_of_others_is_refused(prepared, tmp_path):
    make_folder(tmp_path / "data", train=[np.arange(5)])
    (tmp_path / "data" / "tokenizer.model").write_bytes((prepared / "prepared" / "tokenizer.model").read_bytes())
    with pytest.raises(ConfigError, match="tokenizer.model: SHA-256"):
        module.inspect(tmp_path / "data")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    make_folder(tmp_path / "data", vocab_size=50, train=[np.array([1, 99])])
    with pytest.raises(ConfigError, match="holds id 99, but its vocabulary is 50"):
        statistics(open_split(tmp_path / "data", "train"))
