"""Debian packages as a source: which files are read, in which order, and what becomes of packages that are none."""

import gzip
import itertools
import lzma
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.files import sha256_of
from data.config import DataConfig, DebianSource
from data.manifest import read_manifest
from data.prepare import prepare
from data.sources import debian
from data.sources.corpus import documents, is_remote, parts_of, read
from data.sources.debian import debian_parts, package_rows
from data.sources.prose import PARAGRAPH
from tests.support.corpus import TEXTS, Killed, assert_same, config, hurry, killed_at, quiet

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, of the package dpkg")


def prose(number: int) -> str:
    return TEXTS[number].rstrip(" .\n0123456789") + "."


def deb(folder: Path, name: str, files: dict[str, str | bytes], version: str = "1.0-1") -> Path:
    """Builds a package; names begin at usr/share/doc/NAME."""
    root = folder / f"root-{name}"
    for path, content in files.items():
        file = root / "usr/share/doc" / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
        f"Installed-Size: 8\n"
    )
    (folder / "packages").mkdir(exist_ok=True)
    built = folder / "packages" / f"{name}_{version.replace(':', '%3a')}_all.deb"
    command = ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "--build", str(root), str(built)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(root)
    return built


def source(folder: Path, *packages: str | dict[str, Any], **settings: Any) -> DebianSource:
    named = [{"name": package} if isinstance(package, str) else package for package in packages]
    return DebianSource.model_validate(
        {"kind": "debian", "packages": named, "folder": str(folder / "packages"), **settings}
    )


