"""From text to a prepared folder: train the tokenizer, split, clean, encode, write shards.

One process reads the documents in order; others hash and encode them; the first takes the results in order, drops
duplicates and writes. So the bytes do not depend on how many processes there are. From time to time everything is
brought to the disk and noted in the draft's journal: a run that is killed goes on from there.
"""

import heapq
import os
import shutil
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.files import flush, sha256_of
from common.machine import cores
from common.progress import Log, progress, say
from common.workers import Workers
from data.config import DataConfig, MixtureSource, PreparedSource
from data.draft import HELD_OUT, SEEN, Draft, draft_of
from data.encode import EMPTY, SHORT, Encoded, Encoder, HeldOutRuns, digest_of, held_out
from data.overlap import union
from data.shards import (
    DTYPES,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    ShardWriter,
    check_tokenizer,
    fingerprint,
    open_split,
    read_manifest,
    split_entry,
    write_manifest,
)
from data.sources.corpus import (
    EMBEDDED,
    Document,
    Part,
    check_columns,
    documents,
    is_empty,
    is_remote,
    no_text,
    parts_of,
    read,
)
from data.sources.formats import LINES
from data.sources.separators import check_separators
from data.tokenizer import Tokenizer, train

SAMPLE_SPAN = 20  # the tokenizer's sample is drawn from the first 20 * train_bytes bytes of the source
BATCH_CHARS = 1 << 20  # text that is sent to a process at once
COMMIT_SECONDS = 15  # a killed run loses little more than so much work
SPLITS = ("train", "val")


def prepare(cfg: DataConfig, log: Log = say, workers: int | None = None) -> dict[str, Any]:
    """Makes the folder `cfg.path`, or finds it made from the same settings.

    Args:
        cfg: the settings.
        log: takes lines of text.
        workers: processes that encode; None: one for each core. The result does not depend on it.
    Returns:
        The manifest.
    Raises:
        ConfigError: the source or tokenizer cannot be used, a split would be empty, the disk is full, or the folder
            holds something else; nothing that existed is touched then, and finished work is kept for the next run.
    """
    if os.path.exists(cfg.path / MANIFEST):  # false for a folder that may not be entered: writing will name that
        return _reuse(cfg, log)
    if isinstance(cfg.source, PreparedSource):
        raise ConfigError(
            f"{cfg.path}: no imported data here; run `python -m data import-nanogpt FOLDER --out {cfg.path}` first"
        )
    parts = {name: parts_of(entry.source) for name, entry in cfg.sources().items()}
    with draft_of(cfg.path, _job(cfg, parts)) as draft:
        made_before = draft.whole  # and the run was killed before it could name it
        if not made_before:
            resumed = _resume(draft, log)
            _check_disk(cfg, parts, draft.path)
            if not resumed:
                for found in parts.values():
                    check_columns(found)
                    check_separators(found, log)
            _build(cfg, parts, draft, log, workers or cores())
    manifest = _reuse(cfg, log) if made_before else read_manifest(cfg.path)
    log(f"prepared {cfg.path}: fingerprint {manifest['fingerprint'][:12]}")
    return manifest


def _build(cfg: DataConfig, parts: dict[str, list[Part]], draft: Draft, log: Log, workers: int) -> None:
    if draft.progress is None:
        _make_tokenizer(cfg, draft.path / TOKENIZER, log)
        flush(draft.path / TOKENIZER)
        draft.commit({})
    tokenizer = Tokenizer(draft.path / TOKENIZER)
    val_runs = None
    if cfg.val_overlap is not None:
        val_runs = _find_val_runs(cfg, parts, draft.path / HELD_OUT, log, workers)
    encoder = Encoder(draft.path / TOKENIZER, cfg.dtype, cfg.min_chars, cfg.val_fraction, cfg.val_overlap, val_runs)
    writing = _Writing(cfg, tokenizer.eos_id, draft)
    try:
        _write(cfg, parts, encoder, writing, log, workers)
        shards = {split: writer.close() for split, writer in writing.writers.items()}
    finally:
        writing.abandon()
    for split, remedy in (("train", "a smaller data.val_fraction"), ("val", "a larger data.val_fraction")):
        if not shards[split]:
            total = sum(shard["documents"] for entries in shards.values() for shard in entries)
            draft.discard()
            raise ConfigError(f"the {split} split is empty: {total} documents in all; take {remedy} or more documents")
    sources = list(parts)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": cfg.dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_file": TOKENIZER,
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "sources": sources,
        "splits": {split: split_entry(entries, sources) for split, entries in shards.items()},
        "dropped": {reason: writing.counts[reason] for reason in ("empty", "short", "duplicates", "overlapping")},
        "settings": draft.job["settings"],
        "inputs": draft.job["inputs"],
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_manifest(draft.path, manifest)
    tell_splits(manifest, log)


