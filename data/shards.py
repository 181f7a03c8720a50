"""Token shards: flat files of ids with an index of documents, and a manifest that binds them together.

A prepared folder holds
    tokenizer.model   the SentencePiece model that made the ids
    SPLIT-00000.bin   a 64-byte header, then the ids as uint16 or uint32
    SPLIT-00000.idx   int64 (2, documents): where each document starts in the shard, and its bytes of UTF-8 text
    manifest.json     counts, hashes and settings; written last, so a folder with a manifest is complete
All integers are little endian. The header is the magic, then format version and bytes per id (uint32), then tokens and
documents (uint64), then zeros. A document is its tokens followed by eos, and never spans two shards.
"""

import hashlib
import json
import struct
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.files import sha256_of
from data.settings import ConfigError

FORMAT = 1
MAGIC = b"OVERTONE"
HEADER = struct.Struct("<8sIIQQ32x")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

PREPARE = "python -m data prepare CONFIG"
REMAKE = f"delete the folder and run `{PREPARE}` again"


class ShardWriter:
    """Writes the shards of one split into a folder.

    A shard is closed before the document that would take it past `shard_tokens`; a longer document gets its own.
    """

    def __init__(self, folder: Path, split: str, dtype: str, eos_id: int, shard_tokens: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self._folder, self._split, self._dtype = folder, split, DTYPES[dtype]
        self._eos = np.array([eos_id], dtype=self._dtype).tobytes()
        self._shard_tokens = shard_tokens
        self._open()

    def _open(self) -> None:
        self._file = (self._folder / f"{self._split}-{len(self.shards):05}.bin").open("wb", buffering=1 << 20)
        self._file.write(bytes(HEADER.size))
        self._tokens = 0
        self._starts: list[int] = []
        self._bytes: list[int] = []

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends a document.

        Args:
            ids: (tokens,) without eos.
            text_bytes: length of its text in UTF-8.
        """
        if self._tokens and self._tokens + len(ids) + 1 > self._shard_tokens:
            self._close_shard()
            self._open()
        self._starts.append(self._tokens)
        self._bytes.append(text_bytes)
        self._file.write(ids.astype(self._dtype).tobytes())
        self._file.write(self._eos)
        self._tokens += len(ids) + 1

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard; returns an entry of the manifest for each shard (none for an empty split)."""
        if self._tokens:
            self._close_shard()
        else:
            self._file.close()
            Path(self._file.name).unlink()
        return self.shards

    def abandon(self) -> None:
        """Closes the open file without finishing its shard; a full disk is no news any more."""
        with suppress(OSError):
            self._file.close()

    def _close_shard(self) -> None:
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, FORMAT, self._dtype.itemsize, self._tokens, len(self._starts)))
        self._file.close()
        path = Path(self._file.name)
        index = path.with_suffix(".idx")
        index.write_bytes(np.array([self._starts, self._bytes], dtype="<i8").tobytes())
        self.shards.append(
            {
                "file": path.name,
                "tokens": self._tokens,
                "documents": len(self._starts),
                "text_bytes": sum(self._bytes),
                "sha256": sha256_of(path),
                "index_sha256": sha256_of(index),
                "size": path.stat().st_size,
            }
        )


# ---- manifest


