"""A folder that was prepared is reused, and refused if it was prepared differently or is damaged."""

import shutil

import pytest

from common.errors import ConfigError
from data.prepare import prepare
from data.shards import verify_folder
from tests.support.corpus import TEXTS, config, names, quiet, write_corpus


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
