"""Sources of text: each is a list of parts (files), and each part a stream of documents, always in the same order.

A document is known by its part and its row there, so that reading can begin at any of them.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.errors import ConfigError
from data.config import DebianSource, EmbeddedSource, FilesSource, HubSource
from data.sources.debian import Package, debian_parts, missing_packages, package_rows
from data.sources.embedded import embedded_texts
from data.sources.formats import SUFFIXES, check_column, rows_of
from data.sources.hub import ONLY_PART, PARTIAL, folder_of, hub_parts, is_partial
from data.sources.stored import Part

EMBEDDED = "embedded"
EMBEDDED_BYTES = 2_400_000  # about, on any Python

Plain = EmbeddedSource | FilesSource | HubSource | DebianSource


@dataclass(frozen=True)
class Document:
    """A text, or an empty string, and what stands behind it in its source."""

    text: str
    part: int
    next_row: int
    share: float  # of the source's bytes that were read up to here, about


def parts_of(source: Plain) -> list[Part]:
    """The parts of a source, in order.

    Raises:
        ConfigError: a path matches nothing, a file's type is not known, the Hub's dataset cannot be found, or a
            package cannot be had.
    """
    if isinstance(source, EmbeddedSource):
        return [Part(EMBEDDED, EMBEDDED_BYTES)]
    if isinstance(source, FilesSource):
        return [Part(str(f), f.stat().st_size, source.text_field, source.separator) for f in files_of(source)]
    if isinstance(source, DebianSource):
        return debian_parts(source)
    return hub_parts(source)


def is_remote(source: Plain) -> bool:
    """Whether the source must be asked for over the network."""
    if isinstance(source, DebianSource):
        return bool(missing_packages(source))
    return isinstance(source, HubSource) and folder_of(source) is None


def read(parts: list[Part], first_part: int = 0, first_row: int = 0) -> Iterator[Document]:
    """Streams the documents of a source's parts, from one of them on; rows count from 0 in each part.

    Raises:
        ConfigError: a file is missing or damaged; file and line or row are named.
    """
    before, total = sum(part.size for part in parts[:first_part]), max(1, sum(part.size for part in parts))
    for number in range(first_part, len(parts)):
        part = parts[number]
        first = first_row if number == first_part else 0
        for row, (text, share) in enumerate(_read(part, first), start=first):
            yield Document(text, number, row + 1, (before + share * part.size) / total)
        before += part.size


def documents(source: Plain, limit: int | None = None) -> Iterator[str]:
    """Streams the texts of a source that are not empty, at most `limit` of them.

    Raises:
        ConfigError: a file is missing or damaged (file and line or row are named), or there is no text at all.
    """
    nothing = True
    for text in islice((d.text for d in read(parts_of(source)) if not is_empty(d.text)), limit):
        nothing = False
        yield text
    if nothing:
        raise no_text(source)


def is_empty(text: str) -> bool:
    """Whether a text has no visible character."""
    return not text or text.isspace()


def no_text(source: Plain) -> ConfigError:
    """What to raise for a source without any text."""
    return ConfigError(f"data.source ({source.kind}): no document holds any text; give a source with text in it")


def check_columns(parts: list[Part]) -> None:
    """Raises ConfigError unless every file of columns among the parts can be opened and has the column, of text."""
    for part in parts:
        check_column(part)


def _read(part: Part, first: int) -> Iterator[tuple[str, float]]:
    """Texts from row `first` on, each with the share of the part that was read by then."""
    if part.name == EMBEDDED:
        texts = embedded_texts()
        return ((text, number / len(texts)) for number, text in enumerate(texts[first:], start=first + 1))
    if isinstance(part, Package):
        return package_rows(part, first)
    return rows_of(part, first)


def files_of(source: FilesSource) -> list[Path]:
    """The files that the source's paths and globs name: in the order given, sorted within a glob, each once.

    Raises:
        ConfigError: a path matches nothing, or a file's type is not known.
    """
    files: dict[Path, None] = {}
    for pattern in source.paths:
        literal = Path(pattern).expanduser()
        if literal.is_dir():
            raise ConfigError(
                f"data.source.paths: {pattern} is a folder; name its files, such as {pattern.rstrip('/')}/*.txt"
            )
        paths = [literal] if literal.is_file() else sorted(map(Path, glob.glob(str(literal), recursive=True)))
        paths = [file for file in paths if file.is_file()]
        if not paths:
            raise ConfigError(f"data.source.paths: {pattern} matches no file in {Path.cwd()}; check the path")
        for file in paths:
            if not file.name.endswith(SUFFIXES):
                raise ConfigError(f"{file}: cannot read this type of file; expected one of {', '.join(SUFFIXES)}")
            if is_partial(str(file)) and PARTIAL not in pattern:
                raise ConfigError(
                    f"{file}: {ONLY_PART}; leave it out of data.source.paths, or name its folder there to train on it"
                )
            files[file] = None
    return list(files)
