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


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that has its old content or its new one at every moment, and the new one durably in the end."""
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(content)
    flush(draft)
    os.replace(draft, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