def tell_splits(manifest: dict[str, Any], log: Log) -> None:
    """What a manifest's splits hold and what was dropped, a line each."""
    for split, entry in manifest["splits"].items():
        by_source = entry["sources"] if len(entry["sources"]) > 1 else {}
        for name, found in {split: entry, **{f"  of {name}": found for name, found in by_source.items()}}.items():
            known = found["text_bytes"] and found["tokens"]  # an empty source has no ratio
            size = f", {found['text_bytes'] / 1e6:.2f} MB of text" if known else ""
            ratio = f", {found['text_bytes'] / found['tokens']:.3f} bytes/token" if known else ""
            log(f"{name}: {found['documents']:,} documents{size}, {found['tokens']:,} tokens{ratio}")
    if manifest["dropped"]:
        log("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()))


# ---- tokenizer


def _make_tokenizer(cfg: DataConfig, path: Path, log: Log) -> None:
    """Puts the tokenizer at `path`: a copy of the given one, or one trained on a sample of the train split."""
    given = cfg.tokenizer.model
    if given is None:
        sample = _sample(cfg)
        size = sum(len(text.encode()) for text in sample)
        log(f"training a tokenizer: {cfg.tokenizer.vocab_size:,} pieces from {size / 1e6:.2f} MB of text")
        train(sample, cfg.tokenizer.vocab_size, path, cfg.tokenizer.nfkc)
        return
    tokenizer = Tokenizer(given)
    if tokenizer.vocab_size != cfg.tokenizer.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but {given} has {tokenizer.vocab_size} pieces; "
            f"set it to {tokenizer.vocab_size}"
        )
    if changes := tokenizer.changes():
        examples = ", ".join(f"{text!r} becomes {back!r}" for text, back in changes.items())
        log(
            f"{given}: this model does not give every text back as it was: {examples}. It is used as it is; for exact "
            "text leave data.tokenizer.model out, and one is trained"
        )
    shutil.copyfile(given, path)


def _sample(cfg: DataConfig) -> list[str]:
    """At most `train_bytes` of the train split: the documents of lowest hash, an even and reproducible sample.

    Each source of a mixture has a share of it as its weight.
    """
    weights = sum(entry.weight for entry in cfg.sources().values())
    chosen: set[int] = set()  # hashes: a document that occurs twice counts once
    sample = []
    for entry in cfg.sources().values():
        cap = cfg.tokenizer.train_bytes * entry.weight / weights
        kept: list[tuple[int, str]] = []  # a heap, highest hash first
        kept_bytes = seen_bytes = 0
        for text in documents(entry.source, cfg.limit_documents):
            size = len(text.encode())
            digest = digest_of(text)
            seen_bytes += size
            if digest not in chosen and not held_out(digest, cfg.val_fraction):
                chosen.add(digest)
                heapq.heappush(kept, (-digest, text))
                kept_bytes += size
                while kept_bytes > cap and len(kept) > 1:
                    kept_bytes -= len(heapq.heappop(kept)[1].encode())
            if seen_bytes >= SAMPLE_SPAN * cap:
                break
        sample += [text for _, text in sorted(kept, reverse=True)]
    return sample


# ---- documents


