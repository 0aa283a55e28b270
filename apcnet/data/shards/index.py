"""Describes the index of a packed split: a record of fixed size for each sample, and after all records the names.

    records    48 bytes each: the shard, the place of the image, sizes and checksums of members, the place of the name
    names      one after the other, in UTF-8

Only the blocks that are needed are read, from a disk or over a network, so an index of ten million samples opens at
once and takes little memory. shards.json holds a checksum for each block. The members of a sample follow one another in
their shard, so one read gets all of them.
"""

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apcnet.data.shards.store import Store

MASK, METADATA = ".mask.png", ".json"  # endings of members; that of an image is the suffix of its file
BLOCK = 1 << 16  # bytes
MOST_BLOCKS = 256  # in memory, for each process: 16 MiB
TAR_BLOCK = 512  # a header takes one, and contents are padded to a multiple

RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("start", "<u8"),  # the first byte of the image
        ("sizes", "<u4", 3),  # of image, mask and metadata
        ("checksums", "<u4", 3),  # CRC-32
        ("name_start", "<u8"),
        ("name_size", "<u2"),
        ("suffix", "<u2"),  # its number among the suffixes of images
    ]
)
_FORMAT = struct.Struct("<IQ3I3IQHH")  # the same; numpy takes ten times as long for a single record
assert _FORMAT.size == RECORD.itemsize


class Part(NamedTuple):
    """Holds the place of a member in its shard, and the checksum of its content."""

    start: int
    size: int
    checksum: int


class Record(NamedTuple):
    """Holds the place of a sample: its shard, its members, and where its name is."""

    shard: int
    parts: tuple[Part, Part, Part]
    name_start: int
    name_size: int
    suffix: int

    @classmethod
    def unpack(cls, content: bytes) -> "Record":
        shard, start, *numbers, name_start, name_size, suffix = _FORMAT.unpack(content)
        starts = [start]
        for size in numbers[:2]:
            starts.append(-(-(starts[-1] + size) // TAR_BLOCK) * TAR_BLOCK + TAR_BLOCK)
        return cls(shard, tuple(map(Part, starts, numbers[:3], numbers[3:])), name_start, name_size, suffix)

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def size(self) -> int:
        """Returns the number of bytes from the first member to the end of the last, with the headers between them."""
        return self.parts[-1].start + self.parts[-1].size - self.start


class Index:
    """Reads the records and names of a split."""

    def __init__(self, store: Store, split: str, described: dict[str, Any]):
        self.store, self.file = store, index_file(split)
        self.count, self.bytes = described["samples"], described["index_bytes"]
        self.checksums = np.array(described["index_checksums"], np.uint32)
        self.blocks: OrderedDict[int, bytes] = OrderedDict()

    def record(self, index: int) -> Record:
        return Record.unpack(self._read(index * RECORD.itemsize, RECORD.itemsize))

    def name(self, record: Record) -> str:
        start = self.count * RECORD.itemsize + record.name_start
        return self._read(start, record.name_size).decode(errors="surrogateescape")

    def _read(self, start: int, size: int) -> bytes:
        blocks = range(start // BLOCK, -(-(start + size) // BLOCK))
        content = b"".join(map(self._block, blocks))
        return content[start - blocks.start * BLOCK :][:size]

    def _block(self, number: int) -> bytes:
        if number in self.blocks:
            self.blocks.move_to_end(number)
            return self.blocks[number]
        start = number * BLOCK
        expected = int(self.checksums[number])

        def problem(content: bytes) -> str | None:
            return None if zlib.crc32(content) == expected else f"the block at byte {start} is damaged"

        self.blocks[number] = self.store.read(self.file, start, min(BLOCK, self.bytes - start), problem, "block")
        if len(self.blocks) > MOST_BLOCKS:
            self.blocks.popitem(last=False)
        return self.blocks[number]

    def __getstate__(self) -> dict:
        return vars(self) | {"blocks": OrderedDict()}  # another process reads its own


def index_file(split: str) -> str:
    return f"{split}.index"


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:06}.tar"


def member_name(index: int, ending: str) -> str:
    """Returns the name of a member; readers of WebDataset take the number as its key, and the ending as its field."""
    return f"{index:09}{ending}"


def block_checksums(path: Path) -> list[int]:
    """Computes the checksum of each block of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def write_index(path: Path, parts: Iterator[tuple[np.ndarray, Sequence[bytes]]]) -> int:
    """Writes an index from the records and names of one shard after the other; returns the number of samples."""
    count, end, names_path = 0, 0, path.with_name(f".{path.name.strip('.')}.names.tmp")
    try:
        with path.open("wb") as file, names_path.open("wb+") as names_file:
            for records, names in parts:
                sizes = np.array([len(name) for name in names], np.uint64)
                ends = end + np.cumsum(sizes, dtype=np.uint64)
                records["name_start"], records["name_size"] = ends - sizes, sizes
                file.write(records.tobytes())
                names_file.write(b"".join(names))
                count, end = count + len(records), int(ends[-1])
            names_file.seek(0)
            for block in iter(lambda: names_file.read(BLOCK), b""):
                file.write(block)
    finally:
        names_path.unlink(missing_ok=True)
    return count
