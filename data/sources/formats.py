"""Files of text, row by row: plain text, JSON lines, Parquet and Arrow, here or on another file system."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import IO, Any

from common.errors import ConfigError
from data.sources.encoding import MARK, without_mark

PACKINGS = ("", ".gz", ".zst")
LINES = (".jsonl", ".ndjson", ".json")  # one JSON object in each line, whatever the name
SUFFIXES = (*(kind + packing for kind in (".txt", *LINES) for packing in PACKINGS), ".parquet", ".arrow")
BATCH_ROWS = 256
INT_DIGITS = 640  # Python can be told to read no more than so many
ACCESS = "set HF_TOKEN or run `hf auth login`, and accept the terms on the dataset's page if it has some"

Rows = Iterator[tuple[str, float]]  # texts, each with the share of the file that was read by then


@dataclass(frozen=True)
class Part:
    """A file of a source, or the embedded corpus."""

    name: str  # path, or an address such as hf://datasets/...
    size: int  # bytes, as stored
    field: str = "text"
    separator: str | None = None

    @property
    def kind(self) -> str:
        """Its format: the end of its name, without that of a compression."""
        return PurePath(self.name.removesuffix(".gz").removesuffix(".zst")).suffix


def rows_of(part: Part, first: int) -> Rows:
    """The rows of a file from row `first` on. Raises ConfigError that names file and line or row."""
    if part.kind == ".parquet":
        return _parquet(part, first)
    if part.kind == ".arrow":
        return _arrow(part, first)
    return islice(_text(part) if part.kind == ".txt" else _json_lines(part), first, None)


def check_column(part: Part) -> None:
    """Raises ConfigError unless the file, if it is one of columns, can be opened and has the column, of text."""
    if part.kind == ".parquet":
        with _parquet_file(part, lambda: "row 0"):
            pass
    elif part.kind == ".arrow":
        with _arrow_file(part, lambda: "row 0"):
            pass


@contextmanager
def damage_named(name: str, place: Callable[[], str]) -> Iterator[None]:
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
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            remedy = f"{ACCESS}; if you have access, check the network"
        raise ConfigError(
            f"{name}: unreadable after {place()} ({reason}); {remedy}, then run this again: it goes on from what is "
            "finished"
        ) from None


# ---- bytes and lines


@contextmanager
def unpacked(part: Part) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file's content as a stream, and the stored file below it, which tells how far reading is."""
    with _open(part.name) as stored:
        yield _unpacked(stored, part.name), stored


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
    with damage_named(part.name, lambda: f"line {number}"), unpacked(part) as (stream, stored):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = without_mark(line, part.name)
            yield number, line.decode("utf-8"), stored.tell() / part.size


def _text(part: Part) -> Rows:
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


# ---- JSON


class _Repeating(dict[str, Any]):
    """A JSON object in which a key is given more than once; the last value counts."""

    keys_given: list[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    repeating = _Repeating(row)
    repeating.keys_given = [key for key, _ in pairs]
    return repeating


def _integer(digits: str) -> int | float:
    """Python refuses to read integers of thousands of digits, which stand beside the text and are not used."""
    return int(digits) if len(digits) < INT_DIGITS else float(digits)


def _json_lines(part: Part) -> Rows:
    for number, line, share in _lines(part):
        line = line.removeprefix(MARK)  # of a file that was appended to another
        if line and not line.isspace():
            place = f"{part.name}, line {number}"
            yield _field(_json_object(line, part.field, place), part.field, place), share


def _json_object(line: str, field: str, place: str) -> dict[str, Any]:
    array = (
        ". If the file is one array, `jq -c '.[]' OLD > NEW.jsonl` makes lines of it" if line.lstrip()[0] == "[" else ""
    )
    try:
        row = json.loads(line, parse_int=_integer, object_pairs_hook=_object)
    except (ValueError, RecursionError, MemoryError) as error:
        remedy = array
        if isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip()) and not array:
            remedy = ". If the object goes on in the next line, `jq -c . OLD > NEW.jsonl` makes one line of it"
        raise ConfigError(f"{place}: not valid JSON ({error}); each line must be one JSON object{remedy}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: the line is no JSON object; expected {{{json.dumps(field)}: ...}}{array}")
    return row


