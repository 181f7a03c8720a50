"""Token shards: flat files of ids with an index of documents, and a manifest that binds them together.

A prepared folder holds
    tokenizer.model   the SentencePiece model that made the ids (imported data: vocab.json, or none)
    SPLIT-00000.bin   a 64-byte header, then the ids as uint16 or uint32
    SPLIT-00000.idx   18 bytes for each document: its start in the shard and the bytes of its UTF-8 text (int64; -1: not
                      known), and the number of its source (uint16)
    manifest.json     counts, hashes and settings; written last, so a folder with a manifest is complete
All integers are little endian. The header is the magic, then format version and bytes per id (uint32), then tokens and
documents (uint64), then zeros. A document is its tokens followed by eos, and never spans two shards.
"""

import hashlib
import json
import os
import struct
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from common.errors import ConfigError
from common.files import flush, replace_file, sha256_of

FORMAT = 2
MAGIC = b"OVERTONE"
HEADER = struct.Struct("<8sIIQQ32x")
INDEX = np.dtype([("start", "<i8"), ("text_bytes", "<i8"), ("source", "<u2")])
NOT_KNOWN = -1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

PREPARE = "python -m data prepare CONFIG"
REMAKE = f"delete the folder and run `{PREPARE}` again"


class ShardWriter:
    """Writes the shards of one split into a folder.

    A shard is closed before the document that would take it past `shard_tokens`; a longer document gets its own.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        eos_id: int,
        shard_tokens: int,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """`saved` is what `save` returned: everything that was written after it is taken back."""
        self.shards: list[dict[str, Any]] = list(saved["shards"]) if saved else []
        self._folder, self._split, self._dtype = folder, split, DTYPES[dtype]
        self._eos = np.array([eos_id], dtype=self._dtype).tobytes()
        self._shard_tokens = shard_tokens
        if saved:
            self._restore(saved)
        else:
            self._open()

    def _open(self) -> None:
        path = self._path()
        self._index = path.with_suffix(".idx")
        self._index.write_bytes(b"")
        self._file = path.open("w+b", buffering=1 << 20)
        self._file.write(bytes(HEADER.size))
        self._tokens = 0
        self._documents: list[tuple[int, int, int]] = []  # as INDEX
        self._saved = 0  # documents that the index file holds

    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self.shards):05}.bin"

    def _restore(self, saved: dict[str, Any]) -> None:
        for shard in self.shards:
            check_sizes(self._folder / shard["file"], shard)
        path = self._path()
        self._index = path.with_suffix(".idx")
        self._tokens, self._saved = saved["tokens"], saved["documents"]
        sizes = {path: HEADER.size + self._tokens * self._dtype.itemsize, self._index: self._saved * INDEX.itemsize}
        for file, size in sizes.items():
            if not file.is_file() or file.stat().st_size < size:
                raise ConfigError(f"{file}: shorter than the {size} bytes that were written; {REMAKE}")
            os.truncate(file, size)
        for file in self._folder.glob(f"{self._split}-[0-9]*"):
            if file.stem > path.stem:
                file.unlink()
        self._documents = cast(list[tuple[int, int, int]], np.fromfile(self._index, dtype=INDEX).tolist())
        self._file = path.open("r+b", buffering=1 << 20)
        self._file.seek(0, os.SEEK_END)

    def add(self, ids: np.ndarray, text_bytes: int | None, source: int = 0) -> None:
        """Appends a document.

        Args:
            ids: (tokens,) without eos.
            text_bytes: length of its text in UTF-8; None: not known.
            source: its place in the manifest's list of sources.
        """
        if self._tokens and self._tokens + len(ids) + 1 > self._shard_tokens:
            self._close_shard()
            self._open()
        self._documents.append((self._tokens, NOT_KNOWN if text_bytes is None else text_bytes, source))
        self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        self._file.write(self._eos)
        self._tokens += len(ids) + 1

    def save(self) -> dict[str, Any]:
        """Brings everything to the disk; returns plain values from which another writer can go on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._write_index()
        flush(self._index)
        return {"shards": list(self.shards), "tokens": self._tokens, "documents": len(self._documents)}

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard; returns an entry of the manifest for each shard (none for an empty split)."""
        if self._documents:
            self._close_shard()
        else:
            self._file.close()
            Path(self._file.name).unlink()
            self._index.unlink()
        return self.shards

    def abandon(self) -> None:
        """Closes the open file without finishing its shard; a full disk is no news any more."""
        with suppress(OSError):
            self._file.close()

    def _write_index(self) -> None:
        with self._index.open("r+b") as stream:
            stream.truncate(self._saved * INDEX.itemsize)
            stream.seek(0, os.SEEK_END)
            stream.write(np.array(self._documents[self._saved :], dtype=INDEX).tobytes())
        self._saved = len(self._documents)

    def _close_shard(self) -> None:
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, FORMAT, self._dtype.itemsize, self._tokens, len(self._documents)))
        self._file.close()
        self._write_index()
        path = Path(self._file.name)
        index = np.array(self._documents, dtype=INDEX)
        lengths = np.diff(index["start"], append=self._tokens)
        self.shards.append(
            {
                "file": path.name,
                "tokens": self._tokens,
                "documents": len(index),
                "text_bytes": _total(index["text_bytes"]),
                "sources": {
                    str(source): {
                        "tokens": int(lengths[here].sum()),
                        "documents": int(here.sum()),
                        "text_bytes": _total(index["text_bytes"][here]),
                    }
                    for source in np.unique(index["source"]).tolist()
                    for here in [index["source"] == source]
                },
                "sha256": sha256_of(path),
                "index_sha256": sha256_of(self._index),
                "size": path.stat().st_size,
            }
        )


def _total(text_bytes: np.ndarray) -> int | None:
    return None if (text_bytes == NOT_KNOWN).any() else int(text_bytes.sum())


# ---- manifest


COUNTS = ("tokens", "documents", "text_bytes")


def split_entry(shards: list[dict[str, Any]], sources: list[str]) -> dict[str, Any]:
    """A split's entry of the manifest: totals, in all and for each source by name, and shards."""
    by_source = {
        name: _totals([s["sources"][str(number)] for s in shards if str(number) in s["sources"]])
        for number, name in enumerate(sources)
    }
    return {**_totals(shards), "sources": by_source, "shards": shards}


