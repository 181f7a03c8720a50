"""Import of ids that nanoGPT's data/*/prepare.py or llm.c's dev/data wrote: GPT-2's as uint16, or what is asked for.

The stream of tokens is taken as it is; the end-of-text id ends a document. The vocabulary is not in those files. With
GPT-2's vocabulary file (vocab.json or encoder.json: the same mapping of byte strings to ids) the bytes of each
document's text are known and text can be shown. Without one they are not, and so neither are bits per byte.
"""

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.files import sha256_of
from common.progress import Log, progress, say
from data.draft import draft_of
from data.gpt2 import EOS, VOCAB_SIZE, Gpt2Vocabulary
from data.manifest import FORMAT, MANIFEST, SPLITS, fingerprint, log_splits, read_manifest, split_entry, write_manifest
from data.shard_writer import ShardWriter
from data.shards import IMPORTED
from data.token_files import Asked, Layout, TokenFile, check_ids, files_of, open_files

VOCABULARY = "vocab.json"
SHARD_TOKENS = 100_000_000


def import_nanogpt(
    folder: Path, out: Path, vocabulary: Path | None = None, log: Log = say, asked: Asked | None = None
) -> dict[str, Any]:
    """Makes a prepared folder `out` of nanoGPT's or llm.c's files; returns its manifest.

    Args:
        folder: where the files are: of train, of val and, if there are any, of test.
        out: the prepared folder to make.
        vocabulary: GPT-2's vocab.json or encoder.json, for GPT-2's ids.
        log: takes lines of text.
        asked: width and vocabulary of the ids, where they are not GPT-2's as uint16 and no header tells them.
    Raises:
        ConfigError: files are missing, or hold no ids of that width and vocabulary; or `out` holds something else.
    """
    asked = asked or Asked()
    paths = {split: found for split in SPLITS if (found := files_of(folder, split))}
    if (folder / "meta.pkl").exists():
        raise ConfigError(
            f"{folder}: meta.pkl says that these are characters, not GPT-2 tokens; prepare the text itself with "
            "`overtone prepare CONFIG`"
        )
    layout, files = open_files([path for files in paths.values() for path in files], asked)
    streams = {split: [file for file in files if file.path in paths[split]] for split in paths}
    if vocabulary is not None and (layout.vocab_size, layout.eos_id) != (VOCAB_SIZE, EOS):
        raise ConfigError(f"{vocabulary}: --vocab is GPT-2's vocabulary, but the ids are of another one; leave it out")
    known = None if vocabulary is None else Gpt2Vocabulary(vocabulary)
    if (out / MANIFEST).exists():
        raise ConfigError(f"{out}: holds prepared data already; set --out to a new folder")
    for split, stream in streams.items():
        check_ids(stream, split, layout, asked, log)
    inputs = [[str(file.path.absolute()), file.path.stat().st_size] for file in files]
    with draft_of(out, {}) as draft:
        if draft.read() is not None:
            raise ConfigError(f"{draft.path}: holds an unfinished preparation; delete it or set --out to a new folder")
        draft.clear()  # of what a killed import left
        shards = {split: _copy(stream, split, layout, draft.path, known, log) for split, stream in streams.items()}
        if vocabulary is not None:
            shutil.copyfile(vocabulary, draft.path / VOCABULARY)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "dtype": layout.dtype,
            "vocab_size": layout.vocab_size,
            "tokenizer_file": None if vocabulary is None else VOCABULARY,
            "tokenizer_sha256": None if vocabulary is None else sha256_of(vocabulary),
            "eos_id": layout.eos_id,
            "sources": ["nanogpt"],
            "splits": {split: split_entry(entries, ["nanogpt"]) for split, entries in shards.items()},
            "dropped": {},
            "settings": {"source": IMPORTED},
            "inputs": {"nanogpt": inputs},
        }
        manifest["fingerprint"] = fingerprint(manifest)
        write_manifest(draft.path, manifest)
    log_splits(manifest, log)
    if vocabulary is None:
        log("the bytes of the text are not known without --vocab, so there will be no bits/byte")
    log(f"imported {out}: fingerprint {manifest['fingerprint'][:12]}. To train on it, set")
    dtype = "" if layout.dtype == "uint16" else f", dtype: {layout.dtype}"
    log(f"  data: {{path: {out}, source: {{kind: prepared}}, tokenizer: {{vocab_size: {layout.vocab_size}}}{dtype}}}")
    return read_manifest(out)


def _copy(
    files: list[TokenFile], split: str, layout: Layout, folder: Path, vocabulary: Gpt2Vocabulary | None, log: Log
) -> list[dict[str, Any]]:
    """Writes the documents of a split's files as shards. The end mark is added if the last one lacks it."""
    writer = ShardWriter(folder, split, layout.dtype, layout.eos_id, SHARD_TOKENS)
    total = sum(len(file.ids) for file in files)
    written = 0

    def add(parts: list[np.ndarray]) -> None:
        ids = np.concatenate(parts)
        writer.add(ids, None if vocabulary is None else int(vocabulary.lengths[ids].sum()))

    try:
        begun: list[np.ndarray] = []  # the document that is not ended yet
        with progress(f"importing {split}", log) as tell:
            for block in chain.from_iterable(file.blocks() for file in files):
                start = 0
                for end in np.flatnonzero(block == layout.eos_id).tolist():
                    add([*begun, block[start:end]])
                    begun, start = [], end + 1
                if start < len(block):
                    begun.append(block[start:])
                written += len(block)
                tell(written / total, f"{written:,} tokens")
        if begun:
            add(begun)
        return writer.close()
    finally:
        writer.abandon()
