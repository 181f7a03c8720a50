"""Files that a source reads, in its formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
from pyarrow import parquet  # type: ignore[import-untyped]

from data.config import FilesSource


def files(*paths: object, **settings: str) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(map(str, paths)), **settings)  # type: ignore[arg-type]


def write_zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


def write_parquet(path: Path, **columns: list) -> None:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def write_rows(path: Path, texts: list[str]) -> None:
    """Texts in the format that the name tells; those of a .txt with bars between them."""
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        write_parquet(path, text=texts, n=[1] * len(texts))
    elif path.suffix == ".zst":
        write_zst(path, lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    else:
        path.write_bytes("|".join(texts).encode() if path.suffix == ".txt" else lines)
