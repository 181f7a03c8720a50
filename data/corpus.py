"""Sources of text: each is a list of parts (files), and each part a stream of documents, always in the same order.

A document is known by its part and its row there, so that reading can begin at any of them.
"""

import ast
import glob
import gzip
import importlib
import inspect
import io
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

from data.config import EmbeddedSource, FilesSource, HubSource
from data.settings import ConfigError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
EMBEDDED = "embedded"
EMBEDDED_BYTES = 2_400_000  # about, on any Python

Plain = EmbeddedSource | FilesSource | HubSource


@dataclass(frozen=True)
class Part:
    """A file of a source, or the embedded corpus."""

    name: str  # path, or an address such as hf://datasets/...
    size: int  # bytes, as stored
    field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Document:
    """A text, or an empty string, and what stands behind it in its source."""

    text: str
    part: int
    next_row: int
    share: float  # of the source's bytes that were read up to here, about


def parts_of(source: Plain) -> list[Part]:
    """The parts of a source, in order.

    Raises:
        ConfigError: a path matches nothing, a file's type is not known, or the Hub's dataset cannot be found.
    """
    if isinstance(source, EmbeddedSource):
        return [Part(EMBEDDED, EMBEDDED_BYTES)]
    if isinstance(source, FilesSource):
        return [Part(str(f), f.stat().st_size, source.text_field, source.separator) for f in files_of(source)]
    return _hub_parts(source)


def is_remote(source: Plain) -> bool:
    """Whether the source must be asked for over the network."""
    return isinstance(source, HubSource) and folder_of(source) is None


def read(parts: list[Part], first_part: int = 0, first_row: int = 0) -> Iterator[Document]:
    """Streams the documents of a source's parts, from one of them on; rows count from 0 in each part.

    Raises:
        ConfigError: a file is missing or damaged; file and line or row are named.
    """
    before, total = sum(part.size for part in parts[:first_part]), max(1, sum(part.size for part in parts))
    for number in range(first_part, len(parts)):
        part = parts[number]
        first = first_row if number == first_part else 0
        for row, (text, share) in enumerate(_read(part, first), start=first):
            yield Document(text, number, row + 1, (before + share * part.size) / total)
        before += part.size


def documents(source: Plain, limit: int | None = None) -> Iterator[str]:
    """Streams the texts of a source that are not empty, at most `limit` of them.

    Raises:
        ConfigError: a file is missing or damaged (file and line or row are named), or there is no text at all.
    """
    nothing = True
    for text in islice((d.text for d in read(parts_of(source)) if not is_empty(d.text)), limit):
        nothing = False
        yield text
    if nothing:
        raise no_text(source)


def is_empty(text: str) -> bool:
    """Whether a text has no visible character."""
    return not text or text.isspace()


def no_text(source: Plain) -> ConfigError:
    return ConfigError(f"data.source ({source.kind}): no document holds any text; give a source with text in it")


def check_columns(parts: list[Part]) -> None:
    """Raises ConfigError unless every parquet file among the parts can be opened and has the column, of strings."""
    for part in parts:
        if part.name.endswith(".parquet"):
            with _parquet_file(part, lambda: "row 0"):
                pass


def _read(part: Part, first: int) -> Iterator[tuple[str, float]]:
    """Texts from row `first` on, each with the share of the part that was read by then."""
    if part.name == EMBEDDED:
        texts = _embedded()
        return ((text, number / len(texts)) for number, text in enumerate(texts[first:], start=first + 1))
    if part.name.endswith(".parquet"):
        return _parquet(part, first)
    if part.name.endswith(".txt"):
        return islice(_text(part), first, None)
    return islice(_json_lines(part), first, None)


# ---- embedded

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "pydoc_data"}

# Modules written in C keep their docstrings in the binary. Importing these has no effect that anyone could notice.
C_MODULES = """
builtins sys math cmath itertools time gc marshal errno posix array binascii zlib unicodedata select mmap fcntl
resource _collections _functools _operator _io _datetime _struct _decimal _random _bisect _heapq _statistics _json
_pickle _csv _socket _ssl _hashlib _thread _queue _weakref _ctypes _sqlite3 _elementtree _lzma _bz2 _zoneinfo _asyncio
_contextvars _codecs _sre _signal _warnings _abc _string _locale _curses _posixsubprocess _tracemalloc atexit
faulthandler pyexpat
"""


