"""Files that are whole or absent: hashes, locks, and files and folders that get their names when they are complete."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from common.errors import ConfigError

ROOM_BYTES = 1 << 16  # for the small files of a folder that is written in
SMALL_BYTES = 1 << 20  # that a file of a few words has at most


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
    draft = file.with_name(f"draft-{os.urandom(4).hex()}-{file.name}")  # another process may be at the same file
    try:
        yield draft
        flush(draft)
        os.replace(draft, file)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    flush(file.parent)


def replace_file(file: Path, text: str) -> None:
    """Replaces a file's text, as `replacing` does."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8")


def discard(path: Path) -> None:
    """Removes whatever stands at a path, if anything does. Of a link it removes the link; of a folder, what may not be
    written in it too. Raises OSError.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        os.chmod(path, stat.S_IRWXU)
        for above, names, _ in os.walk(path):
            for inner in (Path(above, name) for name in names):
                if not inner.is_symlink():
                    inner.chmod(stat.S_IRWXU)
        shutil.rmtree(path)


def free_name(path: Path) -> Path:
    """A name beside a path that nothing has: `PATH-1`, `PATH-2` and so on."""
    return next(free for k in range(1, 10**6) if not os.path.lexists(free := path.with_name(f"{path.name}-{k}")))


def unwritable(folder: Path, error: object) -> ConfigError:
    """What is said of a run folder that cannot be written."""
    return ConfigError(f"{folder}: cannot be written ({error}); make room, or give a folder you may write (run=...)")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes in a run folder: an OSError is said as `unwritable` says it."""
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error) from None


def check_writable(folder: Path, room: int = ROOM_BYTES) -> None:
    """Tries whether a folder, which need not be there, could be made and `room` bytes written in it; leaves nothing.

    Raises:
        ConfigError: it could not, or a file is in the way.
    """
    try:
        above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not above.is_dir():
            what = "a link that leads nowhere" if above.is_symlink() and not above.exists() else "a file"
            raise OSError(f"{above} is {what}")
        with suppress(FileNotFoundError):
            os.lstat(folder)  # for a path that cannot be one
        missing = folder.absolute().parts[len(above.absolute().parts) :]
        longest = os.pathconf(above, "PC_NAME_MAX")
        if any(len(os.fsencode(name)) > longest for name in missing):
            raise OSError(f"a name in it is longer than {longest} bytes")
        with tempfile.TemporaryFile(dir=above) as file:  # without a name, where the file system can
            file.write(bytes(room))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from None


def flush(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO[str] | int, *, shared: bool = False) -> bool:
    """Takes the lock of an open file or folder, which the system frees when this process ends, however it ends; False:
    another process has it. A shared one is refused only while another process has one that is not. A file system
    without locks gives it to everybody.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
