"""PNG images of at most 256 colours, written by hand (ISO/IEC 15948): what a load matrix needs."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def indexed_png(
    pixels_HW: NDArray[np.uint8], palette: Sequence[Colour], transparent: int | None = None
) -> bytes:
    """Encode indices into ``palette`` as a PNG; index ``transparent`` is see-through."""
    height, width = pixels_HW.shape
    assert height > 0, "an image has rows"
    assert width > 0, "an image has columns"
    assert len(palette) <= 256, f"{len(palette)} colours"
    # Each row starts with a filter byte: 0, none. Filters help photographs, not indices.
    rows = np.zeros((height, width + 1), dtype=np.uint8)
    rows[:, 1:] = pixels_HW
    chunks = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        _chunk(b"PLTE", bytes(channel for colour in palette for channel in colour)),
    ]
    if transparent is not None:
        chunks.append(_chunk(b"tRNS", b"\xff" * transparent + b"\x00"))
    chunks += [_chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), _chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(chunks)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
