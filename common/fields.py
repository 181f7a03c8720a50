"""Types of settings with their ranges: what a field of a settings model may be, whatever the model.

A range is what the machine can hold, or far beyond what anybody wants; what lies outside would end a run later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from common.yaml_tree import CONTROL, SURROGATE

LONGEST_NAME = 255  # bytes of a file's name, on every file system of today
LONGEST_PATH = 3500  # bytes: Linux takes 4,095, and a run folder's own names come behind
LONGEST_S = 30 * 86400.0  # of a wait: far below where C's clocks of nanoseconds end, at 292 years
MOST_STEPS = 10**9  # times MOST_TOKENS, it counts tokens in 63 bits
MOST_TOKENS = 2**33


def check_path(given: Any) -> Any:
    """A path, or a pattern of paths, as it was given. Raises ValueError if no file system has it."""
    if not isinstance(given, str):
        return given  # pydantic says that it is no text
    why = None
    if not given.strip():
        why = "a path that is not empty"
    elif CONTROL.search(given) or SURROGATE.search(given):
        why = "a path without NUL, line breaks and other control characters"
    elif len(given.encode()) > LONGEST_PATH:
        why = f"a path of at most {LONGEST_PATH} bytes"
    elif len(max(given.encode().split(b"/"), key=len)) > LONGEST_NAME:
        why = f"a path whose names have at most {LONGEST_NAME} bytes each"
    if why is None:
        return given
    shown = repr(given)
    raise ValueError(f"given {shown if len(shown) <= 80 else shown[:77] + '...'}; expected {why}")


def check_name(given: str) -> str:
    """A name as it was given. Raises ValueError for one that is empty, very long, or holds control characters."""
    if not given.strip() or len(given) > LONGEST_NAME or CONTROL.search(given) or SURROGATE.search(given):
        shown = repr(given[:80])
        raise ValueError(f"given {shown}; expected 1 to {LONGEST_NAME} characters, without control characters")
    return given


FilePath = Annotated[Path, BeforeValidator(check_path)]
PathText = Annotated[str, AfterValidator(check_path)]
Name = Annotated[str, AfterValidator(check_name)]
Steps = Annotated[int, Field(gt=0, le=MOST_STEPS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch, NumPy and every reader of JSON take these
Seconds = Annotated[float, Field(gt=0, le=LONGEST_S)]
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]  # float32 holds it, and its inverse
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
