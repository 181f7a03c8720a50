"""What is opened is a regular file: nothing waits for a FIFO, and no device is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.files import open_regular, read_bounded, sha256_of


def test_only_regular_files_are_read_and_only_so_much_of_them(tmp_path: Path) -> None:
    file, link, fifo = (tmp_path / name for name in ("file", "link", "fifo"))
    file.write_bytes(b"12345")
    link.symlink_to(file)
    os.mkfifo(fifo)
    assert read_bounded(file, 5) == read_bounded(link, 5) == b"12345"
    with pytest.raises(OSError, match="more than the 4 bytes"):
        read_bounded(file, 4)
    for other in (fifo, tmp_path, Path("/dev/zero")):
        for read in (open_regular, sha256_of):
            with pytest.raises(OSError, match="not a regular file"):
                read(other)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nowhere")
