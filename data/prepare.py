"""From text to a prepared folder: train the tokenizer, split, clean, encode, write shards.

One process reads the documents in order; others hash and encode them; the first takes the results in order, drops
duplicates and writes. So the bytes do not depend on how many processes there are. From time to time everything is
brought to the disk and noted in the draft's journal: a run that is killed goes on from there.
"""

import os
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import flush
from common.machine import cores
from common.progress import Log, say
from data.config import DataConfig, MixtureSource, PreparedSource
from data.draft import HELD_OUT, Draft, draft_of
from data.encode import Encoder, fractions_of
from data.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    fingerprint,
    log_splits,
    read_manifest,
    split_entry,
    write_manifest,
)
from data.pipeline import find_held_out_runs
from data.reuse import job_of, resume, reuse
from data.sources.corpus import EMBEDDED, check_columns, parts_of
from data.sources.formats import LINES
from data.sources.separators import check_separators
from data.sources.stored import Part
from data.tokenizer import Tokenizer
from data.tokenizer_training import make_tokenizer
from data.writing import Writing, write_documents


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
        return reuse(cfg, log)
    if isinstance(cfg.source, PreparedSource):
        raise ConfigError(
            f"{cfg.path}: no imported data here; run `python -m data import-nanogpt FOLDER --out {cfg.path}` first"
        )
    parts = {name: parts_of(entry.source) for name, entry in cfg.sources().items()}
    with draft_of(cfg.path, job_of(cfg, parts)) as draft:
        made_before = draft.whole  # and the run was killed before it could name it
        if not made_before:
            resumed = resume(draft, log)
            _check_disk(cfg, parts, draft.path)
            if not resumed:
                for files in parts.values():
                    check_columns(files)
                    check_separators(files, log)
            _build(cfg, parts, draft, log, workers or cores())
    manifest = reuse(cfg, log) if made_before else read_manifest(cfg.path)
    log(f"prepared {cfg.path}: fingerprint {manifest['fingerprint'][:12]}")
    return manifest


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


def _build(cfg: DataConfig, parts: dict[str, list[Part]], draft: Draft, log: Log, workers: int) -> None:
    """Fills the draft, from where it stands."""
    model = draft.path / TOKENIZER
    if draft.progress is None:
        make_tokenizer(cfg, model, log)
        flush(model)
        draft.commit({})
    tokenizer = Tokenizer(model)
    held_out_runs = None
    if cfg.val_overlap is not None:
        held_out_runs = find_held_out_runs(cfg, parts, draft.path / HELD_OUT, log, workers)
    encoder = Encoder(model, cfg.dtype, cfg.min_chars, fractions_of(cfg), cfg.val_overlap, held_out_runs)
    writing = Writing(cfg, tokenizer.eos_id, draft)
    try:
        write_documents(cfg, parts, encoder, writing, log, workers)
        shards = {split: writer.close() for split, writer in writing.writers.items()}
    finally:
        writing.abandon()
    for split in shards:
        if not shards[split]:
            remedy = "a smaller data.val_fraction" if split == "train" else f"a larger data.{split}_fraction"
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
    log_splits(manifest, log)