def _field(row: dict[str, Any], field: str, place: str) -> str:
    """The text of a row; null is an empty document."""
    if field not in row:
        keys = f"set data.source.text_field to one of {', '.join(row)}" if row else "the object is empty"
        raise ConfigError(f"{place}: no field {field!r}; {keys}")
    if isinstance(row, _Repeating) and row.keys_given.count(field) > 1:
        raise ConfigError(f"{place}: {field!r} is given more than once; leave one of them in the row")
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


# ---- columns


def _check_schema(part: Part, schema: Any) -> None:
    """Raises ConfigError unless the schema has the part's column once, of strings or bytes, plain or by dictionary."""
    from pyarrow import types

    count = schema.names.count(part.field)
    if count == 0:
        raise ConfigError(
            f"{part.name}: no column {part.field!r}; set data.source.text_field to one of {', '.join(schema.names)}"
        )
    if count > 1:
        raise ConfigError(f"{part.name}: {count} columns are named {part.field!r}; rename all but one")
    kind = schema.field(part.field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    bytes_ = (types.is_binary, types.is_large_binary, types.is_binary_view)  # as Spark and Impala keep text
    if not any(is_kind(value) for is_kind in (*strings, *bytes_, types.is_null)):
        raise ConfigError(f"{part.name}: {part.field!r} is {kind}, not a string; choose a column that holds text")


def _as_bytes(column: Any) -> Any:
    """The values of a column that `_check_schema` took, as UTF-8. Raises ArrowInvalid for offsets that lead astray."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        return pyarrow.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary)).dictionary_decode()
    bytes_of = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    column = column.view(bytes_of.get(column.type, column.type))
    column.validate(full=True)  # damaged offsets would end the process, not raise
    return column


def _texts(column: Any) -> Iterator[str]:
    """Texts of a column of UTF-8; null is an empty document."""
    for value in column.to_pylist():
        yield "" if value is None else value.decode("utf-8")


@contextmanager
def _parquet_file(part: Part, place: Callable[[], str]) -> Iterator[Any]:
    """The open file, once its schema was checked."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    with damage_named(part.name, place), _open(part.name) as stored, parquet.ParquetFile(stored) as table:
        _check_schema(part, table.schema_arrow)
        yield table


def _parquet(part: Part, first: int) -> Rows:
    row = group = 0
    with _parquet_file(part, lambda: f"row {row} (row group {group})") as table:
        rows = table.metadata.num_rows
        for group in range(table.num_row_groups):
            after = row + table.metadata.row_group(group).num_rows
            if after <= first:
                row = after
                continue
            for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[part.field]):
                for text in _texts(_as_bytes(batch.column(part.field))):
                    row += 1
                    if row > first:
                        yield text, row / rows


@contextmanager
def _arrow_file(part: Part, place: Callable[[], str]) -> Iterator[tuple[Iterator[Any], IO[bytes]]]:
    """The record batches of an Arrow file or stream, once its schema was checked, and the file below them."""
    from pyarrow import ipc

    with damage_named(part.name, place), _open(part.name) as stored:
        as_file = stored.read(6) == b"ARROW1"
        stored.seek(0)
        with ipc.open_file(stored) if as_file else ipc.open_stream(stored) as reader:
            _check_schema(part, reader.schema)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if as_file else iter(reader)
            yield batches, stored


def _arrow(part: Part, first: int) -> Rows:
    row = 0
    with _arrow_file(part, lambda: f"row {row}") as (batches, stored):
        for batch in batches:
            if row + len(batch) <= first:
                row += len(batch)
                continue
            column = _as_bytes(batch.column(part.field))
            share = stored.tell() / part.size
            for start in range(0, len(column), BATCH_ROWS):
                for text in _texts(column.slice(start, BATCH_ROWS)):
                    row += 1
                    if row > first:
                        yield text, share