def split_entry(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A split's entry of the manifest: totals and shards."""
    totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "text_bytes")}
    return {**totals, "shards": shards}


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what determines the batches: format, tokenizer, counts and hashes of shards; no settings."""
    keys = ("format", "dtype", "vocab_size", "tokenizer_sha256", "eos_id", "splits")
    canonical = json.dumps({key: manifest[key] for key in keys}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ConfigError: no folder, no manifest, or one that is damaged, edited or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no prepared data here ({MANIFEST} is missing); run `{PREPARE}`") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {REMAKE}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path}: format {found}, but this program reads format {FORMAT}; {REMAKE}")
    try:
        whole = manifest["fingerprint"] == fingerprint(manifest)
    except KeyError:
        whole = False
    if not whole:
        raise ConfigError(f"{path}: its content does not match its fingerprint, so it was damaged or edited; {REMAKE}")
    return manifest


# ---- reading


class Split:
    """The tokens of a split as one stream over all its shards, memory-mapped.

    Attributes: `tokens`, `documents`, `text_bytes` (totals), `vocab_size`, `dtype` (uint16 or uint32), `eos_id`,
    `tokenizer_sha256`, and `fingerprint` of the whole folder.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        entry = manifest["splits"][split]
        self.name = split
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.text_bytes: int = entry["text_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.dtype: str = manifest["dtype"]
        self.eos_id: int = manifest["eos_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.fingerprint: str = manifest["fingerprint"]
        self._indexes = [(folder / shard["file"]).with_suffix(".idx") for shard in entry["shards"]]
        self._shards = [
            np.memmap(
                folder / shard["file"], DTYPES[self.dtype], mode="r", offset=HEADER.size, shape=(shard["tokens"],)
            )
            for shard in entry["shards"]
        ]
        self._ends = np.cumsum([shard["tokens"] for shard in entry["shards"]], dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start+count-1 of the stream, int64 (count,).

        Raises:
            IndexError: they are not all within the split.
        """
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of a split of {self.tokens}")
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count:
            ids = self._shards[shard]
            offset = start + done - int(self._ends[shard]) + len(ids)
            part = ids[offset : offset + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def document_starts(self) -> np.ndarray:
        """Position in the stream at which each document starts, int64 (documents,)."""
        return self._documents[0]

    def document_bytes(self) -> np.ndarray:
        """Bytes of each document's UTF-8 text, int64 (documents,)."""
        return self._documents[1]

    @cached_property
    def _documents(self) -> np.ndarray:
        parts = []
        for index, ids, end in zip(self._indexes, self._shards, self._ends, strict=True):
            part = np.fromfile(index, dtype="<i8").reshape(2, -1).astype(np.int64)
            part[0] += end - len(ids)
            parts.append(part)
        return np.concatenate(parts, axis=1)


def open_split(folder: str | Path, split: str, *, verify: Literal["size", "hash", "none"] = "size") -> Split:
    """Opens a split of a prepared folder.

    Args:
        folder: what `data.path` says.
        split: `train` or `val`.
        verify: `size` compares headers and file sizes with the manifest, `hash` every byte too, `none` nothing.
    Raises:
        ConfigError: no prepared data, an unknown split, or a shard that is missing, truncated or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise ConfigError(f"{folder}: no split {split!r}; it has {', '.join(manifest['splits'])}")
    if verify != "none":
        for shard in manifest["splits"][split]["shards"]:
            _check_shard(folder / shard["file"], shard, manifest["dtype"], hashes=verify == "hash")
    return Split(folder, manifest, split)


def verify_folder(folder: str | Path) -> dict[str, Any]:
    """Compares every byte of a prepared folder with the hashes of its manifest, which it returns.

    Raises:
        ConfigError: the first file that is missing or differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_tokenizer(folder, manifest)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            _check_shard(folder / shard["file"], shard, manifest["dtype"], hashes=True)
    return manifest


def check_tokenizer(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / manifest["tokenizer_file"]
    if not path.is_file():
        raise ConfigError(f"{path}: missing; {REMAKE}")
    _check_hash(path, manifest["tokenizer_sha256"])


def _check_shard(path: Path, shard: dict[str, Any], dtype: str, *, hashes: bool) -> None:
    index = path.with_suffix(".idx")
    for file, size in ((path, shard["size"]), (index, 16 * shard["documents"])):
        if not file.is_file():
            raise ConfigError(f"{file}: missing; {REMAKE}")
        if file.stat().st_size != size:
            raise ConfigError(f"{file}: {file.stat().st_size} bytes, but the manifest says {size}; {REMAKE}")
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    magic, version, itemsize, tokens, documents = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
    if magic != MAGIC:
        raise ConfigError(f"{path}: not a token shard (it starts with {magic!r}, not {MAGIC!r}); {REMAKE}")
    if version != FORMAT:
        raise ConfigError(f"{path}: shard format {version}, but this program reads format {FORMAT}; {REMAKE}")
    if itemsize != DTYPES[dtype].itemsize:
        raise ConfigError(f"{path}: {itemsize} bytes per token, but the manifest says {dtype}; {REMAKE}")
    if (tokens, documents) != (shard["tokens"], shard["documents"]):
        raise ConfigError(
            f"{path}: the header says {tokens} tokens in {documents} documents, the manifest {shard['tokens']} "
            f"in {shard['documents']}; {REMAKE}"
        )
    if hashes:
        _check_hash(path, shard["sha256"])
        _check_hash(index, shard["index_sha256"])


def _check_hash(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ConfigError(f"{path}: SHA-256 {found[:12]}..., but the manifest says {expected[:12]}...; {REMAKE}")
