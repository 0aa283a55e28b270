"""Makes headers of images that are far larger than what follows them, and images that take long to decode."""

import struct
import zlib

from PIL import Image
from serving import encoded, photo

ENORMOUS = 20_000, 30_000  # width and height


def png(width: int, height: int) -> bytes:
    """Returns a PNG of this size with zeros for pixels; those of a large one end early."""
    packed = zlib.compress(bytes(min(height * (width * 3 + 1), 1 << 24)), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 1 << 20, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)
    )


def gif(width: int, height: int) -> bytes:
    """Returns a GIF whose frame is as large as its screen."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff(width: int, height: int) -> bytes:
    """Returns a TIFF with one strip."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiled_tiff(width: int, height: int) -> bytes:
    """Returns a TIFF of 64 × 64 pixels whose only tile is of this size; 200 bytes ask libtiff for 1.6 GB."""
    packed = zlib.compress(bytes(1000))
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, width), (323, height)]
    tags += [(324, 8 + 2 + 12 * 10 + 4), (325, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag > 300 else 3, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + packed


def framed_gif(width: int, height: int) -> bytes:
    """Returns a GIF whose frame is larger than its screen."""
    content = bytearray(gif(width, height))
    content[6:10] = struct.pack("<HH", 8, 8)
    return bytes(content)


def jpeg(width: int, height: int) -> bytes:
    """Returns a JPEG whose frame header tells another size."""
    content = bytearray(encoded(photo(), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def webp(width: int, height: int) -> bytes:
    """Returns a lossless WebP whose header tells another size."""
    content = bytearray(encoded(photo(), "WEBP", lossless=True))
    assert content[12:16] == b"VP8L"
    content[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(content)


KINDS = {"png": png, "bmp": bmp, "gif": gif, "tiff": tiff, "jpeg": jpeg, "webp": webp}
KINDS |= {"tiled tiff": tiled_tiff, "framed gif": framed_gif}


def many_scans(count: int) -> bytes:
    """Returns a progressive JPEG whose last scan is repeated."""
    content = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
