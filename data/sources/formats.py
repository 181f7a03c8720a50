"""Which reader a file's name asks for: plain text, JSON lines, Parquet or Arrow; row by row."""

from itertools import islice

from data.sources.columns import arrow_file, arrow_rows, parquet_file, parquet_rows
from data.sources.json_lines import json_rows
from data.sources.stored import Part, Rows, lines_of

PACKINGS = ("", ".gz", ".zst")
LINES = (".jsonl", ".ndjson", ".json")  # one JSON object in each line, whatever the name
SUFFIXES = (*(kind + packing for kind in (".txt", *LINES) for packing in PACKINGS), ".parquet", ".arrow")


def rows_of(part: Part, first: int) -> Rows:
    """The rows of a file from row `first` on. Raises ConfigError that names file and line or row."""
    if part.kind == ".parquet":
        return parquet_rows(part, first)
    if part.kind == ".arrow":
        return arrow_rows(part, first)
    return islice(_text(part) if part.kind == ".txt" else json_rows(part), first, None)


def check_column(part: Part) -> None:
    """Raises ConfigError unless the file, if it is one of columns, can be opened and has the column, of text."""
    if part.kind == ".parquet":
        with parquet_file(part, lambda: "row 0"):
            pass
    elif part.kind == ".arrow":
        with arrow_file(part, lambda: "row 0"):
            pass


def _text(part: Part) -> Rows:
    if part.separator is None:
        yield "".join(line for _, line, _ in lines_of(part)), 1.0
        return
    pending: list[str] = []  # lines are joined by the MB: looking for the separator line by line would be quadratic
    size, share = 0, 1.0
    for _, line, share in lines_of(part):
        pending.append(line)
        size += len(line)
        if size >= 1 << 20:
            *whole, rest = "".join(pending).split(part.separator)
            yield from ((text, share) for text in whole)
            pending, size = [rest], 0
    yield from ((text, share) for text in "".join(pending).split(part.separator))
