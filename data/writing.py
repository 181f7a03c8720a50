"""Documents written as shards: the next one of each source in turn, those that are dropped left out and counted."""

import os
import time
from array import array
from collections import Counter

import numpy as np

from common.errors import ConfigError
from common.files import flush
from common.progress import Log, progress
from common.workers import Workers
from data.config import DataConfig, MixtureSource
from data.draft import SEEN, Draft
from data.encode import EMPTY, SHORT, Encoder, fractions_of
from data.manifest import SPLITS
from data.pipeline import EncodedDocument, encoded, until
from data.shard_writer import ShardWriter
from data.sources.corpus import no_text, read
from data.sources.stored import Part

COMMIT_SECONDS = 15  # a killed run loses little more than so much work
TELL_SECONDS = 0.2


class Seen:
    """A set of 64-bit hashes, in 16 to 32 bytes for each (a Python set takes 80): open addressing, no removal."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))  # 0: free
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: int) -> bool:
        """Returns whether it was new."""
        digest = digest or 1  # 0 marks a free slot
        slots, last = self._slots, len(self._slots) - 1
        at = digest & last
        while slots[at]:
            if slots[at] == digest:
                return False
            at = at + 1 & last
        slots[at] = digest
        self._count += 1
        if 2 * self._count > len(slots):
            self._slots, self._count = array("Q", bytes(16 * len(slots))), 0
            for known in slots:
                if known:
                    self.add(known)
        return True


class Writing:
    """The shards being written, and all that a run must know to go on with them.

    Attributes: `writers` by split; by source `cursors`, [part, next row], and `tokens` written; `counts` of documents,
    in all and by source, of those dropped by reason, and of `text_bytes`; `seen`, the hashes of all documents.
    """

    def __init__(self, cfg: DataConfig, eos_id: int, draft: Draft) -> None:
        self._draft, self._cfg, self._fractions = draft, cfg, fractions_of(cfg)
        self._seen_file = draft.path / SEEN
        saved = draft.progress or {}
        self._numbers = {name: number for number, name in enumerate(cfg.sources())}
        self.cursors: dict[str, list[int]] = saved.get("cursors", {name: [0, 0] for name in self._numbers})
        self.tokens: dict[str, int] = saved.get("tokens", dict.fromkeys(self._numbers, 0))
        self.counts: Counter[str] = Counter(saved.get("counts", {}))
        self.seen = Seen()
        self._fresh = array("Q")  # hashes since the last commit
        self._seen_file.touch()
        os.truncate(self._seen_file, 8 * saved.get("seen", 0))  # what was written after the last commit is taken back
        for digest in np.fromfile(self._seen_file, dtype=np.uint64).tolist():
            self.seen.add(digest)
        self.writers = {
            split: ShardWriter(
                draft.path, split, cfg.dtype, eos_id, cfg.shard_tokens, saved.get("splits", {}).get(split)
            )
            for split in SPLITS
            if split != "test" or cfg.test_fraction
        }

    @property
    def left(self) -> int | None:
        """Documents to the limit; None: there is no limit."""
        limit = self._cfg.limit_documents
        return None if limit is None else limit - self.counts["documents"]

    def take(self, source: str, document: EncodedDocument) -> None:
        """Drops or writes the next document of a source."""
        self.cursors[source] = [document.origin.part, document.origin.next_row]
        if document.verdict == EMPTY:
            self.counts["empty"] += 1
            return
        self.counts["documents"] += 1
        self.counts[f"documents of {source}"] += 1
        if document.verdict == SHORT:
            self.counts["short"] += 1
        elif self._cfg.deduplicate and not self._is_new(document.digest):
            self.counts["duplicates"] += 1
        elif document.near:
            self.counts["overlapping"] += 1
        else:
            split = self._fractions.split_of(document.digest)
            self.writers[split].add(document.ids, document.text_bytes, self._numbers[source])
            self.tokens[source] += len(document.ids) + 1
            self.counts["text_bytes"] += document.text_bytes

    def _is_new(self, digest: int) -> bool:
        new = self.seen.add(digest)
        if new:
            self._fresh.append(digest)
        return new

    def commit(self) -> None:
        """Brings all of it to the disk and notes in the journal how far it is."""
        with self._seen_file.open("ab") as stream:
            self._fresh.tofile(stream)
        self._fresh = array("Q")
        flush(self._seen_file)
        splits = {split: writer.save() for split, writer in self.writers.items()}
        self._draft.commit(
            {
                "cursors": self.cursors,
                "tokens": self.tokens,
                "counts": dict(self.counts),
                "seen": len(self.seen),
                "splits": splits,
            }
        )

    def abandon(self) -> None:
        """Closes the open shards as they are."""
        for writer in self.writers.values():
            writer.abandon()


def write_documents(
    cfg: DataConfig, parts: dict[str, list[Part]], encoder: Encoder, writing: Writing, log: Log, workers: int
) -> None:
    """Writes the documents of all sources, from where `writing` stands.

    The next document is always of the source with the fewest tokens for its weight, until that one has none left.

    Raises:
        ConfigError: a source is damaged or holds no text; what came before the damage is kept.
    """
    weights = {name: entry.weight for name, entry in cfg.sources().items()}
    with Workers(encoder, workers) as pool, progress("encoding", log) as tell:
        streams = {
            name: encoded(
                until(writing.left, read(files, *writing.cursors[name])),
                pool,
                ahead=max(1, round(2 * workers * weights[name] / sum(weights.values()))),
            )
            for name, files in parts.items()
        }
        committed = told = began = time.monotonic()
        before = writing.counts["text_bytes"]
        shares = dict.fromkeys(parts, 0.0)
        while writing.left != 0:
            name = min(parts, key=lambda name: writing.tokens[name] / weights[name])
            try:
                document = next(streams[name], None)
            except ConfigError:
                writing.commit()
                raise
            if document is None:
                if not writing.counts[f"documents of {name}"]:
                    raise no_text(cfg.sources()[name].source)
                if isinstance(cfg.source, MixtureSource):
                    log(f"the mixture ends with {name}, which has no more documents")
                break
            writing.take(name, document)
            shares[name] = document.origin.share
            now = time.monotonic()
            if now - committed >= COMMIT_SECONDS:
                writing.commit()
                committed = time.monotonic()
            if now - told >= TELL_SECONDS:
                told = now
                text_bytes = writing.counts["text_bytes"]
                share = max(shares.values())
                if cfg.limit_documents is not None:
                    share = max(share, writing.counts["documents"] / cfg.limit_documents)
                rate = (text_bytes - before) / 1e6 / (now - began)
                tell(share, f"{text_bytes / 1e6:,.0f} MB of text, {rate:.1f} MB/s")
