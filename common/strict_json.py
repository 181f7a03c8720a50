"""Plain values as JSON that every reader takes. RFC 8259 has no NaN and no Infinity, which Python writes unless it is
told not to: a number that is not finite becomes null.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from common.files import SMALL_BYTES, read_bounded

DEEPEST = 64  # levels of what `strict` reads
CONTAINERS = (dict, list)


def plain(tree: Any) -> Any:
    """A tree of dicts, lists and scalars with None for numbers that are not finite, and lists for tuples."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def to_json(tree: Any, indent: int | None = None) -> str:
    """JSON of plain values, with null for numbers that are not finite. `indent`: blanks a level; None: one line."""
    return json.dumps(plain(tree), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """What `to_json` or Python's own writer wrote: the latter's NaN and Infinity are None too. Raises ValueError for
    what is no JSON.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path, most: int = SMALL_BYTES) -> Any:
    """What a regular file of at most `most` bytes holds, as `from_json`. Raises OSError and ValueError."""
    return from_json(read_bounded(file, most).decode())


def strict(content: bytes | str) -> Any:
    """What somebody else may have written: plain JSON in UTF-8, of finite numbers, with no key twice in an object and
    no text that cannot be printed or name a file.

    Raises:
        ValueError: it is not that; the message says what is wrong, in words.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        tree = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    escaped = "\\u" in text  # else no text in it can hold a zero or half of a character
    level = [tree]
    for _ in range(DEEPEST):
        if escaped and (wrong := next(filter(None, map(_odd, level)), None)):
            raise ValueError(f"a text holds the character {wrong!r}, which none may")
        level = [child for node in level for child in _children(node) if escaped or isinstance(child, CONTAINERS)]
        if not level:
            return tree
    raise ValueError(f"nested more than {DEEPEST} deep")


def _odd(node: Any) -> str | None:
    found = re.search("[\0\ud800-\udfff]", node) if isinstance(node, str) else None
    return None if found is None else found[0]


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return itertools.chain(node, node.values())
    return node if isinstance(node, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return made


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")
