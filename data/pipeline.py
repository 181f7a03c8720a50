"""Documents through worker processes: sent in batches, `ahead` of them under way, and taken back in their order."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.errors import ConfigError
from common.files import replacing
from common.progress import Log, progress
from common.workers import Workers
from data.config import DataConfig
from data.encode import EncodedBatch, HeldOutRuns, fractions_of
from data.overlap import union
from data.sources.corpus import Document, is_empty, read
from data.sources.stored import Part

BATCH_CHARS = 1 << 20  # text that is sent to a process at once

Result = TypeVar("Result")


@dataclass(frozen=True)
class EncodedDocument:
    """One document, as it comes back from a worker."""

    origin: Document
    verdict: int
    digest: int
    text_bytes: int
    near: bool
    ids: np.ndarray  # (tokens,), without eos


def until(limit: int | None, documents: Iterable[Document]) -> Iterator[Document]:
    """Documents until `limit` of them with text were given; None: all."""
    left = limit
    for document in documents:
        yield document
        if left is not None and not is_empty(document.text):
            left -= 1
            if left == 0:
                return


def encoded(
    documents: Iterable[Document], pool: Workers[list[str], EncodedBatch], ahead: int
) -> Iterator[EncodedDocument]:
    """Encodes documents in order. An error of the reader comes after what it read."""
    for batch, results in _ahead(documents, pool, ahead):
        ends = np.cumsum(results.lengths)
        starts = ends - results.lengths
        columns = (results.verdicts, results.digests, results.text_bytes, results.near, starts, ends)
        rows = zip(batch, *(column.tolist() for column in columns), strict=True)
        for document, verdict, digest, text_bytes, near, start, end in rows:
            yield EncodedDocument(document, verdict, digest, text_bytes, near, results.ids[start:end])


def find_held_out_runs(cfg: DataConfig, parts: dict[str, list[Part]], path: Path, log: Log, workers: int) -> Path:
    """Writes the runs of words of all documents that would be held out to `path`, unless they are there."""
    if path.exists():
        return path
    finder = HeldOutRuns(cfg.min_chars, fractions_of(cfg))
    with Workers(finder, workers) as pool, progress("looking for held-out documents", log) as tell:

        def runs_by_batch() -> Iterator[np.ndarray]:
            for files in parts.values():
                for batch, batch_runs in _ahead(until(cfg.limit_documents, read(files)), pool, 2 * workers):
                    tell(batch[-1].share, "read")
                    yield batch_runs

        runs = union(runs_by_batch())
    with replacing(path) as draft:
        np.save(draft, runs)
    log(f"held-out documents have {len(runs):,} runs of words")
    return path


def _ahead(
    documents: Iterable[Document], pool: Workers[list[str], Result], ahead: int
) -> Iterator[tuple[list[Document], Result]]:
    """Batches of documents and what the pool makes of each, in order. An error of the reader comes last."""
    errors: list[ConfigError] = []

    def readable() -> Iterator[Document]:
        try:
            yield from documents
        except ConfigError as error:
            errors.append(error)

    sent = ((batch, pool.submit([document.text for document in batch])) for batch in _batches(readable()))
    pending = deque(islice(sent, ahead))
    while pending:
        batch, result = pending.popleft()
        yield batch, pool.result(result)
        pending.extend(islice(sent, 1))
    if errors:
        raise errors[0]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of consecutive documents with about `BATCH_CHARS` characters each."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
