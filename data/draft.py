"""The folder in which prepared data are made: `PATH.draft`, which outlives a run that is killed.

Its journal tells from which settings and files it is made and how far it is; whatever was written after the last entry
is taken back by the next run. It gets the name PATH when it is whole, so PATH is complete or absent.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import lock, publish, read_bounded, replace_file
from common.strict_json import from_json
from data.manifest import MANIFEST, MOST

JOURNAL = "journal.json"
SEEN = "seen.bin"  # hashes of the documents so far
HELD_OUT = "held-out.npy"  # runs of words of held-out documents
SCRATCH = (JOURNAL, SEEN, HELD_OUT)  # what the finished folder does not need


class Draft:
    """A draft folder.

    Attributes: `path`; `job`, the settings and files from which it is made; `progress`, plain values as given to
    `commit` last, or None.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path, self.job = path, job
        self.progress: dict[str, Any] | None = None

    def commit(self, progress: dict[str, Any]) -> None:
        """Notes how far the work is; what it says must be on the disk by now."""
        self.progress = progress
        replace_file(self.path / JOURNAL, json.dumps({"job": self.job, "progress": progress}, allow_nan=False))

    @property
    def whole(self) -> bool:
        """Whether the work in it is done, and it lacks its final name alone."""
        return os.path.lexists(self.path / MANIFEST)

    @property
    def started(self) -> bool:
        """Whether it holds work that is worth keeping."""
        return os.path.lexists(self.path / JOURNAL) or self.whole

    def read(self) -> dict[str, Any] | None:
        """The journal that an earlier run left. Raises ConfigError if it cannot be read."""
        try:
            journal = from_json(read_bounded(self.path / JOURNAL, MOST).decode())
            if not isinstance(journal, dict):
                raise ValueError("it is no object")
            return journal
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}/{JOURNAL}: damaged ({error}); delete {self.path} and start anew") from None

    def clear(self) -> None:
        """Begins anew, in an empty folder."""
        self.discard()
        self.path.mkdir()

    def discard(self) -> None:
        """Removes the folder: what is in it is of no use."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.progress = None


@contextmanager
def draft_of(final: Path, job: dict[str, Any]) -> Iterator[Draft]:
    """The draft of `final`, which takes its place if the block succeeds. If it does not, what was committed stays.

    Raises:
        ConfigError: `final` holds something else, another process is at it, or it cannot be written.
    """
    final = final.resolve()
    draft = Draft(final.parent / (final.name + ".draft"), job)
    locked = final.parent / (final.name + ".draft.lock")
    try:
        if final.exists() and not (final.is_dir() and not any(final.iterdir())):
            raise ConfigError(
                f"{final}: exists, but holds no prepared data ({MANIFEST} is missing); set data.path to a new folder"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked.open("w") as handle:
            if not lock(handle):
                raise ConfigError(f"{final}: another process is preparing it; wait for it, then run this again")
            try:
                draft.path.mkdir(exist_ok=True)
                yield draft
                for file in (*(draft.path / name for name in SCRATCH), *draft.path.glob("draft-*")):
                    file.unlink(missing_ok=True)
                publish(draft.path, final)
            finally:
                if not draft.started:
                    draft.discard()
                locked.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{final}: the disk is full. Free some space and run this again: it goes on from what {draft.path} "
                "holds. Or delete that and set data.path to another disk"
            ) from None
        raise ConfigError(f"{final}: cannot be written ({error}); set data.path to a folder you may write") from None
