"""The files of a source as they are stored, here or on another file system: unpacked, in lines, damage named."""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO

from common.errors import ConfigError
from data.sources.encoding import without_mark

ACCESS = "set HF_TOKEN or run `hf auth login`, and accept the terms on the dataset's page if it has some"

Rows = Iterator[tuple[str, float]]  # texts, each with the share of the file that was read by then


@dataclass(frozen=True)
class Part:
    """A file of a source, or the embedded corpus."""

    name: str  # path, or an address such as hf://datasets/...
    size: int  # bytes, as stored
    field: str = "text"
    separator: str | None = None

    @property
    def identity(self) -> list[str | int]:
        """What a manifest says of it: where it is, which begins with its name, and its bytes."""
        return [self.name if "://" in self.name else os.path.abspath(self.name), self.size]

    @property
    def kind(self) -> str:
        """Its format: the end of its name, without that of a compression."""
        return PurePath(self.name.removesuffix(".gz").removesuffix(".zst")).suffix


@contextmanager
def damage_named(name: str, place: Callable[[], str]) -> Iterator[None]:
    """Turns what readers raise into a ConfigError that names the file and the place."""
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}, {place()}: invalid UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except Exception as error:
        # Clients of other file systems have classes of their own for a connection that breaks.
        remote = "://" in name
        if not remote and not isinstance(error, OSError | EOFError | zlib.error | pyarrow.ArrowException):
            raise
        reason = " ".join(str(error).split()) or repr(error)
        remedy = "check the network" if remote else "replace the file by a whole copy"
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            remedy = f"{ACCESS}; if you have access, check the network"
        raise ConfigError(
            f"{name}: unreadable after {place()} ({reason}); {remedy}, then run this again: it goes on from what is "
            "finished"
        ) from None


@contextmanager
def unpacked(part: Part) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file's content as a stream, and the stored file below it, which tells how far reading is."""
    with open_stored(part.name) as stored:
        if part.name.endswith(".gz"):
            yield gzip.GzipFile(fileobj=stored, mode="rb"), stored  # type: ignore[misc]
        elif part.name.endswith(".zst"):
            import pyarrow

            packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), "zstd")
            yield io.BufferedReader(packed), stored
        else:
            yield stored, stored


def open_stored(name: str) -> IO[bytes]:
    """A file as it is stored, here or on the file system that its address names."""
    if "://" in name:
        import fsspec

        return fsspec.open(name, "rb").open()
    return open(name, "rb")


def lines_of(part: Part) -> Iterator[tuple[int, str, float]]:
    """Numbered lines, with their ends. A UTF-8 sequence never holds the newline byte, so lines decode one by one."""
    number = 0
    with damage_named(part.name, lambda: f"line {number}"), unpacked(part) as (stream, stored):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = without_mark(line, part.name)
            yield number, line.decode("utf-8"), stored.tell() / part.size
