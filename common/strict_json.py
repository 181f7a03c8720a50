"""Plain values as JSON that every reader takes. RFC 8259 has no NaN and no Infinity, which Python writes unless it is
told not to: a number that is not finite becomes null.
"""

from __future__ import annotations

import json
import math
from typing import Any


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
    """What `to_json` or Python's own writer wrote: the latter's NaN and Infinity are None too."""
    return json.loads(text, parse_constant=lambda name: None)
