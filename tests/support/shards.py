"""Prepared folders of given documents, without a preparation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from common.files import sha256_of
from data.manifest import FORMAT, fingerprint, split_entry
from data.shard_writer import ShardWriter

EOS = 2


def make_folder(
    folder: Path, shard_tokens: int = 1000, dtype: str = "uint16", vocab_size: int = 60_000, **splits: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """A prepared folder of given documents; returns the stream of tokens that each split should hold."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"a model")
    entries = {}
    for split, documents in splits.items():
        writer = ShardWriter(folder, split, dtype, EOS, shard_tokens)
        for number, ids in enumerate(documents):
            writer.add(ids, 10 + number, number % 3 % 2)
        entries[split] = split_entry(writer.close(), ["some", "other"])
    manifest = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer_file": "tokenizer.model",
        "tokenizer_sha256": sha256_of(folder / "tokenizer.model"),
        "eos_id": EOS,
        "sources": ["some", "other"],
        "splits": entries,
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": fingerprint(manifest)}))
    return {split: np.concatenate([[*ids, EOS] for ids in documents]) for split, documents in splits.items()}


def some_documents(lengths: list[int], below: int = 60_000) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(5, below, size=length).astype(np.int32) for length in lengths]
