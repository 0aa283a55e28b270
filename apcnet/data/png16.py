"""Decodes PNG files of 16 bits for each channel, of which Pillow keeps 8 unless they are grey."""

import struct
import zlib
from typing import NamedTuple

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the type of colour: grey, RGB, and both with alpha


class Header(NamedTuple):
    """Holds the first block of a PNG."""

    width: int
    height: int
    bits: int
    color: int
    interlaced: bool

    @property
    def has_colors(self) -> bool:
        return bool(self.color & 2)


def header(data: bytes) -> Header | None:
    """Returns the header of a PNG from its first bytes, or None if they are no PNG."""
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 29:
        return None
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    return Header(width, height, bits, color, bool(interlaced))


def decode(data: bytes) -> np.ndarray:
    """Decodes a PNG of 16 bits to levels (C, H, W) uint16, without alpha."""
    head = header(data)
    assert head is not None and head.bits == 16  # the caller has looked
    if head.interlaced:
        raise ValueError("expected a PNG of 16 bits that is not interlaced; save it again without interlacing")
    channels = CHANNELS[head.color]
    line = 2 * channels * head.width
    stored = np.frombuffer(zlib.decompress(_pixels(data)), np.uint8)
    if stored.size != head.height * (line + 1):
        raise ValueError("the file ends too early")
    rows = stored.reshape(head.height, line + 1)
    levels = unfiltered(rows[:, 1:].reshape(head.height, head.width, 2 * channels), rows[:, 0])
    values = levels.view(">u2").astype(np.uint16).transpose(2, 0, 1)
    return values[: channels - (channels in (2, 4))]


def unfiltered(stored: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Reverses the filters of rows (H, W, bytes of a pixel), which predict a byte from those to the left and above.

    A pixel depends on its neighbours at the left, above and between. So all pixels of one diagonal are computed at
    once: diagonal d holds column d − i of row i.
    """
    height, width, depth = stored.shape
    padded = np.zeros((height + 1, width + 1, depth), np.uint8)
    for d in range(height + width - 1):
        i = np.arange(max(0, d - width + 1), min(height, d + 1))
        j = d - i
        left, above, between = (padded[i + 1, j], padded[i, j + 1], padded[i, j])
        a, b, c = (each.astype(np.int16) for each in (left, above, between))
        to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        nearest = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
        kind = filters[i][:, None]
        guess = np.select([kind == 1, kind == 2, kind == 3, kind == 4], [a, b, (a + b) // 2, nearest], 0)
        padded[i + 1, j + 1] = stored[i, j] + guess.astype(np.uint8)
    return np.ascontiguousarray(padded[1:, 1:])


def _pixels(data: bytes) -> bytes:
    """Joins the blocks of compressed pixels."""
    parts, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            parts.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    return b"".join(parts)