class Seen:
    """A set of 64-bit hashes, in 16 to 32 bytes for each (a Python set takes 80): open addressing, no removal."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))  # 0: free
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: int) -> bool:
        """Returns whether it was new."""
        digest = digest or 1
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


class _Writing:
    """The shards being written, and all that a run must know to go on with them."""

    def __init__(self, cfg: DataConfig, eos_id: int, draft: Draft) -> None:
        self._draft, self._cfg = draft, cfg
        self._seen_file = draft.path / SEEN
        saved = draft.progress or {}
        self._numbers = {name: number for number, name in enumerate(cfg.sources())}
        self.cursors: dict[str, list[int]] = saved.get("cursors", {name: [0, 0] for name in self._numbers})
        self.tokens: dict[str, int] = saved.get("tokens", dict.fromkeys(self._numbers, 0))
        self.counts: Counter[str] = Counter(saved.get("counts", {}))
        self.seen = Seen()
        self._fresh = array("Q")  # hashes since the last commit
        self._restore_seen(saved.get("seen", 0))
        self.writers = {
            split: ShardWriter(
                draft.path, split, cfg.dtype, eos_id, cfg.shard_tokens, saved.get("splits", {}).get(split)
            )
            for split in SPLITS
        }

    def _restore_seen(self, count: int) -> None:
        self._seen_file.touch()
        os.truncate(self._seen_file, 8 * count)
        for digest in np.fromfile(self._seen_file, dtype=np.uint64).tolist():
            self.seen.add(digest)

    def take(self, source: str, document: "_Encoded") -> None:
        """Drops or writes the next document of a source."""
        self.cursors[source] = [document.part, document.next_row]
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
            split = "val" if held_out(document.digest, self._cfg.val_fraction) else "train"
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
        for writer in self.writers.values():
            writer.abandon()


@dataclass(frozen=True)
class _Encoded:
    """One document, as it comes back from a worker."""

    part: int
    next_row: int
    share: float  # as in Document
    verdict: int
    digest: int
    text_bytes: int
    near: bool
    ids: np.ndarray


def _write(
    cfg: DataConfig, parts: dict[str, list[Part]], encoder: Encoder, writing: _Writing, log: Log, workers: int
) -> None:
    """Writes the documents of all sources, from where `writing` stands.

    The next document is always of the source with the fewest tokens for its weight, until that one has none left.
    """
    weights = {name: entry.weight for name, entry in cfg.sources().items()}
    with Workers(encoder, workers) as pool, progress("encoding", log) as tell:
        streams = {
            name: _encoded(
                _first(read(found, *writing.cursors[name]), _left(cfg, writing)),
                pool,
                ahead=max(1, round(2 * workers * weights[name] / sum(weights.values()))),
            )
            for name, found in parts.items()
        }
        committed = told = began = time.monotonic()
        before = writing.counts["text_bytes"]
        shares = dict.fromkeys(parts, 0.0)
        while _left(cfg, writing) != 0:
            name = min(parts, key=lambda name: writing.tokens[name] / weights[name])
            try:
                document = next(streams[name], None)
            except ConfigError:
                writing.commit()  # all that came before the damage
                raise
            if document is None:
                if not writing.counts[f"documents of {name}"]:
                    raise no_text(cfg.sources()[name].source)
                if isinstance(cfg.source, MixtureSource):
                    log(f"the mixture ends with {name}, which has no more documents")
                break
            writing.take(name, document)
            shares[name] = document.share
            now = time.monotonic()
            if now - committed >= COMMIT_SECONDS:
                writing.commit()
                committed = time.monotonic()
            if now - told >= 0.2:
                told = now
                text_bytes = writing.counts["text_bytes"]
                share = max(shares.values())
                if cfg.limit_documents is not None:
                    share = max(share, writing.counts["documents"] / cfg.limit_documents)
                rate = (text_bytes - before) / 1e6 / (now - began)
                tell(share, f"{text_bytes / 1e6:,.0f} MB of text, {rate:.1f} MB/s")


def _left(cfg: DataConfig, writing: _Writing) -> int | None:
    """Documents to the limit, or None if there is no limit."""
    return None if cfg.limit_documents is None else cfg.limit_documents - writing.counts["documents"]


def _first(found: Iterable[Document], limit: int | None) -> Iterator[Document]:
    """Documents until `limit` with text in them were given."""
    left = limit
    for document in found:
        yield document
        if left is not None and not is_empty(document.text):
            left -= 1
            if left == 0:
                return


def _encoded(found: Iterable[Document], pool: Workers[list[str], Encoded], ahead: int) -> Iterator[_Encoded]:
    """Encodes documents in order, with `ahead` batches under way. An error of the reader comes after what it read."""
    for places, batch in _ahead(found, pool, ahead):
        ends = np.cumsum(batch.lengths)
        starts = ends - batch.lengths
        columns = (batch.verdicts, batch.digests, batch.text_bytes, batch.near, starts, ends)
        rows = zip(places, *(column.tolist() for column in columns), strict=True)
        for (part, row, share), verdict, digest, text_bytes, near, start, end in rows:
            yield _Encoded(part, row, share, verdict, digest, text_bytes, near, batch.ids[start:end])


def _ahead(found: Iterable[Document], pool: Workers, ahead: int) -> Iterator[tuple[list[tuple[int, int, float]], Any]]:
    """Sends batches of documents to the pool; gives the place behind each document, and the results, in order."""
    batches = _batches(found)
    pending: deque[tuple[list[tuple[int, int, float]], Future]] = deque()
    error: ConfigError | None = None
    ended = False
    while pending or not ended:
        while not ended and len(pending) < ahead:
            try:
                batch = next(batches)
            except (StopIteration, ConfigError) as stopped:
                ended, error = True, stopped if isinstance(stopped, ConfigError) else None
                break
            places = [(document.part, document.next_row, document.share) for document in batch]
            pending.append((places, pool.submit([document.text for document in batch])))
        if pending:
            places, asked = pending.popleft()
            yield places, pool.result(asked)
    if error is not None:
        raise error


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of consecutive documents with about `BATCH_CHARS` characters each."""
    batch: list[Document] = []
    chars = 0
    try:
        for document in found:
            batch.append(document)
            chars += len(document.text)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    except ConfigError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _find_val_runs(cfg: DataConfig, parts: dict[str, list[Part]], path: Path, log: Log, workers: int) -> Path:
    """Writes the runs of words of all documents that would be of the val split to `path`, unless they are there."""
    if path.exists():
        return path
    finder = HeldOutRuns(cfg.min_chars, cfg.val_fraction)
    with Workers(finder, workers) as pool, progress("looking for held-out documents", log) as tell:

        def found(source: list[Part]) -> Iterator[np.ndarray]:
            for places, runs in _ahead(_first(read(source), cfg.limit_documents), pool, 2 * workers):
                tell(places[-1][2], "read")
                yield runs

        runs = union(chain.from_iterable(found(source) for source in parts.values()))
    draft = path.with_name(f"draft-{path.name}")
    with draft.open("wb") as stream:
        np.save(stream, runs)
    flush(draft)
    os.replace(draft, path)
    log(f"held-out documents have {len(runs):,} runs of words")
    return path


