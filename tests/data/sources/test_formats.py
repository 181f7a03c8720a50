"""What tools of others write: byte-order marks, other encodings, JSON at its edges, columns of every kind of text."""

import codecs
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import ipc, parquet

from common.errors import ConfigError
from data.prepare import prepare
from data.sources.corpus import check_columns, documents, parts_of, read
from data.texts import Texts
from tests.data.sources.test_corpus import TEXTS
from tests.support.corpus import TEXTS as MANY
from tests.support.corpus import Killed, assert_same, config, hurry, killed_at, quiet
from tests.support.source_files import files, write_rows, write_zst

ROW = b'{"text": "one two"}\n'


def read_all(path: Path, **settings: str) -> list[str]:
    return [document.text for document in read(parts_of(files(path, **settings)))]


def error_of(path: Path, **settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_all(path, **settings)
    return str(caught.value)


# ---- byte order marks and encodings


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt"])
@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
def test_a_mark_at_the_start_of_a_file_is_no_text(tmp_path, name, pack):
    content = codecs.BOM_UTF8 + (b"one two\r\n" if name == "a.txt" else ROW.replace(b"\n", b"\r\n"))
    path = tmp_path / f"{name}{pack}"
    if pack == ".zst":
        write_zst(path, content)
    else:
        path.write_bytes(gzip.compress(content) if pack else content)
    assert read_all(path) == (["one two\r\n"] if name == "a.txt" else ["one two"])


def test_marks_of_files_that_were_joined_are_no_json_and_are_characters_of_plain_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(3 * (codecs.BOM_UTF8 + ROW))
    assert read_all(tmp_path / "a.jsonl") == ["one two"] * 3
    (tmp_path / "a.jsonl.gz").write_bytes(2 * gzip.compress(codecs.BOM_UTF8 + ROW))
    assert read_all(tmp_path / "a.jsonl.gz") == ["one two"] * 2
    (tmp_path / "a.txt").write_bytes(2 * (codecs.BOM_UTF8 + b"x\n"))
    assert read_all(tmp_path / "a.txt") == ["x\n\ufeffx\n"]
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8)
    assert read_all(tmp_path / "b.jsonl") == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named_with_a_remedy(tmp_path, name, encoding):
    content = ROW.decode().encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = encoding.upper().removesuffix("-LE").removesuffix("-BE")
    assert re.search(rf"{name}: the text is {found}.*convert it, .*iconv -f {found}", error_of(tmp_path / name))


def test_text_that_is_scored_follows_the_same_rules(tmp_path):
    class Bytes:
        vocab_size, eos_id, sha256 = 256, 0, ""

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    (tmp_path / "a").write_bytes(codecs.BOM_UTF8 + b"hi")
    assert Texts([tmp_path / "a"], Bytes()).text_bytes == 2
    (tmp_path / "a").write_text("hi", encoding="utf-16")
    with pytest.raises(ConfigError, match="the text is UTF-16"):
        Texts([tmp_path / "a"], Bytes())


# ---- JSON


