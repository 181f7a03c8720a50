"""JSON lines: one object in each line, with the text in one of its fields."""

import json
from typing import Any

from common.errors import ConfigError
from data.sources.encoding import MARK
from data.sources.stored import Part, Rows, lines_of

INT_DIGITS = 640  # Python can be told to read no more than so many


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


def json_rows(part: Part) -> Rows:
    """The text of each line that is not blank. Raises ConfigError that names the line."""
    for number, line, share in lines_of(part):
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
