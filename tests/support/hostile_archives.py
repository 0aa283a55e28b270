"""Writes zip archives that are damaged or hostile as archives: sizes, counts, names and places that lie."""

import io
import struct
import zipfile
from collections.abc import Iterator

from hostile_pickles import WEIGHT, checkpoint


def archives() -> Iterator[tuple[str, bytes]]:
    """Yields zip archives that are damaged or hostile as archives."""
    pickle, numbers = checkpoint(b"", True), WEIGHT.numpy().tobytes()
    entries = {"a/data.pkl": pickle, "a/byteorder": b"little", "a/data/0": numbers}

    def packed(content: dict[str, bytes], **options) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", **options) as archive:
            for entry, data in content.items():
                archive.writestr(entry, data)
        return buffer.getvalue()

    whole = packed(entries)
    yield "whole", whole
    yield "compressed", packed(entries, compression=zipfile.ZIP_DEFLATED)
    yield "a compressed bomb", packed(entries | {"a/data/0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    yield (
        "a compressed pickle",
        packed(entries | {"a/data.pkl": pickle + bytes(50_000_000)}, compression=zipfile.ZIP_LZMA),
    )
    yield "big-endian", packed(entries | {"a/byteorder": b"big"})
    yield "of another byte order", packed(entries | {"a/byteorder": b"\xff" * 1000})
    yield "two pickles", packed(entries | {"b/data.pkl": pickle})
    yield "no pickle", packed({"a/data/0": numbers})
    yield "no numbers", packed({"a/data.pkl": pickle})
    yield "fewer numbers", packed(entries | {"a/data/0": numbers[:-4]})
    yield "more numbers", packed(entries | {"a/data/0": numbers * 2})
    yield "half a number", packed(entries | {"a/data/0": numbers + b"\0"})
    yield "TorchScript", packed(entries | {"a/constants.pkl": pickle})
    yield "in no folder", packed({"data.pkl": pickle, "data/0": numbers})
    yield "names that climb", packed({f"../{entry}": data for entry, data in entries.items()})
    yield "500,000 entries", _directory(500_000)
    yield "an empty pickle", packed(entries | {"a/data.pkl": b""})
    yield "only the magic", b"PK\x03\x04"
    yield "only an end", b"PK\x03\x04" + _end(0, 0, 4)
    for field, value in ((12, 0xFFFFFFFF), (12, 0x7FFFFFFF), (16, 0xFFFFFFFF), (16, 0), (10, 0xFFFF), (20, 100)):
        end = bytearray(whole[-22:])
        end[field : field + (2 if field in (10, 20) else 4)] = value.to_bytes(2 if field in (10, 20) else 4, "little")
        yield f"end record with {value:,} at {field}", whole[:-22] + bytes(end)
    directory = whole.index(b"PK\x01\x02")
    for field, width in ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)):
        for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
            data = bytearray(whole)
            data[directory + field : directory + field + width] = (value & (1 << 8 * width) - 1).to_bytes(
                width, "little"
            )
            yield f"directory with {value:,} at {field}", bytes(data)
    for field, width in ((0, 4), (26, 2), (28, 2)):
        for value in (0, 1, 0xFFFFFFFF):
            data = bytearray(whole)
            data[field : field + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
            yield f"local header with {value:,} at {field}", bytes(data)


def _directory(count: int) -> bytes:
    entry = b"PK\x01\x02" + bytes(42)
    return b"PK\x03\x04" + bytes(26) + entry * count + _end(count, 46 * count, 30)


def _end(count: int, size: int, start: int) -> bytes:
    return b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count & 0xFFFF, count & 0xFFFF, size, start, 0)
