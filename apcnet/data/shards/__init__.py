"""Reads a data set that `apcnet pack` has written as tar files, from a folder, a web server or an object store.

    ROOT/shards.json            classes, palette, and the number of samples and shards of each split
    ROOT/train.index            the place and the checksums of every sample (index.py)
    ROOT/train-000000.tar, …    000000000.jpg, 000000000.mask.png, 000000000.json, 000000001.jpg, …

The tar files are WebDataset's. Images are the files that were packed, byte for byte; masks hold class indices, or 255
to be ignored; the metadata hold the name of the sample. Any sample is read at any time, by one range of one shard, so
training reads the same samples in the same order as from files, and resumes to the same bits.

    data = apcnet.data.open("shards", "s3://bucket/ade20k", split="train")
    image, mask, name = data[0]
"""

import io
import json
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apcnet.data.classes import check_classes
from apcnet.data.files import Files, Pair
from apcnet.data.sample import DamagedError
from apcnet.data.shards.index import MASK, METADATA, Index, Record, index_file, member_name, shard_file
from apcnet.data.shards.store import Store
from apcnet.data.statistics import Statistics

DESCRIPTION, FORMAT = "shards.json", "apcnet shards 1"
FIELDS = ("format", "classes", "palette", "images", "splits", "checksum")


def open_shards(
    root: str | Path | None, split: str = "val", *, cache: str | Path | None = None, cache_gib: float = 20.0
) -> Files:
    """Opens a split of a packed data set.

    Args:
        root: The folder or the address of the shards: s3://…, gs://…, https://…
        split: The split by its name.
        cache: A folder of this machine that keeps what was read, for all processes; None for no cache.
        cache_gib: The size that the cache may grow to, for each data set.
    """
    if cache_gib <= 0:
        raise ValueError(f"cache_gib: expected a positive number, got {cache_gib}")
    store, described = _described(root)
    if split not in described["splits"]:
        raise ValueError(f"split: expected {' or '.join(described['splits'])}, which {root} holds, got {split!r}")
    if cache is not None:
        store.cache, store.limit = Path(cache) / f"{described['checksum']:08x}", int(cache_gib * 2**30)
        store.starts = _starts(described["splits"])
    classes, palette = check_classes(described["classes"], described["palette"], f"{store}/{DESCRIPTION}")
    return Files(Pairs(store, split, described), classes, palette)


def splits_of(root: str | Path | None) -> list[str]:
    """Returns the names of the splits of a packed data set."""
    return list(_described(root)[1]["splits"])


def _described(root: str | Path | None) -> tuple[Store, dict[str, Any]]:
    """Returns what reads a packed data set, and the content of its shards.json."""
    if root is None:
        raise TypeError("root: expected the folder or the address of shards, got None")
    store = Store(root)
    if not store.scheme and not (Path(root) / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"root: expected a folder with {DESCRIPTION}, which `apcnet pack` writes, found none in {root}"
        )
    return store, json.loads(store.read_all(DESCRIPTION, _problem))


def checksum(description: dict) -> int:
    """Computes the checksum that shards.json holds of the rest of its content."""
    rest = {name: value for name, value in description.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _problem(content: bytes) -> str | None:
    """Returns what is wrong with the content of shards.json, or None."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"expected JSON, found something else ({error})"
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f"expected the format {FORMAT!r}, found another"
    if missing := [name for name in FIELDS if name not in found]:
        return f"expected an entry {missing[0]!r}, found none"
    return None if checksum(found) == found["checksum"] else "damaged: its content has another checksum"


def _starts(splits: dict[str, Any]) -> dict[str, int]:
    """Returns where each file would begin if all were one after the other, indices first; caches keep the beginning."""
    sizes = {index_file(split): each["index_bytes"] for split, each in splits.items()}
    for split, each in splits.items():
        sizes |= {shard_file(split, number): size for number, size in enumerate(each["shard_bytes"])}
    starts, end = {}, 0
    for file, size in sizes.items():
        starts[file], end = end, end + size
    return starts


class Pairs(Sequence[Pair]):
    """Gives the pair of files of each sample; none is read before its content is asked for."""

    def __init__(self, store: Store, split: str, described: dict[str, Any]):
        one = described["splits"][split]
        self.store, self.split, self.count = store, split, one["samples"]
        self.suffixes, self.names_digest = one["suffixes"], one["names"]
        self.digest = f"{described['checksum']:08x}"
        self.statistics = Statistics.from_json(described["images"]) if described["images"] else None
        self.index = Index(store, split, one)
        self.last: tuple[int, bytes | DamagedError] | None = None  # the sample whose members were read last

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.count))]
        index = range(self.count)[index]
        return Pair(self.name(index), Member(self, index, 0), Member(self, index, 1))

    def name(self, index: int) -> str:
        return self.index.name(self.index.record(index))

    @property
    def names(self) -> "Names":
        return Names(self)

    def place(self, index: int, part: int) -> str:
        """Returns the shard, the name and the place of a member, for people."""
        record = self.index.record(index)
        return f"{self.store}/{shard_file(self.split, record.shard)}: {self._member(record, index, part)}"

    def _member(self, record: Record, index: int, part: int) -> str:
        ending = (self.suffixes[record.suffix], MASK, METADATA)[part]
        return f"{member_name(index, ending)} at byte {record.parts[part].start}"

    def read(self, index: int, part: int) -> bytes:
        """Returns the content of a member of a sample; the members of a sample are read together."""
        record = self.index.record(index)
        if self.last is None or self.last[0] != index:
            self.last = index, self._read(index, record)
        content = self.last[1]
        if isinstance(content, DamagedError):
            raise content
        return _cut(content, record, part)

    def _read(self, index: int, record: Record) -> bytes | DamagedError:
        def problem(content: bytes) -> str | None:
            for part, expected in enumerate(record.parts):
                found = _cut(content, record, part)
                if zlib.crc32(found) != expected.checksum:
                    return (
                        f"{self._member(record, index, part)}: expected {expected.size} bytes with the checksum "
                        f"{expected.checksum:08x}, got {len(found)} with {zlib.crc32(found):08x}"
                    )
            return None

        try:
            file, what = shard_file(self.split, record.shard), member_name(index, self.suffixes[record.suffix])
            return self.store.read(file, record.start, record.size, problem, what)
        except DamagedError as error:  # kept, so that it is not tried again for the next member
            return error

    def __getstate__(self) -> dict:
        return vars(self) | {"last": None}


def _cut(content: bytes, record: Record, part: int) -> bytes:
    place = record.parts[part]
    return content[place.start - record.start :][: place.size]


class Names(Sequence[str]):
    """Gives the names of samples without holding them."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.pairs.name(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # pyright: ignore[reportAssignmentType] # as a list


@dataclass(frozen=True)
class Member:
    """Stands for a file in a shard; it is read as a path is."""

    pairs: Pairs = field(compare=False, repr=False)
    index: int
    part: int
    split: str = field(init=False)  # two members are the same only in one split

    def __post_init__(self):
        object.__setattr__(self, "split", self.pairs.split)

    def __str__(self) -> str:
        return self.pairs.place(self.index, self.part)

    def read_bytes(self) -> bytes:
        return self.pairs.read(self.index, self.part)

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.read_bytes())

    def stat(self) -> os.stat_result:
        size = self.pairs.index.record(self.index).parts[self.part].size
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def exists(self) -> bool:
        return True

    def is_symlink(self) -> bool:
        return False