# ---- the folder


def _settings(cfg: DataConfig) -> dict[str, Any]:
    """What the prepared data depends on; not where it lies."""
    return cfg.model_dump(mode="json", exclude={"path"})


def _inputs(parts: dict[str, list[Part]]) -> dict[str, list[list[Any]]]:
    """[name, bytes] of each file of each source."""
    return {
        source: [[p.name if "://" in p.name else os.path.abspath(p.name), p.size] for p in found if p.name != EMBEDDED]
        for source, found in parts.items()
    }


def _job(cfg: DataConfig, parts: dict[str, list[Part]]) -> dict[str, Any]:
    """What a draft must have been made from for this run to go on with it."""
    given = cfg.tokenizer.model
    return {
        "format": FORMAT,
        "settings": _settings(cfg),
        "tokenizer": sha256_of(given) if given is not None and given.is_file() else None,
        "inputs": _inputs(parts),
    }


def _resume(draft: Draft, log: Log) -> bool:
    """Takes up an earlier run's progress, or empties the draft; returns which."""
    earlier = draft.read()
    if earlier is None:
        draft.clear()
        return False
    done = earlier["progress"]
    job, now = earlier["job"], draft.job
    differences = [f"the program's format was {job['format']}"] if job["format"] != now["format"] else []
    differences += _differences(job["settings"], now["settings"])
    if job["tokenizer"] != now["tokenizer"]:
        differences.append("the content of data.tokenizer.model")
    for source, files in now["inputs"].items():
        before = job["inputs"].get(source, [])
        # A damaged file is replaced by a whole one: what was not read to its end may have another size.
        settled = done["cursors"][source][0] if done else len(before)
        if [name for name, _ in files] != [name for name, _ in before] or files[:settled] != before[:settled]:
            differences.append(f"the files of {source}")
    if not differences:
        draft.progress = done
        log(f"going on with {draft.path}: {done.get('counts', {}).get('documents', 0):,} documents were done")
        return True
    if done:
        raise ConfigError(
            f"{draft.path} holds an unfinished preparation that was begun differently: {'; '.join(differences)}. "
            "Give what was given then to go on with it, set data.path to another folder, or delete the draft"
        )
    log(f"starting anew: {draft.path} was begun differently ({'; '.join(differences)})")
    draft.clear()
    return False


