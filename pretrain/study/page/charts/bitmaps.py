"""Small images as PNG within the page, since thousands of squares of SVG would be many times as long."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np


def bitmap(label: str, pixels: np.ndarray, width: int) -> str:
    """(H, W) grey or (H, W, 3) coloured bytes, drawn without smoothing, `width` CSS pixels wide at most."""
    data = base64.b64encode(png(pixels)).decode()
    style = f"width:100%;max-width:{width}px;image-rendering:pixelated"
    return f'<img alt="{escape(label)}" style="{style}" src="data:image/png;base64,{data}">'


def png(pixels: np.ndarray) -> bytes:
    """A PNG file (ISO/IEC 15948) of (H, W) or (H, W, 3) bytes: one chunk of data, lines without filter."""
    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    lines = np.ascontiguousarray(pixels, np.uint8).reshape(height, -1)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
