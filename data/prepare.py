"""From text to a prepared folder: train the tokenizer, split, drop duplicates, encode, write shards.

Everything is written into `PATH.draft` and gets its name when it is whole, so `data.path` is complete or absent.
"""

import errno
import hashlib
import heapq
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, FilesSource, HubSource
from data.corpus import documents, files_of, folder_of
from data.files import lock, publish, sha256_of
from data.settings import ConfigError
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
from data.tokenizer import Tokenizer, train

SAMPLE_SPAN = 20  # the tokenizer's sample is drawn from the first 20 * train_bytes bytes of the source
BATCH_BYTES = 8 << 20  # text that is encoded at once
REPORT_SECONDS = 30

Log = Callable[[str], Any]


def prepare(cfg: DataConfig, log: Log = print) -> dict[str, Any]:
    """Makes the folder `cfg.path`, or finds it made from the same settings.

    Returns:
        The manifest.
    Raises:
        ConfigError: the source or tokenizer cannot be used, a split would be empty, the disk is full, or the folder
            holds something else; nothing that existed is touched then.
    """
    if os.path.exists(cfg.path / MANIFEST):  # false for a folder that may not be entered: writing will name that
        return _reuse(cfg, log)
    _check_disk(cfg)
    with _draft(cfg.path) as draft:
        manifest = _build(cfg, draft, log)
    log(f"prepared {cfg.path}: fingerprint {manifest['fingerprint'][:12]}")
    return manifest


def _build(cfg: DataConfig, draft: Path, log: Log) -> dict[str, Any]:
    tokenizer = _tokenizer(cfg, draft / TOKENIZER, log)
    counts: Counter[str] = Counter()
    texts = islice(documents(cfg.source, counts), cfg.limit_documents)
    shards = _write(cfg, tokenizer, texts, draft, counts, log)
    for split, remedy in (("train", "a smaller data.val_fraction"), ("val", "a larger data.val_fraction")):
        if not shards[split]:
            total = sum(shard["documents"] for entries in shards.values() for shard in entries)
            raise ConfigError(f"the {split} split is empty: {total} documents in all; take {remedy} or more documents")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": cfg.dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_file": TOKENIZER,
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "splits": {split: split_entry(entries) for split, entries in shards.items()},
        "dropped": {"empty": counts["empty"], "duplicates": counts["duplicates"]},
        "settings": _settings(cfg),
        "inputs": _inputs(cfg),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_manifest(draft, manifest)
    for split, entry in manifest["splits"].items():
        log(
            f"{split}: {entry['documents']:,} documents, {entry['text_bytes'] / 1e6:.2f} MB of text, "
            f"{entry['tokens']:,} tokens, {entry['text_bytes'] / entry['tokens']:.3f} bytes/token"
        )
    log(f"dropped: {counts['duplicates']:,} duplicates, {counts['empty']:,} empty documents")
    return manifest


# ---- tokenizer


def _tokenizer(cfg: DataConfig, path: Path, log: Log) -> Tokenizer:
    """Puts the tokenizer at `path`: a copy of the given one, or one trained on a sample of the train split."""
    given = cfg.tokenizer.model
    if given is None:
        sample = _sample(cfg)
        size = sum(len(text.encode()) for text in sample)
        log(f"training a tokenizer: {cfg.tokenizer.vocab_size:,} pieces from {size / 1e6:.2f} MB of text")
        train(sample, cfg.tokenizer.vocab_size, path)
        return Tokenizer(path)
    tokenizer = Tokenizer(given)
    if tokenizer.vocab_size != cfg.tokenizer.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but {given} has {tokenizer.vocab_size} pieces; "
            f"set it to {tokenizer.vocab_size}"
        )
    shutil.copyfile(given, path)
    return tokenizer


def _sample(cfg: DataConfig) -> list[str]:
    """At most `train_bytes` of the train split: the documents of lowest hash, an even and reproducible sample."""
    cap = cfg.tokenizer.train_bytes
    kept: list[tuple[int, str]] = []  # a heap, highest hash first
    chosen: set[int] = set()  # hashes: a document that occurs twice counts once
    kept_bytes = seen_bytes = 0
    for text in islice(documents(cfg.source), cfg.limit_documents):
        size = len(text.encode())
        digest = _hash(text)
        seen_bytes += size
        if digest not in chosen and not _held_out(digest, cfg.val_fraction):
            chosen.add(digest)
            heapq.heappush(kept, (-digest, text))
            kept_bytes += size
            while kept_bytes > cap and len(kept) > 1:
                kept_bytes -= len(heapq.heappop(kept)[1].encode())
        if seen_bytes >= SAMPLE_SPAN * cap:
            break
    return [text for _, text in sorted(kept, reverse=True)]


# ---- documents