def data(folder: Path, *packages: str | dict[str, Any], **changes: Any) -> DataConfig:
    given = source(folder, *packages).model_dump(mode="json")
    return config(folder, **{"source": given, "tokenizer": {"vocab_size": 320}, **changes})


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Two packages of several files each."""
    deb(tmp_path, "book", {f"ch{number:02}.html": f"<p>{prose(number)}</p>" for number in range(30)}, "2:1.0~rc+1")
    deb(tmp_path, "notes", {f"{number}.txt": f"{prose(100 + number)}\n" for number in range(30)})
    return tmp_path


def test_what_is_prose_is_read_in_the_archives_order(tmp_path):
    page, latin = f"<h1>A title</h1><p>{prose(1)}<pre>x = 1</pre>", f"{prose(2)} caf\u00e9 na\u00efve"
    deb(
        tmp_path,
        "a-doc",
        {
            "b.html": page,
            "a.txt": latin.encode("latin-1"),
            "c/d.txt.gz": gzip.compress(f"{prose(3)}\n\n\n{prose(4)}".encode()),
            "changelog.txt": prose(5),
            "copyright.txt": prose(6),
            "e.md": prose(7),
            "binary.txt": prose(8) + "\0",
            "listing.txt": "int x = 1;\n" * 20,
            "skipped/f.txt": prose(9),
            "empty.txt": "",
        },
    )
    package = {"name": "a-doc", "skip": ["*/skipped/*"]}
    assert list(documents(source(tmp_path, package))) == [
        latin,
        f"A title\n\n{prose(1)}",
        f"{prose(3)}\n\n{prose(4)}",
    ]
    only = {"name": "a-doc", "files": ["usr/share/doc/a-doc/*.md"]}
    assert list(documents(source(tmp_path, only))) == [prose(7)]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, suffix, pack):
    deb(tmp_path, "bomb", {f"a.txt.{suffix}": pack(b"word " * 100_000)})
    monkeypatch.setattr(debian, "MOST_FILE", 1 << 16)
    (part,) = debian_parts(source(tmp_path, {"name": "bomb", "files": ["*.txt.*"]}))
    with pytest.raises(ConfigError, match=rf"a.txt.{suffix} has more than 65536 bytes; name it in `skip`"):
        list(package_rows(part, 0))


def test_long_texts_are_several_documents(tmp_path):
    book = [prose(number) for number in range(40)]
    deb(tmp_path, "book", {"book.txt": PARAGRAPH.join(book)})
    found = list(documents(source(tmp_path, "book", document_chars=1500)))
    assert len(found) > 5 and max(map(len, found)) <= 1500
    assert PARAGRAPH.join(found) == PARAGRAPH.join(book)


def test_the_share_of_prose_decides(tmp_path):
    mixed = PARAGRAPH.join([prose(1), "x = 1; " * len(prose(1))])
    deb(tmp_path, "mixed", {"a.txt": mixed, "b.txt": prose(2)})
    assert list(documents(source(tmp_path, "mixed"))) == [prose(2)]
    assert list(documents(source(tmp_path, "mixed", prose=0.1))) == [prose(1), prose(2)]


def test_reading_begins_at_any_document(books):
    parts = parts_of(source(books, "book", "notes"))
    whole = list(read(parts))
    assert [d.part for d in whole] == [0] * 30 + [1] * 30 and [d.next_row for d in whole[:30]] == list(range(1, 31))
    for part, row in ((0, 7), (0, 30), (1, 0), (1, 29)):
        assert list(read(parts, part, row)) == [d for d in whole if (d.part, d.next_row) > (part, row)]
    assert len(list(itertools.islice(read(parts), 3))) == 3  # and what unpacks the rest is ended


def test_a_preparation_goes_on_and_its_folder_tells_of_what_it_is(books, monkeypatch):
    settings = {"test_fraction": 0.2, "val_fraction": 0.2}
    whole = prepare(data(books, "book", "notes", path=str(books / "whole"), **settings), quiet)
    files = [books / "packages" / name for name in ("book_2%3a1.0~rc+1_all.deb", "notes_1.0-1_all.deb")]
    assert whole["inputs"]["debian"] == [
        ["book=2:1.0~rc+1", files[0].stat().st_size, sha256_of(files[0])],
        ["notes=1.0-1", files[1].stat().st_size, sha256_of(files[1])],
    ]
    hurry(monkeypatch)
    killed_at(monkeypatch, 10, 25, 50)
    for _ in range(3):
        with pytest.raises(Killed):
            prepare(data(books, "book", "notes", **settings), quiet)
    prepare(data(books, "book", "notes", **settings), quiet)
    assert_same(books / "prepared", books / "whole")


def test_a_folder_fits_wherever_its_packages_are_unless_they_are_others(books):
    made = prepare(data(books, "book", "notes"), quiet)
    (books / "elsewhere").mkdir()
    (books / "packages").rename(books / "elsewhere" / "packages")
    moved = source(books / "elsewhere", "book", "notes").model_dump(mode="json")
    assert prepare(config(books, source=moved, tokenizer={"vocab_size": 320}), quiet) == made
    assert is_remote(source(books, "book", "notes"))  # so apt is not asked for what is prepared
    assert prepare(data(books, "book", "notes"), quiet) == made
    deb(books, "book", {"a.txt": prose(1)}, "3.0")
    shutil.copy(books / "elsewhere" / "packages" / "notes_1.0-1_all.deb", books / "packages")
    with pytest.raises(ConfigError, match=r"the source's files \(book=3\.0\)"):
        prepare(data(books, "book", "notes"), quiet)
    with pytest.raises(ConfigError, match=r"data\.source\.packages was .* and is now"):
        prepare(data(books, "notes", "book"), quiet)
    assert read_manifest(books / "prepared") == made


def apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a program of this text in place of apt-get."""
    program = folder / "bin" / "apt-get"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_what_is_missing_is_fetched_once_and_kept(books, monkeypatch):
    (books / "packages").rename(books / "archive")
    apt(books, monkeypatch, f'echo "$@" >> {books}/asked; cp {books}/archive/"${{3%%=*}}"_*.deb .')
    given = source(books, {"name": "book", "version": "2:1.0~rc+1"}, "notes")
    assert is_remote(given)
    assert len(list(documents(given))) == 60 and len(list(documents(given))) == 60
    asked = (books / "asked").read_text().splitlines()
    assert asked == ["download --quiet book=2:1.0~rc+1", "download --quiet notes"] and not is_remote(given)
    assert sorted(path.name for path in (books / "packages").iterdir()) == [
        "book_2%3a1.0~rc+1_all.deb",
        "notes_1.0-1_all.deb",
    ]


