"""Files that are whole or absent: hashes, locks, and files and folders that get their names when they are complete."""

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO


def open_regular(file: Path) -> BufferedReader:
    """Opens a regular file, or a link to one, to be read. Raises OSError for anything else: a FIFO is not waited for,
    and a device is not touched.
    """
    if stat.S_ISREG(file.stat().st_mode):
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(handle).st_mode):  # it may have changed since
            return os.fdopen(handle, "rb")
        os.close(handle)
    raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_bounded(file: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError for anything else, and for more than `most` of them."""
    with open_regular(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than the {most:,} bytes that it may have", str(file))
    return content


def sha256_of(file: Path) -> str:
    """The SHA-256 of a regular file's bytes, in hexadecimal digits. Raises OSError."""
    with open_regular(file) as stream:
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
