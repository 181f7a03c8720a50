"""Cells of a study of small networks: each is trained once and kept in a file, so that a study goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.files import replace_file
from common.progress import Log, progress
from common.strict_json import to_json
from common.workers import Workers

log = logging.getLogger(__name__)

Figures = dict[str, Any]


class AnyCell(Protocol):
    """What determines a cell's figures."""

    def settings(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        ...

    def key(self) -> str:
        """A name that no other settings have."""
        ...

    def file(self, folder: Path) -> Path:
        """Where its figures are kept."""
        ...


C = TypeVar("C", bound=AnyCell)


def finish(
    cells: Sequence[C], train: Callable[[C], Figures], processes: int, folder: Path, say: Log, what: str
) -> dict[str, Figures]:
    """The figures of cells by their keys: of those that have none yet, by training, `processes` at once.

    Raises:
        ConfigError: a process was killed.
    """
    finished = {cell.key(): figures for cell in cells if (figures := read_cell(cell, folder)) is not None}
    missing = {cell.key(): cell for cell in cells if cell.key() not in finished}
    if finished:
        say(f"{what}: {len(finished):,} of {len(finished) + len(missing):,} cells are finished already")
    count = min(processes, max(1, len(missing)))
    with progress(what, say) as tell, Workers(partial(_train_and_keep, folder, train), count) as workers:
        asked = ((key, workers.submit(cell)) for key, cell in missing.items())
        for done, (key, result) in enumerate(list(asked) if count > 1 else asked, 1):
            finished[key] = workers.result(result)
            tell(done / len(missing), f"{done:,} of {len(missing):,} cells")
    return finished


def _train_and_keep(folder: Path, train: Callable[[C], Figures], cell: C) -> Figures:
    figures = train(cell)
    kept = {"cell": cell.settings(), "figures": figures}
    replace_file(cell.file(folder), to_json(kept, indent=1) + "\n")
    return figures


def read_cell(cell: AnyCell, folder: Path) -> Figures | None:
    """The figures of a finished cell; None if there are none of exactly its settings."""
    file = cell.file(folder)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["cell"] == cell.settings():
            return dict(kept["figures"])
        log.warning("%s is of other settings than its name says: its cell is trained again", file)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        log.warning("%s cannot be read: its cell is trained again", file)
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, and no fight over cores."""
    import torch  # a study's settings are checked without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