def _hash(text: str) -> int:
    """First 8 bytes of a document's SHA-256, as a number below 2**64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _held_out(digest: int, val_fraction: float) -> bool:
    return digest / 2**64 < val_fraction


class _Seen:
    """The hashes of all documents so far, at 8 bytes each.

    Two different documents among 8 million share 64 bits with a probability of 2 in a million.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []  # sorted; each at least twice as long as the next

    def new(self, digests: np.ndarray) -> np.ndarray:
        """Adds uint64 digests (N,); returns which of them had not been seen, bool (N,)."""
        values, first = np.unique(digests, return_index=True)
        fresh = np.ones(len(values), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, values), len(run) - 1)
            fresh &= run[at] != values
        run = values[fresh]
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]))
        if len(run):
            self._runs.append(run)
        out = np.zeros(len(digests), dtype=bool)
        out[first[fresh]] = True
        return out


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of consecutive texts with about `size` characters each."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write(
    cfg: DataConfig, tokenizer: Tokenizer, texts: Iterable[str], draft: Path, counts: Counter[str], log: Log
) -> dict[str, list[dict[str, Any]]]:
    """Encodes the documents into shards of `train` and `val`; returns the shards' entries of the manifest."""
    writers = {
        split: ShardWriter(draft, split, cfg.dtype, tokenizer.eos_id, cfg.shard_tokens) for split in ("train", "val")
    }
    seen = _Seen()
    began = reported = time.monotonic()
    read_documents = read_bytes = 0
    try:
        for batch in _batches(texts, BATCH_BYTES):
            digests = [_hash(text) for text in batch]
            fresh = seen.new(np.array(digests, dtype=np.uint64))
            counts["duplicates"] += int((~fresh).sum())
            kept = [(text, digest) for text, digest, new in zip(batch, digests, fresh, strict=True) if new]
            encoded = tokenizer.encode_batch([text for text, _ in kept])
            for (text, digest), ids in zip(kept, encoded, strict=True):
                split = "val" if _held_out(digest, cfg.val_fraction) else "train"
                size = len(text.encode())
                writers[split].add(ids, size)
                read_bytes += size
            read_documents += len(batch)
            now = time.monotonic()
            if now - reported >= REPORT_SECONDS:
                reported = now
                rate = read_bytes / 1e6 / (now - began)
                log(f"encoding: {read_documents:,} documents, {read_bytes / 1e6:,.0f} MB of text, {rate:.1f} MB/s")
        return {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()


# ---- the folder


def _settings(cfg: DataConfig) -> dict[str, Any]:
    """What the prepared data depends on; not where it lies."""
    return cfg.model_dump(mode="json", exclude={"path"})


def _inputs(cfg: DataConfig) -> list[list[Any]]:
    """[path, bytes] of each local file that is read."""
    if isinstance(cfg.source, FilesSource):
        files = files_of(cfg.source)
    elif isinstance(cfg.source, HubSource) and (folder := folder_of(cfg.source)):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
    else:
        files = []
    return [[str(file.absolute()), file.stat().st_size] for file in files]


def _reuse(cfg: DataConfig, log: Log) -> dict[str, Any]:
    """Checks that the folder was made from these settings, from files of these sizes, and is whole."""
    manifest = read_manifest(cfg.path)
    differences = list(_differences(manifest["settings"], _settings(cfg)))
    try:
        inputs = _inputs(cfg)
    except ConfigError:  # prepared data outlives its source
        inputs = []
    if inputs and inputs != manifest["inputs"]:
        changed = [file for file, size in inputs if [file, size] not in manifest["inputs"]]
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


def _differences(made: Any, asked: Any, path: str = "data") -> Iterator[str]:
    if isinstance(made, dict) and isinstance(asked, dict):
        for key in {**made, **asked}:
            yield from _differences(made.get(key), asked.get(key), f"{path}.{key}")
    elif made != asked:
        yield f"{path} was {made!r} and is now {asked!r}"


def _check_disk(cfg: DataConfig) -> None:
    """Stops before a long run that cannot end well. Compressed text is taken to grow threefold, a token for 4 bytes."""
    inputs = _inputs(cfg)
    if cfg.limit_documents is not None:
        return  # no telling how much of the source that is
    text_bytes = sum(size * (1 if file.endswith((".txt", ".jsonl")) else 3) for file, size in inputs)
    needed = text_bytes // 4 * DTYPES[cfg.dtype].itemsize
    path = cfg.path.absolute()
    folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{cfg.path}: the shards need about {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
            "free some space or set data.path to another disk"
        )


@contextmanager
def _draft(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` that takes its place if the block succeeds, and is gone if it does not.

    What a killed run left is removed; a run that is alive holds a lock and is left alone.
    """
    final = final.resolve()
    draft = final.parent / (final.name + ".draft")
    locked = final.parent / (final.name + ".draft.lock")
    try:
        if final.exists() and not (final.is_dir() and not any(final.iterdir())):
            raise ConfigError(
                f"{final}: exists, but holds no prepared data ({MANIFEST} is missing); set data.path to a new folder"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked.open("w") as handle:
            if not lock(handle):
                raise ConfigError(f"{final}: another process is preparing it; wait for it, then run this again")
            shutil.rmtree(draft, ignore_errors=True)
            try:
                draft.mkdir()
                yield draft
                publish(draft, final)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
                locked.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{final}: the disk is full; nothing was kept. Free some space or set data.path to another disk"
            ) from None
        raise ConfigError(f"{final}: cannot be written ({error}); set data.path to a folder you may write") from None
