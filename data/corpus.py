"""Sources of text: every source is a stream of documents, each a non-empty str, always in the same order."""

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
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

from data.config import EmbeddedSource, FilesSource, HubSource
from data.settings import ConfigError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def documents(source: EmbeddedSource | FilesSource | HubSource, counts: Counter[str] | None = None) -> Iterator[str]:
    """Streams the documents of a source.

    Args:
        source: where the text is.
        counts: `counts["empty"]` grows by one for each document without any visible character, which is skipped.
    Raises:
        ConfigError: a file is missing or damaged (file and line or row are named), or there is no text at all.
    """
    counts = Counter() if counts is None else counts
    texts: Iterator[str]
    if isinstance(source, EmbeddedSource):
        texts = iter(_embedded())
    elif isinstance(source, FilesSource):
        texts = (text for file in files_of(source) for text in _read(file, source))
    else:
        texts = _hub(source)
    empty = True
    for text in texts:
        if not text or text.isspace():
            counts["empty"] += 1
            continue
        empty = False
        yield text
    if empty:
        raise ConfigError(f"data.source ({source.kind}): no document holds any text; give a source with text in it")


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


def _read(file: Path, source: FilesSource) -> Iterator[str]:
    if file.name.endswith(".txt"):
        return _text(file, source.separator)
    if file.name.endswith(".parquet"):
        return _parquet(file, source.text_field)
    return _json_lines(file, source.text_field)


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, with their ends. A UTF-8 sequence never holds the newline byte, so lines decode one by one."""
    number = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}, line {number}: invalid UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{file}: unreadable after line {number} ({error}); replace the file by a whole copy"
        ) from None


def _text(file: Path, separator: str | None) -> Iterator[str]:
    if separator is None:
        yield "".join(line for _, line in _lines(file))
        return
    pending: list[str] = []  # lines are joined by the MB: looking for the separator line by line would be quadratic
    size = 0
    for _, line in _lines(file):
        pending.append(line)
        size += len(line)
        if size >= 1 << 20:
            *whole, rest = "".join(pending).split(separator)
            yield from whole
            pending, size = [rest], 0
    yield from "".join(pending).split(separator)


def _json_lines(file: Path, field: str) -> Iterator[str]:
    for number, line in _lines(file):
        if line.isspace():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{place}: not valid JSON ({error}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: the line is no JSON object; expected {{{json.dumps(field)}: ...}}")
        yield _field(row, field, place)


def _parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet  # type: ignore[import-untyped]

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise ConfigError(
                    f"{file}: no column {field!r}; set data.source.text_field to one of {', '.join(names)}"
                )
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    yield _field({field: value.as_py()}, field, f"{file}, row {row}")
                    row += 1
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}, row {row}: invalid UTF-8 ({error.reason}); repair the file") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{file}: unreadable after row {row} ({error}); replace the file by a whole copy") from None


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


# ---- hub


def folder_of(source: HubSource) -> Path | None:
    """The local folder that the source names, or None: it is on the Hub."""
    folder = Path(source.name).expanduser()
    return folder if folder.is_dir() else None


def _hub(source: HubSource) -> Iterator[str]:
    """Streams through `datasets`, which reads data files and (since its version 4) never runs a dataset's script."""
    folder = folder_of(source)
    if folder is None and (source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
        raise ConfigError(f"data.source.name: {source.name} is not a folder; give a dataset's name or a local folder")
    name = source.name if folder is None else str(folder)
    import datasets  # type: ignore[import-untyped]

    row = 0
    try:
        stream = datasets.load_dataset(name, revision=source.revision, split=source.split, streaming=True)
        for row, record in enumerate(stream):
            yield _field(record, source.text_field, f"{source.name} ({source.split}), row {row}")
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{source.name} ({source.split}): cannot be read after row {row}: {error}; check name, split and network, "
            "or give a local folder of its parquet files as data.source.name"
        ) from None
