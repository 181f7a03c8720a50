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

import struct
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.errors import ConfigError
from common.files import open_regular
from data.manifest import DTYPES, FORMAT, REMAKE, check_hash, check_tokenizer, read_manifest

MAGIC = b"OVERTONE"
HEADER = struct.Struct("<8sIIQQ32x")
INDEX = np.dtype([("start", "<i8"), ("text_bytes", "<i8"), ("source", "<u2")])
NOT_KNOWN = -1
IMPORTED = {"kind": "prepared"}  # the source of what was not made from text here


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
        shard = int(np.searchsorted(self._ends, start, side="right"))  # the first that ends beyond start
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
        for file, part, ids, end in zip(self._indexes, parts, self._shards, self._ends, strict=True):
            lengths = np.diff(part["start"], append=len(ids))
            if (part["start"][:1] != 0).any() or (lengths < 1).any() or (part["source"] >= len(self.sources)).any():
                raise ConfigError(f"{file}: it is no index of documents of this shard; {REMAKE}")
            part["start"] += end - len(ids)
        return {name: np.concatenate([part[name] for part in parts]) for name in INDEX.names or ()}


def open_split(folder: str | Path, split: str, *, verify: Literal["size", "hash", "none"] = "size") -> Split:
    """Opens a split of a prepared folder.

    Args:
        folder: what `data.path` says.
        split: `train`, `val` or, where there is one, `test`.
        verify: `size` compares headers and file sizes with the manifest, `hash` every byte too, `none` nothing.
    Raises:
        ConfigError: no prepared data, an unknown split, or a shard that is missing, truncated or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        there = ", ".join(manifest["splits"])
        raise ConfigError(f"{folder}: no split {split!r}; it has {there}{_remedy(manifest, split)}")
    if verify != "none":
        for shard in manifest["splits"][split]["shards"]:
            _check_shard(folder / shard["file"], shard, manifest["dtype"], hashes=verify == "hash")
    return Split(folder, manifest, split)


def _remedy(manifest: dict[str, Any], split: str) -> str:
    """How to come to data that have a test split, where one is asked for."""
    if split != "test":
        return ""
    if manifest.get("settings", {}).get("source") == IMPORTED:
        return ". Import a folder in which there is a test.bin or NAME_test.bin too"
    return ". Set data.test_fraction, such as to 0.02, and data.path to another folder, and prepare and train on that"


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


def check_sizes(path: Path, shard: dict[str, Any]) -> None:
    """Raises ConfigError unless a shard's two files have the sizes that its entry tells."""
    for file, size in ((path, shard["size"]), (path.with_suffix(".idx"), INDEX.itemsize * shard["documents"])):
        if not file.is_file():
            raise ConfigError(f"{file}: missing; {REMAKE}")
        if file.stat().st_size != size:
            raise ConfigError(f"{file}: {file.stat().st_size} bytes, but the manifest says {size}; {REMAKE}")


def _check_shard(path: Path, shard: dict[str, Any], dtype: str, *, hashes: bool) -> None:
    check_sizes(path, shard)
    with open_regular(path) as stream:
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
        check_hash(path, shard["sha256"])
        check_hash(path.with_suffix(".idx"), shard["index_sha256"])
