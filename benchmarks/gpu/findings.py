"""What one stage has found so far, on disk as soon as it is found."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.files import replace_file
from common.strict_json import from_json, to_json


@dataclass
class Found:
    """Figures of one stage. None: not measured."""

    figures: dict[str, Any] = field(default_factory=dict)  # units are in the names
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)  # what the table at the end shows
    problems: list[str] = field(default_factory=list)  # each makes the stage a failure
    left_out: list[str] = field(default_factory=list)  # for want of time, which is a failure too
    skipped: dict[str, str] = field(default_factory=dict)  # part -> why it cannot be measured here
    not_run: str | None = None  # why the whole stage is skipped


class Findings(Found):
    """A stage's notebook: every entry is written to `path` at once.

    Args:
        seconds: until the stage should have ended by itself.
        small: sizes for a machine without a GPU.
        scratch: a folder that is removed afterwards.
    """

    def __init__(self, path: Path, seconds: float, small: bool, scratch: Path) -> None:
        super().__init__()
        self.path, self.small, self.scratch = path, small, scratch
        self.deadline = time.monotonic() + seconds
        self.save()

    @property
    def left_s(self) -> float:
        """Seconds until the stage should have ended; below 0 afterwards."""
        return self.deadline - time.monotonic()

    def figure(self, name: str, value: Any) -> None:
        """Notes one number or word, whose name has its unit."""
        self.figures[name] = value
        self.save()

    def row(self, table: str, **columns: Any) -> None:
        """Adds to a table; rows need not have the same columns."""
        self.tables.setdefault(table, []).append(columns)
        self.save()

    def tell(self, headline: str) -> None:
        """Adds to what the table of all stages shows."""
        self.headline.append(headline)
        self.save()

    def problem(self, text: str) -> None:
        """Notes what is wrong, and the stage as failed; it goes on."""
        self.problems.append(text)
        self.save()

    def leave_out(self, what: str) -> None:
        """Notes a part for which there is no time left."""
        self.left_out.append(what)
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Notes a part that cannot be measured on this machine."""
        self.skipped[what] = why
        self.save()

    def skip_all(self, why: str) -> None:
        """Notes why nothing of the stage can be measured here."""
        self.not_run = why
        self.save()

    def save(self) -> None:
        """Writes all of it, whole; for changes made in place."""
        replace_file(self.path, to_json(asdict(self)))


def read_found(path: Path) -> Found:
    """What a stage has written; nothing where it wrote nothing."""
    try:
        return Found(**from_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Found()
