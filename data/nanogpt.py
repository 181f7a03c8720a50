"""Import of what nanoGPT's data/*/prepare.py writes: train.bin and val.bin, GPT-2 ids as little-endian uint16.

Its stream of tokens is taken as it is; <|endoftext|> ends a document. GPT-2's vocabulary is not in those files. With a
vocabulary file (vocab.json or encoder.json: the same mapping of byte strings to ids) the bytes of each document's text
are known and text can be shown. Without one they are not, and so neither are bits per byte.
"""

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.draft import draft_of
from data.files import sha256_of
from data.prepare import SPLITS, tell_splits
from data.progress import Log, progress, say
from data.settings import ConfigError
from data.shards import FORMAT, MANIFEST, ShardWriter, fingerprint, read_manifest, split_entry, write_manifest

VOCAB_SIZE = 50257
EOS = 50256
VOCABULARY = "vocab.json"
BLOCK = 1 << 24  # tokens that are looked at together
SHARD_TOKENS = 100_000_000


class Gpt2Vocabulary:
    """The byte string of each GPT-2 id, from a vocab.json.

    Raises:
        ConfigError: the file cannot be read or is not such a vocabulary.
    """

    def __init__(self, path: Path) -> None:
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); give GPT-2's vocab.json or encoder.json") from None
        if not isinstance(ids, dict) or sorted(ids.values(), key=str) != sorted(range(VOCAB_SIZE), key=str):
            raise ConfigError(f"{path}: not GPT-2's vocabulary, which maps {VOCAB_SIZE:,} pieces to the ids from 0 on")
        if ids.get("<|endoftext|>") != EOS:
            raise ConfigError(f"{path}: <|endoftext|> is {ids.get('<|endoftext|>')}, but GPT-2's is {EOS}")
        alphabet = _alphabet()
        self.pieces: list[str] = sorted(ids, key=ids.__getitem__)
        try:
            found = [bytes(alphabet[character] for character in piece) for piece in self.pieces[:EOS]]
        except KeyError as error:
            raise ConfigError(
                f"{path}: {error} is not in the alphabet of GPT-2's pieces; give its vocab.json"
            ) from None
        self._bytes = [*found, b""]  # the mark of the end has no text

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of text of each id, int64 (V,)."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    def piece(self, index: int) -> str:
        return self.pieces[index]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


def _alphabet() -> dict[str, int]:
    """The character by which GPT-2's files write each byte: itself where it is visible, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def import_nanogpt(folder: Path, out: Path, vocabulary: Path | None = None, log: Log = say) -> dict[str, Any]:
    """Makes a prepared folder `out` of nanoGPT's train.bin and val.bin; returns its manifest.

    Raises:
        ConfigError: the files are missing, no GPT-2 tokens, or of another vocabulary; or `out` holds something else.
    """
    streams = {split: _stream(folder / f"{split}.bin") for split in SPLITS}
    if (folder / "meta.pkl").exists():
        raise ConfigError(
            f"{folder}: meta.pkl says that these are characters, not GPT-2 tokens; prepare the text itself with "
            "`python -m data prepare CONFIG`"
        )
    known = None if vocabulary is None else Gpt2Vocabulary(vocabulary)
    settings = {"source": {"kind": "prepared"}}
    inputs = {"nanogpt": [[str(file.absolute()), file.stat().st_size] for file in map(folder.joinpath, _names())]}
    if (out / MANIFEST).exists():
        raise ConfigError(f"{out}: holds prepared data already; set --out to a new folder")
    with draft_of(out, {}) as draft:
        if draft.read() is not None:
            raise ConfigError(f"{draft.path}: holds an unfinished preparation; delete it or set --out to a new folder")
        draft.clear()  # of what a killed import left
        shards = {split: _copy(stream, split, draft.path, known, log) for split, stream in streams.items()}
        if vocabulary is not None:
            shutil.copyfile(vocabulary, draft.path / VOCABULARY)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "dtype": "uint16",
            "vocab_size": VOCAB_SIZE,
            "tokenizer_file": None if vocabulary is None else VOCABULARY,
            "tokenizer_sha256": None if vocabulary is None else sha256_of(vocabulary),
            "eos_id": EOS,
            "sources": ["nanogpt"],
            "splits": {split: split_entry(entries, ["nanogpt"]) for split, entries in shards.items()},
            "dropped": {},
            "settings": settings,
            "inputs": inputs,
        }
        manifest["fingerprint"] = fingerprint(manifest)
        write_manifest(draft.path, manifest)
    tell_splits(manifest, log)
    if vocabulary is None:
        log("the bytes of the text are not known without --vocab, so there will be no bits/byte")
    log(f"imported {out}: fingerprint {manifest['fingerprint'][:12]}. To train on it, set")
    log(f"  data: {{path: {out}, source: {{kind: prepared}}, tokenizer: {{vocab_size: {VOCAB_SIZE}}}}}")
    return read_manifest(out)


def _names() -> list[str]:
    return [f"{split}.bin" for split in SPLITS]


def _stream(path: Path) -> np.ndarray:
    """The ids in a file, uint16 (tokens,), memory-mapped."""
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing; give the folder in which nanoGPT's prepare.py wrote {' and '.join(_names())}"
        )
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ConfigError(f"{path}: {size} bytes are no uint16 ids; run nanoGPT's prepare.py again")
    return np.memmap(path, dtype="<u2", mode="r")


def _copy(
    stream: np.ndarray, split: str, folder: Path, vocabulary: Gpt2Vocabulary | None, log: Log
) -> list[dict[str, Any]]:
    """Writes a stream's documents as shards. The end mark is added if it lacks one."""
    writer = ShardWriter(folder, split, "uint16", EOS, SHARD_TOKENS)

    def add(ids: np.ndarray) -> None:
        writer.add(ids, None if vocabulary is None else int(vocabulary.lengths[ids].sum()))

    try:
        start = 0  # of the document that is not ended yet
        with progress(f"importing {split}", log) as tell:
            for first in range(0, len(stream), BLOCK):
                block = stream[first : first + BLOCK]
                if int(block.max()) >= VOCAB_SIZE:
                    at = first + int(np.argmax(block >= VOCAB_SIZE))
                    raise ConfigError(f"{split}.bin, token {at}: {stream[at]} is no GPT-2 id, which end at {EOS}")
                for end in (first + np.flatnonzero(block == EOS)).tolist():
                    add(stream[start:end])
                    start = end + 1
                tell((first + len(block)) / len(stream), f"{first + len(block):,} tokens")
        if start < len(stream):
            add(stream[start:])
        return writer.close()
    finally:
        writer.abandon()