def test_what_cannot_be_had_is_named(books, monkeypatch):
    apt(books, monkeypatch, 'echo "E: Unable to locate package $3" >&2; exit 100')
    with pytest.raises(
        ConfigError, match=r"package nosuch: apt-get failed \(E: Unable to .* nosuch\); check the .*\.deb"
    ):
        parts_of(source(books, "book", "nosuch"))
    with pytest.raises(ConfigError, match=r"package book=9: apt-get failed"):
        parts_of(source(books, {"name": "book", "version": "9"}))
    apt(books, monkeypatch, "exit 0")
    with pytest.raises(ConfigError, match=r"package nosuch: apt-get download left no nosuch_\*\.deb"):
        parts_of(source(books, "nosuch"))
    monkeypatch.setenv("PATH", str(books))
    with pytest.raises(ConfigError, match=r"needs the program apt-get, which is not here; install it \(package apt\)"):
        parts_of(source(books, "nosuch"))
    with pytest.raises(ConfigError, match=r"needs the program dpkg-deb"):
        parts_of(source(books, "book"))


def test_files_that_are_no_packages_are_named(books):
    whole = (books / "packages" / "notes_1.0-1_all.deb").read_bytes()
    file = books / "packages" / "notes_1.0-1_all.deb"
    for damaged in (b"", b"no package", whole[:100]):
        file.write_bytes(damaged)
        with pytest.raises(
            ConfigError, match=r"notes_1\.0-1_all\.deb: dpkg-deb failed .*delete the file, so that it is"
        ):
            parts_of(source(books, "notes"))
    file.write_bytes(whole[: len(whole) - 400])
    with pytest.raises(ConfigError, match=r"notes_1\.0-1_all\.deb: not a whole package"):
        list(documents(source(books, "notes")))
    shutil.copy(books / "packages" / "book_2%3a1.0~rc+1_all.deb", file)
    with pytest.raises(ConfigError, match=r"notes_.*: this is the package 'book', not notes"):
        parts_of(source(books, "notes"))
    deb(books, "book", {"a.txt": prose(1)}, "3.0")
    with pytest.raises(ConfigError, match=r"book is there 2 times \(.*\); set the version of that package"):
        parts_of(source(books, "book"))
    assert len(list(documents(source(books, {"name": "book", "version": "3.0"})))) == 1


def test_a_package_without_prose_is_refused(tmp_path):
    deb(tmp_path, "code", {"a.txt": "x = 1;\n" * 30, "b.txt.gz": b"\x1f\x8b no gzip"})
    with pytest.raises(ConfigError, match=r"code_1\.0-1_all\.deb, usr/share/doc/code/b\.txt\.gz: cannot be unpacked"):
        list(documents(source(tmp_path, "code")))
    with pytest.raises(ConfigError, match=r"no file that data\.source\.packages asks for \(\*/a\.txt\) holds prose"):
        list(documents(source(tmp_path, {"name": "code", "files": ["*/a.txt"]})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packages": []}, "source.packages: given []"),
        ({"packages": [{"name": "a b"}]}, "source.packages.0.name"),
        ({"packages": [{"name": "../x"}]}, "source.packages.0.name"),
        ({"packages": [{"name": "-oDir=/"}]}, "source.packages.0.name"),
        ({"packages": [{"name": "book", "version": "*"}]}, "source.packages.0.version"),
        ({"packages": [{"name": "book"}, {"name": "book"}]}, "packages: book is there twice"),
        ({"packages": [{"name": "book", "files": []}]}, "source.packages.0.files"),
        ({"prose": 2}, "source.prose: given 2"),
        ({"document_chars": 0}, "source.document_chars: given 0"),
    ],
)
def test_settings_that_are_none(tmp_path, changes, message):
    given = {"kind": "debian", "packages": [{"name": "book"}], **changes}
    with pytest.raises(ConfigError) as error:
        config(tmp_path, source=given)
    assert message in str(error.value)
