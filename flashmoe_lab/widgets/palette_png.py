"""PNG from numbers of colours, for frames drawn many times: the compression leaves Python's lock to
others, which an image library's encoder does not."""

import struct
import zlib

import numpy as np


def palette_png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """The picture's bytes: pixels uint8 [height, width], palette uint8 [up to 256, 3]."""
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, by palette
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
