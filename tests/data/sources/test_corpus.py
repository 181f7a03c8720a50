"""Sources: every kind is read whole and in order; every kind of damage is named by file and place."""

import gzip
import json
import re

import pytest

from common.errors import ConfigError
from data.sources.corpus import (
    Part,
    check_columns,
    documents,
    parts_of,
    read,
)
from tests.support.source_files import files, write_parquet, write_rows, write_zst

TEXTS = ["first", "second\nwith a line", "dritte, größer 🎉", "a\tb\r\n"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()


# ---- files


def test_text_file_is_one_document(tmp_path):
    content = "a\n\nb\r\n \tc\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert list(documents(files(tmp_path / "a.txt"))) == [content]


def test_text_file_is_split_at_a_separator(tmp_path):
    texts = [f"text {i}\nline" + "x" * (i % 7) for i in range(60_000)]
    (tmp_path / "a.txt").write_text("<|end|>".join(texts))  # more than a megabyte: several reads
    assert list(documents(files(tmp_path / "a.txt", separator="<|end|>"))) == texts
    (tmp_path / "b.txt").write_text("a\n\nb\n\n\n\n")
    assert list(documents(files(tmp_path / "b.txt", separator="\n\n"))) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_rows_of_every_format(tmp_path, name):
    write_rows(tmp_path / name, TEXTS)
    assert list(documents(files(tmp_path / name))) == TEXTS


def test_a_blank_line_is_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"\n", b"\n \n", 1))
    assert list(documents(files(tmp_path / "a.jsonl"))) == TEXTS


def test_globs_are_sorted_and_files_read_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "[d].txt").write_text("d")
    source = files(tmp_path / "c.txt", tmp_path / "*.txt", tmp_path / "deep" / "[d].txt", tmp_path / "**/*.txt")
    assert list(documents(source)) == ["c", "a", "b", "d"]


def test_empty_documents_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": " \\n"}\n{"text": null}\n')
    assert list(documents(files(tmp_path / "a.jsonl"))) == ["x"]
    assert [document.text for document in read(parts_of(files(tmp_path / "a.jsonl")))] == ["", "x", " \n", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nfine\nbad \xff\n", "a.txt, line 3: invalid UTF-8"),
        ("a.txt", b" \n\n", "no document holds any text"),
        ("a.txt", b"", "no document holds any text"),
        ("a.jsonl", LINES + b"[1]\n", "a.jsonl, line 5: the line is no JSON object"),
        ("a.jsonl", LINES + b'{"text": "x"\n', "a.jsonl, line 5: not valid JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl, line 1: not valid JSON"),
        (
            "a.jsonl",
            LINES + b'{"body": "x"}\n',
            "a.jsonl, line 5: no field 'text'; set data.source.text_field to one of body",
        ),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' is a int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: 'text' holds half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xc3"}\n', "a.jsonl, line 1: invalid UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "a.jsonl.gz: unreadable after line"),
        ("a.jsonl.gz", LINES, "a.jsonl.gz: unreadable after line 0"),
        ("a.jsonl.zst", LINES, "a.jsonl.zst: unreadable after line 0"),
        ("a.parquet", LINES, "a.parquet: unreadable after row 0 (row group 0)"),
        ("a.csv", LINES, "a.csv: cannot read this type of file"),
    ],
)
def test_damage_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        list(documents(files(tmp_path / name)))


def test_truncated_zst(tmp_path):
    write_zst(tmp_path / "whole.zst", LINES * 1000)
    (tmp_path / "a.jsonl.zst").write_bytes((tmp_path / "whole.zst").read_bytes()[:-9])
    with pytest.raises(ConfigError, match="a.jsonl.zst: unreadable after line"):
        list(documents(files(tmp_path / "a.jsonl.zst")))


def test_parquet_without_the_column_or_with_another_type(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=TEXTS, n=[1] * 4)
    with pytest.raises(
        ConfigError, match=r"a\.parquet: no column 'text'; set data.source.text_field to one of body, n"
    ):
        list(documents(files(tmp_path / "a.parquet")))
    assert list(documents(files(tmp_path / "a.parquet", text_field="body"))) == TEXTS
    with pytest.raises(ConfigError, match=r"a\.parquet: 'n' is int64, not a string"):
        list(documents(files(tmp_path / "a.parquet", text_field="n")))


def test_parquet_damaged_in_its_pages(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, text=[f"text {i}" * 50 for i in range(8)])
    content = bytearray(file.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet(: unreadable after|,) row \d \(row group \d\)"):
        list(documents(files(file)))


def test_paths_that_match_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing-\*\.txt matches no file"):
        list(documents(files(tmp_path / "nothing-*.txt")))
    with pytest.raises(ConfigError, match="is a folder"):
        list(documents(files(tmp_path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_reading_begins_at_any_document(tmp_path, name):
    texts = [f"text {number}" for number in range(7)]
    write_rows(tmp_path / name, texts)
    write_rows(tmp_path / "b.jsonl", texts)
    parts = parts_of(files(tmp_path / name, tmp_path / "b.jsonl", separator="|"))
    whole = list(read(parts))
    assert [document.text for document in whole] == texts * 2
    shares = [document.share for document in whole]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
    for place, document in enumerate(whole):
        assert list(read(parts, document.part, document.next_row)) == whole[place + 1 :]


def test_files_of_different_schemas_are_noticed_before_reading(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=TEXTS)
    write_parquet(tmp_path / "b.parquet", text=TEXTS)
    check_columns(parts_of(files(tmp_path / "*.parquet")))
    write_parquet(tmp_path / "b.parquet", text=[1, 2])
    with pytest.raises(ConfigError, match=r"b\.parquet: 'text' is int64, not a string"):
        check_columns(parts_of(files(tmp_path / "*.parquet")))
    write_parquet(tmp_path / "b.parquet", content=TEXTS)
    with pytest.raises(ConfigError, match=r"b\.parquet: no column 'text'; .* content"):
        check_columns(parts_of(files(tmp_path / "*.parquet")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_files_of_another_file_system(tmp_path, name):
    import fsspec

    write_rows(tmp_path / name, TEXTS)
    content = (tmp_path / name).read_bytes()
    with fsspec.open(f"memory://{name}", "wb") as stream:
        stream.write(content)
    parts = [Part(f"memory://{name}", len(content))]
    check_columns(parts)
    assert [document.text for document in read(parts)] == TEXTS
    with pytest.raises(ConfigError, match="memory://none.parquet: unreadable after row 0 .* check the network"):
        list(read([Part("memory://none.parquet", 1)]))
