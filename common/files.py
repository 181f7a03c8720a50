"""Files that are whole or absent: hashes, locks, and files and folders that get their names when they are complete."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(draft: Path, final: Path) -> None:
    """Gives a whole draft folder its final name, at once and durably; `final` is absent or an empty folder."""
    for path in (*draft.iterdir(), draft):
        flush(path)
    os.replace(draft, final)
    flush(final.parent)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A draft beside a file, to be written in the block, which then takes the file's place at once and durably: the
    file has the old content or the new one at every moment.
    """
    draft = file.with_name(f"draft-{file.name}")
    yield draft
    flush(draft)
    os.replace(draft, file)
    flush(file.parent)


def replace_file(file: Path, text: str) -> None:
    """Replaces a file's text, as `replacing` does."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO[str], *, shared: bool = False) -> bool:
    """Takes an open file's lock, which the system frees when this process ends, however it ends; False: another
    process has it. A shared one is refused only while another process has one that is not. A file system without locks
    gives it to everybody.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
