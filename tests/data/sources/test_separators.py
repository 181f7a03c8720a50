"""A separator that is nowhere is told, and why."""

import gzip
from pathlib import Path

import pytest

from common.errors import ConfigError
from data.prepare import prepare
from data.sources import separators as module
from data.sources.corpus import documents, parts_of
from data.sources.separators import check_separators
from tests.support.corpus import TEXTS, config, quiet
from tests.support.source_files import files


def check(path: Path, separator: str) -> list[str]:
    told: list[str] = []
    check_separators(parts_of(files(path, separator=separator)), told.append)
    return told


@pytest.mark.parametrize(
    ("content", "separator", "message"),
    [
        ("a\r\n\r\nb", "\n\n", r"a.txt: data.source.separator '\\n\\n' is not in it, but '\\r\\n\\r\\n' is: .*Windows"),
        ("a\n\nb", "\r\n\r\n", r"'\\r\\n\\r\\n' is not in it, but '\\n\\n' is: .*Unix line ends"),
        ("a\r\rb", "\n\n", r"but '\\r\\r' is: .*old Mac line ends"),
        ("a\r\n---\r\nb", "\n---\n", "Windows line ends"),
        ("a\n\nb", r"\n\n", r"but '\\n\\n' is: a backslash is itself .* double quotes"),
        ("a\r\n\r\nb", r"\n\n", r"but '\\r\\n\\r\\n' is: "),
        ("a<|end|>b", "<|endoftext|>", "'<|endoftext|>' is not in it; set it to what stands between .* leave it out"),
    ],
)
def test_a_separator_that_is_nowhere_is_refused_with_its_cause(tmp_path, content, separator, message):
    (tmp_path / "a.txt").write_bytes(content.encode())
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        check(tmp_path / "a.txt", separator)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ConfigError, match=message.replace("|", r"\|").replace("a.txt", "a.txt.gz")):
        check(tmp_path / "a.txt.gz", separator)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_a_separator_is_found_wherever_it_is(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    for text in ("|x|", "größer", "\n\n", "|"):
        (tmp_path / "a.txt").write_text(f"a {text[:-1]} {text}")
        assert check(tmp_path / "a.txt", text) == []


def test_files_of_one_document_among_others_are_told(tmp_path):
    for name, content in (("a", "x|y"), ("b", "x"), ("c", "y")):
        (tmp_path / f"{name}.txt").write_text(content)
    (told,) = check(tmp_path / "*.txt", "|")
    assert told.startswith("2 of 3 .txt files do not hold data.source.separator '|'") and told.endswith("b.txt")
    (tmp_path / "b.txt").write_text("x\r\n\r\ny")
    (tmp_path / "a.txt").write_text("x\n\ny")
    with pytest.raises(ConfigError, match=r"b\.txt: .*Windows line ends"):
        check(tmp_path / "*.txt", "\n\n")


def test_without_text_files_there_is_nothing_to_tell(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert check(tmp_path / "a.jsonl", "|") == []


def test_preparation_stops_before_any_work(tmp_path):
    (tmp_path / "a.txt").write_bytes("\r\n\r\n".join(TEXTS).encode())
    source = {"kind": "files", "paths": [str(tmp_path / "a.txt")], "separator": "\n\n"}
    with pytest.raises(ConfigError, match="Windows line ends"):
        prepare(config(tmp_path, source=source), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    source["separator"] = "\r\n\r\n"
    prepare(config(tmp_path, source=source), quiet)
    assert list(documents(files(tmp_path / "a.txt", separator="\r\n\r\n"))) == TEXTS