def _totals(entries: list[dict[str, Any]]) -> dict[str, int | None]:
    """Sums of counts; null if one of them is not known."""
    columns = {key: [entry[key] for entry in entries] for key in COUNTS}
    return {key: None if None in values else sum(values) for key, values in columns.items()}


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what determines the batches: format, tokenizer, counts and hashes of shards; no settings."""
    keys = ("format", "dtype", "vocab_size", "tokenizer_sha256", "eos_id", "sources", "splits")
    canonical = json.dumps({key: manifest[key] for key in keys}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))


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
    except (OSError, ValueError, RecursionError) as error:
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

    Attributes: `tokens`, `documents`, `text_bytes` (totals; bytes are None where imported data do not tell them),
    `sources` (names, in the order of their numbers), `source_counts` (the same totals for each name), `vocab_size`,
    `dtype` (uint16 or uint32), `eos_id`, `tokenizer_sha256` (None: imported without a vocabulary), and `fingerprint` of
    the whole folder.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        entry = manifest["splits"][split]
        self.name = split
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.text_bytes = entry["text_bytes"]
        self.sources: tuple[str, ...] = tuple(manifest["sources"])
        self.source_counts: dict[str, dict[str, Any]] = entry["sources"]
        self.vocab_size: int = manifest["vocab_size"]
        self.dtype: str = manifest["dtype"]
        self.eos_id: int = manifest["eos_id"]
        self.tokenizer_sha256 = manifest["tokenizer_sha256"]
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
        return self._documents["start"]

    def document_bytes(self) -> np.ndarray:
        """Bytes of each document's UTF-8 text, int64 (documents,); -1 where they are not known."""
        return self._documents["text_bytes"]

    def document_sources(self) -> np.ndarray:
        """Number of each document's source, uint16 (documents,): its place in `sources`."""
        return self._documents["source"]

    def token_sources(self, positions: np.ndarray) -> np.ndarray:
        """Number of the source of the tokens at these positions in the stream, uint16 of their shape."""
        documents = np.searchsorted(self._documents["start"], positions, side="right") - 1
        return self._documents["source"][documents]

    @cached_property
    def _documents(self) -> dict[str, np.ndarray]:
        parts = [np.fromfile(index, dtype=INDEX) for index in self._indexes]
        for part, ids, end in zip(parts, self._shards, self._ends, strict=True):
            part["start"] += end - len(ids)
        return {name: np.concatenate([part[name] for part in parts]) for name in INDEX.names or ()}


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
    """Raises ConfigError unless the tokenizer is the one that the manifest names (imported data may have none)."""
    if manifest["tokenizer_file"] is None:
        return
    path = folder / manifest["tokenizer_file"]
    if not path.is_file():
        raise ConfigError(f"{path}: missing; {REMAKE}")
    _check_hash(path, manifest["tokenizer_sha256"])


def check_sizes(path: Path, shard: dict[str, Any]) -> None:
    """Raises ConfigError unless a shard's two files have the sizes that its entry tells."""
    for file, size in ((path, shard["size"]), (path.with_suffix(".idx"), INDEX.itemsize * shard["documents"])):
        if not file.is_file():
            raise ConfigError(f"{file}: missing; {REMAKE}")
        if file.stat().st_size != size:
            raise ConfigError(f"{file}: {file.stat().st_size} bytes, but the manifest says {size}; {REMAKE}")


def _check_shard(path: Path, shard: dict[str, Any], dtype: str, *, hashes: bool) -> None:
    check_sizes(path, shard)
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
        _check_hash(path.with_suffix(".idx"), shard["index_sha256"])


def _check_hash(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ConfigError(f"{path}: SHA-256 {found[:12]}..., but the manifest says {expected[:12]}...; {REMAKE}")
