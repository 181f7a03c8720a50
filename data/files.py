"""Files that are whole or absent: hashes, and a folder that gets its final name when it is complete."""

import hashlib
import os
from pathlib import Path


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(draft: Path, final: Path) -> None:
    """Gives a whole draft folder its final name, at once and durably; `final` is absent or an empty folder."""
    for path in (*draft.iterdir(), draft):
        flush(path)
    os.replace(draft, final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