@cache
def _embedded() -> tuple[str, ...]:
    """The embedded corpus, about 2 MB: one document for each pydoc topic and for each module; no docstring twice."""
    seen: set[str] = set()

    def document(parts: Iterator[str | None]) -> str:
        fresh = []
        for text in map(_clean, parts):
            if text and text not in seen:
                seen.add(text)
                fresh.append(text)
        return "\n\n".join(fresh)

    found = [document(iter([text])) for _, text in sorted(_topics().items())]
    found += [document(_docstrings(file)) for file in _sources()]
    found += [document(_binary_docstrings(name)) for name in C_MODULES.split()]
    return tuple(text for text in found if text)


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions split it off
        return {}


def _sources() -> list[Path]:
    """Source files of the standard library, without tests and bundled packages, by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = (file.relative_to(root) for file in root.rglob("*.py"))
    return [root / file for file in sorted(relative) if not LEFT_OUT & set(file.parts)]


def _docstrings(file: Path) -> Iterator[str | None]:
    """Docstrings of a source file, in source order; read, never run."""
    with warnings.catch_warnings(action="ignore"):  # some modules spell a backslash in a way that warns
        nodes: list[ast.AST] = [ast.parse(file.read_bytes())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False)
        if not isinstance(node, ast.expr):  # docstrings live in statements, and expressions are most of a tree
            nodes.extend(reversed(list(ast.iter_child_nodes(node))))


def _binary_docstrings(name: str) -> Iterator[str | None]:
    """Docstrings of a module written in C: its own, then those of its functions, classes and their members, by name.

    Functions written in Python are left out: they are hooks that the running program put there (sys.excepthook).
    """
    try:
        module = importlib.import_module(name)
    except ImportError:  # not built on this machine
        return
    yield module.__doc__
    for _, value in sorted(vars(module).items()):
        if inspect.isbuiltin(value) or inspect.isclass(value):
            yield value.__doc__
        if inspect.isclass(value):
            for _, member in sorted(vars(value).items()):
                if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                    yield member.__doc__


def _clean(text: object) -> str:
    """Docstring as prose: common indent, trailing blanks and control characters (but the newline) taken off."""
    if not isinstance(text, str):
        return ""
    lines = CONTROL.sub("", inspect.cleandoc(text)).split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")


# ---- files


def files_of(source: FilesSource) -> list[Path]:
    """The files that the source's paths and globs name: in the order given, sorted within a glob, each once.

    Raises:
        ConfigError: a path matches nothing, or a file's type is not known.
    """
    files: dict[Path, None] = {}
    for pattern in source.paths:
        literal = Path(pattern).expanduser()
        if literal.is_dir():
            raise ConfigError(
                f"data.source.paths: {pattern} is a folder; name its files, such as {pattern.rstrip('/')}/*.txt"
            )
        found = [literal] if literal.is_file() else sorted(map(Path, glob.glob(str(literal), recursive=True)))
        found = [file for file in found if file.is_file()]
        if not found:
            raise ConfigError(f"data.source.paths: {pattern} matches no file in {Path.cwd()}; check the path")
        for file in found:
            if not file.name.endswith(SUFFIXES):
                raise ConfigError(f"{file}: cannot read this type of file; expected one of {', '.join(SUFFIXES)}")
            files[file] = None
    return list(files)


@contextmanager
def _damage_named(name: str, place: Callable[[], str]) -> Iterator[None]:
    """Turns what readers raise into a ConfigError that names the file and the place."""
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}, {place()}: invalid UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except Exception as error:
        # Clients of other file systems have classes of their own for a connection that breaks.
        remote = "://" in name
        if not remote and not isinstance(error, OSError | EOFError | zlib.error | pyarrow.ArrowException):
            raise
        reason = " ".join(str(error).split()) or repr(error)
        remedy = "check the network" if remote else "replace the file by a whole copy"
        raise ConfigError(
            f"{name}: unreadable after {place()} ({reason}); {remedy}, then run this again: it goes on from what is "
            "finished"
        ) from None


def _open(name: str) -> IO[bytes]:
    if "://" in name:
        import fsspec

        return fsspec.open(name, "rb").open()
    return open(name, "rb")


def _unpacked(stored: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored, mode="rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), "zstd"))
    return stored


def _lines(part: Part) -> Iterator[tuple[int, str, float]]:
    """Numbered lines, with their ends. A UTF-8 sequence never holds the newline byte, so lines decode one by one."""
    number = 0
    with _damage_named(part.name, lambda: f"line {number}"), _open(part.name) as stored:
        for number, line in enumerate(_unpacked(stored, part.name), start=1):
            yield number, line.decode("utf-8"), stored.tell() / part.size


def _text(part: Part) -> Iterator[tuple[str, float]]:
    if part.separator is None:
        yield "".join(line for _, line, _ in _lines(part)), 1.0
        return
    pending: list[str] = []  # lines are joined by the MB: looking for the separator line by line would be quadratic
    size, share = 0, 1.0
    for _, line, share in _lines(part):
        pending.append(line)
        size += len(line)
        if size >= 1 << 20:
            *whole, rest = "".join(pending).split(part.separator)
            yield from ((text, share) for text in whole)
            pending, size = [rest], 0
    yield from ((text, share) for text in "".join(pending).split(part.separator))


def _json_lines(part: Part) -> Iterator[tuple[str, float]]:
    for number, line, share in _lines(part):
        if line.isspace():
            continue
        place = f"{part.name}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{place}: not valid JSON ({error}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: the line is no JSON object; expected {{{json.dumps(part.field)}: ...}}")
        yield _field(row, part.field, place), share


def _field(row: dict[str, Any], field: str, place: str) -> str:
    """The text of a row; null is an empty document."""
    if field not in row:
        raise ConfigError(f"{place}: no field {field!r}; set data.source.text_field to one of {', '.join(row)}")
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            f"{place}: {field!r} is a {type(value).__name__}, not a string; choose a field that holds text"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"{place}: {field!r} holds half a surrogate pair, which is no character; repair the row"
        ) from None
    return value


@contextmanager
def _parquet_file(part: Part, place: Callable[[], str]) -> Iterator[Any]:
    """The open file, once its schema was checked."""
    import pyarrow
    from pyarrow import parquet  # type: ignore[import-untyped]

    with _damage_named(part.name, place), _open(part.name) as stored, parquet.ParquetFile(stored) as table:
        names = table.schema_arrow.names
        if part.field not in names:
            raise ConfigError(
                f"{part.name}: no column {part.field!r}; set data.source.text_field to one of {', '.join(names)}"
            )
        kind = table.schema_arrow.field(part.field).type
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
            raise ConfigError(f"{part.name}: {part.field!r} is {kind}, not a string; choose a column that holds text")
        yield table


def _parquet(part: Part, first: int) -> Iterator[tuple[str, float]]:
    row = group = 0
    with _parquet_file(part, lambda: f"row {row} (row group {group})") as table:
        rows = table.metadata.num_rows
        for group in range(table.num_row_groups):
            after = row + table.metadata.row_group(group).num_rows
            if after <= first:
                row = after
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[part.field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > first:
                        yield text or "", row / rows


# ---- hub


def folder_of(source: HubSource) -> Path | None:
    """The local folder that the source names, or None: it is on the Hub."""
    folder = Path(source.name).expanduser()
    return folder if folder.is_dir() else None


def _hub_parts(source: HubSource) -> list[Part]:
    """The data files of a split, as `datasets` finds them. Since its version 4 it never runs a dataset's script."""
    folder = folder_of(source)
    if folder is None and (source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
        raise ConfigError(f"data.source.name: {source.name} is not a folder; give a dataset's name or a local folder")
    import datasets  # type: ignore[import-untyped]

    try:
        builder = datasets.load_dataset_builder(str(folder or source.name), source.subset, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{source.name}: the dataset cannot be read: {error}; check name, subset and network, set "
            "data.source.revision=refs/convert/parquet for the Hub's own copy in parquet files, or give a local folder "
            "of its files as data.source.name"
        ) from None
    found = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    if source.split not in found:
        raise ConfigError(
            f"{source.name}: no split {source.split!r}; set data.source.split to one of {', '.join(found)}"
        )
    names = found[source.split]
    for name in names:
        if not name.endswith(SUFFIXES):
            raise ConfigError(
                f"{name}: cannot read this type of file; expected one of {', '.join(SUFFIXES)}. The Hub's own copy in "
                "parquet files is data.source.revision=refs/convert/parquet"
            )
    return [Part(name, _size(name), source.text_field) for name in names]


def _size(name: str) -> int:
    if "://" not in name:
        return Path(name).stat().st_size
    import fsspec

    system, path = fsspec.core.url_to_fs(name)
    with _damage_named(name, lambda: "nothing"):
        return system.size(path)