def _reuse(cfg: DataConfig, log: Log) -> dict[str, Any]:
    """Checks that the folder was made from these settings, from files of these sizes, and is whole."""
    manifest = read_manifest(cfg.path)
    imported = isinstance(cfg.source, PreparedSource)
    differences = list(_differences(manifest["settings"]["source"]["kind"], cfg.source.kind, "data.source.kind"))
    if imported and manifest["vocab_size"] != cfg.tokenizer.vocab_size:
        differences.append(f"its vocabulary is {manifest['vocab_size']}: set data.tokenizer.vocab_size to that")
    if imported and manifest["dtype"] != cfg.dtype:
        differences.append(f"its ids are {manifest['dtype']}: set data.dtype to that")
    if not imported:
        differences = list(_differences(manifest["settings"], _settings(cfg)))
        for source, files in _local_inputs(cfg).items():
            before = manifest["inputs"].get(source, [])
            if files != before:
                changed = [name for name, size in files if [name, size] not in before]
                differences.append(f"the source's files ({changed[0] if changed else 'one is gone'})")
    given = cfg.tokenizer.model
    if given is not None and given.is_file() and sha256_of(given) != manifest["tokenizer_sha256"]:
        differences.append(f"the content of {given}")
    if differences:
        raise ConfigError(
            f"{cfg.path} was prepared differently: {'; '.join(differences)}. Set data.path to another folder, "
            "or delete this one to prepare it anew"
        )
    check_tokenizer(cfg.path, manifest)
    splits = {split: open_split(cfg.path, split) for split in manifest["splits"]}
    tokens = ", ".join(f"{split.tokens:,} {name}" for name, split in splits.items())
    log(f"reusing {cfg.path}: {tokens} tokens, fingerprint {manifest['fingerprint'][:12]}")
    return manifest


def _local_inputs(cfg: DataConfig) -> dict[str, list[list[Any]]]:
    """The sources' files, of those sources that are still on this machine: prepared data outlives its text."""
    found = {}
    for name, entry in cfg.sources().items():
        if not is_remote(entry.source):
            try:
                found[name] = parts_of(entry.source)
            except ConfigError:
                continue
    return _inputs(found)


def _differences(made: Any, asked: Any, path: str = "data") -> Iterator[str]:
    if isinstance(made, dict) and isinstance(asked, dict):
        for key in {**made, **asked}:
            yield from _differences(made.get(key), asked.get(key), f"{path}.{key}")
    elif made != asked and not (made is None and asked is False):  # a switch that there was not yet was off
        yield f"{path} was {made!r} and is now {asked!r}"


def _check_disk(cfg: DataConfig, parts: dict[str, list[Part]], draft: Path) -> None:
    """Stops before a long run that cannot end well. Compressed text is taken to grow threefold, a token for 4 bytes."""
    if cfg.limit_documents is not None or isinstance(cfg.source, MixtureSource):
        return  # no telling how much of the sources that is
    files = [part for part in chain.from_iterable(parts.values()) if part.name != EMBEDDED]
    text_bytes = sum(part.size * (1 if part.name.endswith((".txt", *LINES, ".arrow")) else 3) for part in files)
    needed = text_bytes // 4 * DTYPES[cfg.dtype].itemsize - sum(f.stat().st_size for f in draft.iterdir())
    free = shutil.disk_usage(draft).free
    if needed > free:
        raise ConfigError(
            f"{cfg.path}: the shards need about {needed / 1e9:.1f} GB, but {draft.parent} has {free / 1e9:.1f} GB "
            "free; free some space or set data.path to another disk"
        )
