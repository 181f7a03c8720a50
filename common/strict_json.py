"""Plain values as JSON that every reader takes. RFC 8259 has no NaN and no Infinity, which Python writes unless it is
told not to: a number that is not finite becomes null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from common.files import SMALL_BYTES, read_text


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
    whatever else.
    """
    try:
        tree = json.loads(text, parse_constant=lambda name: None)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()  # half of a character is no text
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return tree


def read_json(file: Path, most: int = SMALL_BYTES) -> Any:
    """What a regular file of at most `most` bytes holds. Raises OSError, and ValueError if that is no JSON."""
    return from_json(read_text(file, most))
