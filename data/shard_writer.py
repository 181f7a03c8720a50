"""Shards written: documents appended to the open one, which goes on to the same bytes after a kill."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np

from common.errors import ConfigError
from common.files import flush, sha256_of
from data.manifest import DTYPES, FORMAT, REMAKE
from data.shards import HEADER, INDEX, MAGIC, NOT_KNOWN, check_sizes


class ShardWriter:
    """Writes the shards of one split into a folder.

    A shard is closed before the document that would take it past `shard_tokens`; a longer document gets its own.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, eos_id: int, shard_tokens: int, saved: dict[str, Any] | None = None
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
        self._file.write(bytes(HEADER.size))  # it gets its numbers when the shard is closed
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