@pytest.mark.parametrize(
    "other",
    [
        "1" * 5000,
        "-" + "9" * 100_000,
        "NaN",
        "-Infinity",
        "1e999",
        '"\\ud800"',
        '{"a": 1, "a": 2}',
        "[" * 500 + "]" * 500,
    ],
    ids=lambda other: other[:12],
)
def test_what_stands_beside_the_text_does_no_harm(tmp_path, other):
    (tmp_path / "a.jsonl").write_text(f'{{"n": {other}, "text": "one two"}}\n')
    assert read_all(tmp_path / "a.jsonl") == ["one two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ('{"text": "a", "text": "b"}', "'text' is given more than once; leave one"),
        ('{"text": ' + "1" * 5000 + "}", "'text' is a float, not a string"),
        ('{"text": NaN}', "'text' is a float, not a string"),
        ("\0\0\0", "not valid JSON"),
        ('{"text": "a\0b"}', "not valid JSON"),
        ("{}", "no field 'text'; the object is empty"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ('[{"text": "a"}, {"text": "b"}]', "no JSON object; expected .*one array, `jq -c '.\\[\\]' OLD > NEW.jsonl`"),
        ("[", "not valid JSON .*one array, `jq -c"),
        ("{", "not valid JSON .*goes on in the next line, `jq -c . OLD > NEW.jsonl`"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    (tmp_path / "a.json").write_text(ROW.decode() + line + "\n")
    assert re.search(rf"a\.json, line 2: .*{message}", error_of(tmp_path / "a.json"))


def test_a_file_that_is_one_array_or_printed_over_several_lines_is_refused_with_a_remedy(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert re.search(r"a\.json, line 1: .*jq -c '\.\[\]'", error_of(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(json.dumps(rows[0], indent=1))
    assert re.search(r"a\.json, line 1: .*jq -c \. ", error_of(tmp_path / "a.json"))


# ---- columns


def write_stream(path: Path, table: Any, rows: int | None = None) -> None:
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(path: Path, table: Any, rows: int | None = None) -> None:
    with ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_parquet(path: Path, table: Any, rows: int | None = None) -> None:
    parquet.write_table(table, path, row_group_size=rows)


WRITERS = [(".parquet", write_parquet), (".arrow", write_stream), (".arrow", write_file)]
Write = Callable[..., None]
BYTES = [None if text is None else text.encode() for text in [*TEXTS, None]]


def column(kind: str) -> Any:
    if kind.startswith("dictionary of "):
        return column(kind.removeprefix("dictionary of ")).dictionary_encode()
    return pyarrow.array(BYTES).cast(getattr(pyarrow, kind)())


KINDS = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
KINDS += [f"dictionary of {kind}" for kind in ("string", "large_string", "binary", "large_binary")]


@pytest.mark.parametrize(("end", "write"), WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_text_column_is_read(tmp_path, end, write, kind):
    path = tmp_path / f"a{end}"
    write(path, pyarrow.table({"n": range(5), "text": column(kind)}), 2)
    check_columns(parts_of(files(path)))
    assert read_all(path) == [*TEXTS, ""]


@pytest.mark.parametrize(("end", "write"), WRITERS)
@pytest.mark.parametrize("kind", ["binary", "string", "dictionary", "binary_view"])
def test_bytes_that_are_no_utf_8_are_named_by_row(tmp_path, end, write, kind):
    found = pyarrow.array([b"a"] * 300 + [b"\xff\xfe"])
    if kind != "binary_view":
        found = found if kind == "binary" else found.view(pyarrow.string())
    else:
        found = found.cast(pyarrow.binary_view())
    write(tmp_path / f"a{end}", pyarrow.table({"text": found.dictionary_encode() if kind == "dictionary" else found}))
    assert re.search(rf"a\{end}, row 300\b.*: invalid UTF-8", error_of(tmp_path / f"a{end}"))


@pytest.mark.parametrize(("end", "write"), WRITERS)
@pytest.mark.parametrize(
    "values",
    [
        [1],
        [["a"]],
        [{"a": "b"}],
        [True],
        pyarrow.array([1]).dictionary_encode(),
        pyarrow.array([b"ab"], pyarrow.binary(2)),
    ],
)
def test_columns_of_other_kinds_are_refused(tmp_path, end, write, values):
    write(tmp_path / f"a{end}", pyarrow.table({"text": values}))
    with pytest.raises(ConfigError, match=r"'text' is .*, not a string; choose a column"):
        check_columns(parts_of(files(tmp_path / f"a{end}")))
    write(tmp_path / f"a{end}", pyarrow.table({"body": ["a"]}))
    with pytest.raises(ConfigError, match="no column 'text'; set data.source.text_field to one of body"):
        check_columns(parts_of(files(tmp_path / f"a{end}")))


@pytest.mark.parametrize(("end", "write"), WRITERS)
def test_two_columns_of_one_name_are_refused(tmp_path, end, write):
    write(tmp_path / f"a{end}", pyarrow.table([["a"], ["b"]], names=["text", "text"]))
    assert "2 columns are named 'text'" in error_of(tmp_path / f"a{end}")


@pytest.mark.parametrize("write", [write_stream, write_file])
def test_damaged_arrow_files_are_named(tmp_path, write):
    path = tmp_path / "a.arrow"
    write(path, pyarrow.table({"text": [f"text {n}" for n in range(1000)]}), 100)
    whole = path.read_bytes()
    for content in (b"", b"garbage", ROW, whole[: len(whole) // 2 + 3], whole[:40], b"ARROW1" + bytes(100)):
        path.write_bytes(content)
        assert re.search(r"a\.arrow: unreadable after row \d+ .*whole copy", error_of(path))
    start = whole.index(b"text 0text 1") - 300  # within the offsets of the first batch
    path.write_bytes(whole[:start] + b"\xff" * 200 + whole[start + 200 :])
    assert re.search(r"a\.arrow(: unreadable after|,) row \d+", error_of(path))


# ---- resumption


def write_in(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"text": texts})
    if path.suffix == ".arrow":
        (write_stream if path.stem == "stream" else write_file)(path, table, 30)
    elif path.suffix == ".parquet":
        write_parquet(path, table.set_column(0, "text", table["text"].combine_chunks().dictionary_encode()), 30)
    else:
        write_rows(path, texts)


NAMES = ["a.json", "a.json.gz", "a.json.zst", "a.ndjson", "stream.arrow", "file.arrow", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_reading_begins_at_any_row(tmp_path, name):
    write_in(tmp_path / name, MANY[:70])
    parts = parts_of(files(tmp_path / name))
    whole = list(read(parts))
    assert [document.text for document in whole] == MANY[:70]
    shares = [document.share for document in whole]
    assert shares == sorted(shares) and shares[0] > 0 and 0.9 < shares[-1] <= 1
    for place in (0, 28, 29, 30, 59, 68):
        assert list(read(parts, 0, whole[place].next_row)) == whole[place + 1 :]
    assert list(documents(files(tmp_path / name), 3)) == MANY[:3]


@pytest.mark.parametrize("name", ["a.json.gz", "stream.arrow", "file.arrow", "a.parquet"])
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path, name, monkeypatch):
    write_in(tmp_path / name, MANY)
    source = {"kind": "files", "paths": [str(tmp_path / name)]}
    prepare(config(tmp_path, source=source, path=str(tmp_path / "whole")), quiet, workers=1)
    hurry(monkeypatch)
    killed_at(monkeypatch, 137)
    with pytest.raises(Killed):
        prepare(config(tmp_path, source=source), quiet, workers=1)
    told: list[str] = []
    prepare(config(tmp_path, source=source), told.append, workers=1)
    assert re.search("going on with .*: [1-9]", "\n".join(told))
    assert_same(tmp_path / "prepared", tmp_path / "whole")
