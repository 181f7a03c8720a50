"""A run's records as whoever reads its metrics.jsonl sees them: plain objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.records import read_lines
from pretrain.run_folder import RunFolder


def read_records(run: Path) -> list[dict[str, Any]]:
    return read_lines(RunFolder(run).metrics)
