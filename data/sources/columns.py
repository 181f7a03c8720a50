"""Parquet and Arrow: files of columns, with the text in one of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from common.errors import ConfigError
from data.sources.stored import Part, Rows, damage_named, open_stored

BATCH_ROWS = 256


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
def parquet_file(part: Part, place: Callable[[], str]) -> Iterator[Any]:
    """The open `ParquetFile`, once its schema was checked; `place`: how far reading is, for messages."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    with damage_named(part.name, place), open_stored(part.name) as stored, parquet.ParquetFile(stored) as table:
        _check_schema(part, table.schema_arrow)
        yield table


def parquet_rows(part: Part, first: int) -> Rows:
    """Rows of a parquet file from row `first` on; row groups before it are not read. Raises ConfigError."""
    row = group = 0
    with parquet_file(part, lambda: f"row {row} (row group {group})") as table:
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
def arrow_file(part: Part, place: Callable[[], str]) -> Iterator[tuple[Iterator[Any], IO[bytes]]]:
    """The record batches of an Arrow file or stream, once its schema was checked, and the file below them."""
    from pyarrow import ipc

    with damage_named(part.name, place), open_stored(part.name) as stored:
        as_file = stored.read(6) == b"ARROW1"
        stored.seek(0)
        with ipc.open_file(stored) if as_file else ipc.open_stream(stored) as reader:
            _check_schema(part, reader.schema)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if as_file else iter(reader)
            yield batches, stored


def arrow_rows(part: Part, first: int) -> Rows:
    """Rows of an Arrow file or stream from row `first` on. Raises ConfigError."""
    row = 0
    with arrow_file(part, lambda: f"row {row}") as (batches, stored):
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
