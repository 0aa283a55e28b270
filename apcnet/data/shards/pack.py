"""Packs a data set into tar files and an index, which training reads from a disk or from an object store.

Every sample is decoded first, so that what is packed can be read. The same data give the same bytes, for any number of
workers. A shard is written whole or not at all, and a pack that was interrupted goes on: shards.json comes last.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from apcnet import data
from apcnet.choices import check_choice
from apcnet.data.doctor.check import judge
from apcnet.data.files import Files
from apcnet.data.sample import Dataset, Sample, SampleError
from apcnet.data.shards import DESCRIPTION, FORMAT, checksum
from apcnet.data.shards.index import (
    MASK,
    METADATA,
    RECORD,
    block_checksums,
    index_file,
    member_name,
    shard_file,
    write_index,
)
from apcnet.data.stream import loader
from apcnet.files import make_folder, read_json, remove_leftovers, replacing, write_json

UNFINISHED = "packing.json"  # describes what an unfinished pack holds
SPLITS = ("train", "val")


class Packed(NamedTuple):
    """Holds the number of samples of each split, and the number of shards that were written and that existed."""

    samples: dict[str, int]
    written: int
    kept: int


def pack(
    name: str,
    out: str | Path,
    root: str | Path | None = None,
    *,
    splits: Sequence[str] = SPLITS,
    samples: int = 1000,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> Packed:
    """Packs splits of a data set into shards.

    Args:
        name: The data set, as for `apcnet.data.open`.
        out: The folder for the shards; it is created when needed. Copy it to an object store as it is.
        root: The folder of the data set, as for `apcnet.data.open`.
        splits: The splits to pack.
        samples: The number of samples in each shard but the last.
        workers: The number of processes that decode and write.
        progress: Is called with the number of shards that exist, and of all shards.
        options: More arguments of the data set, as for `apcnet.data.open`.

    Example:
        >>> pack("ade20k", "shards/ade20k", "data/ade20k")
        >>> data = apcnet.data.open("shards", "shards/ade20k", "train")
    """
    check_choice(name, "name", [each for each in data.NAMES if each != "shards"])
    if samples < 1:
        raise ValueError(f"samples: expected 1 or more, got {samples}")
    if not splits or len(set(splits)) < len(splits):
        raise ValueError(f"splits: expected different names, at least one, got {list(splits)}")
    opened = {split: data.open(name, root, split, **options) for split in splits}
    out = Path(out)
    make_folder(out, "out")
    images = None
    if name == "folder":
        report = judge(name, root, opened, workers)
        if complaint := report.complaint():
            raise ValueError(f"root: {complaint}")
        images = report.images and report.images.json()
    names = {split: _digest(each.names) for split, each in opened.items()}
    _begin(
        out,
        {"data": {split: _source(each) for split, each in opened.items()}, "samples": samples}
        | {"options": repr(options)},
    )
    writers = {split: _Shards(each, out, split, samples) for split, each in opened.items()}
    total, done, written, described = sum(map(len, writers.values())), 0, 0, {}
    report_progress = progress or (lambda done, total: None)
    report_progress(0, total)
    for split, writer in writers.items():

        def parts(writer: "_Shards" = writer) -> Iterator[tuple[np.ndarray, Sequence[bytes]]]:
            nonlocal done, written
            for number, part in enumerate(loader(writer, range(len(writer)), workers)):
                done, written = done + 1, written + part.is_new
                report_progress(done, total)
                names_in = (writer.names[index] for index in writer.indices(number))
                yield part.records, [each.encode(errors="surrogateescape") for each in names_in]

        with replacing(out / index_file(split)) as temporary:
            count = write_index(temporary, parts())
            checksums, size = block_checksums(temporary), temporary.stat().st_size
        described[split] = {
            "samples": count,
            "names": names[split],
            "suffixes": writer.suffixes,
            "shard_bytes": [(out / shard_file(split, number)).stat().st_size for number in range(len(writer))],
            "index_bytes": size,
            "index_checksums": checksums,
        }
    first = opened[splits[0]]
    palette = [list(color) for color in first.palette]
    content = {"format": FORMAT, "classes": list(first.classes), "palette": palette, "images": images}
    content |= {"splits": described}
    with replacing(out / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(content | {"checksum": checksum(content)}), encoding="utf-8")
    (out / UNFINISHED).unlink()
    return Packed({split: each["samples"] for split, each in described.items()}, written, total - written)


def _begin(out: Path, source: dict) -> None:
    """Checks that a folder is empty or holds an unfinished pack of the same data, and describes the data there."""
    if (out / UNFINISHED).is_file():
        if read_json(out / UNFINISHED) != source:
            raise ValueError(f"out: {out} holds an unfinished pack of other data; name another folder, or empty it")
    elif any(out.iterdir()):
        raise ValueError(f"out: expected a new or an empty folder, got {out} with files")
    remove_leftovers(out)
    write_json(out / UNFINISHED, source)


def _source(dataset: Dataset) -> dict:
    """Describes the content of a data set, by its names and the sizes and times of its files."""
    files = [path.stat() for pair in getattr(dataset, "pairs", ()) for path in (pair.image, pair.mask)]
    return {
        "names": _digest(dataset.names),
        "files": _digest(f"{each.st_size} {each.st_mtime_ns}" for each in files),
        "labels": getattr(dataset, "labels", np.empty(0)).tolist(),
        "classes": list(dataset.classes),
    }


def _digest(lines) -> str:
    digest = sha256()
    for number, line in enumerate(lines):
        digest.update(("\n" * (number > 0) + line).encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


class _Part(NamedTuple):
    """Holds the records of a shard, and whether it was written now."""

    records: np.ndarray
    is_new: bool


class _Shards:
    """Writes shards on access, so that `stream.loader` can spread them over processes."""

    def __init__(self, dataset: Dataset, out: Path, split: str, samples: int):
        self.dataset, self.out, self.split, self.samples = dataset, out, split, samples
        self.names = dataset.names  # a property of files, which makes the list anew
        endings = (pair.image.suffix.lower() for pair in dataset.pairs) if isinstance(dataset, Files) else [".png"]
        self.suffixes = sorted(set(endings))

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.samples)

    def indices(self, number: int) -> range:
        """Returns the indices of the samples in a shard."""
        return range(len(self.dataset))[number * self.samples :][: self.samples]

    def __getitem__(self, number: int) -> _Part:
        path = self.out / shard_file(self.split, number)
        is_new = not path.exists()
        if is_new:
            with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in self.indices(number):
                    for ending, content in self._members(index):
                        member = tarfile.TarInfo(member_name(index, ending))
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        return _Part(self._records(number, path), is_new)

    def _members(self, index: int) -> Iterator[tuple[str, bytes]]:
        try:
            sample = self.dataset[index]
            if isinstance(self.dataset, Files):
                image = self.dataset.pairs[index].image
                yield image.suffix.lower(), image.read_bytes()
            else:
                yield ".png", _png(sample.image.permute(1, 2, 0).numpy())
        except Exception as error:
            raise SampleError(f"{type(error).__name__}: {error}; run `apcnet check` to find all such files") from error
        yield MASK, _png(sample.mask.numpy())
        yield METADATA, json.dumps(_metadata(sample)).encode()

    def _records(self, number: int, path: Path) -> np.ndarray:
        """Makes the records of a shard from the file as it lies on the disk."""
        found: list[tuple[str, int, int, int]] = []
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None  # the shard holds files only
                found.append((member.name, member.offset_data, member.size, zlib.crc32(file.read())))
        first = number * self.samples
        records = np.zeros(len(found) // 3, RECORD)
        for row, (image, *others) in enumerate(zip(*[iter(found)] * 3, strict=True)):
            suffix = image[0].removeprefix(member_name(first + row, ""))
            assert [each[0] for each in others] == [member_name(first + row, each) for each in (MASK, METADATA)]
            records[row]["shard"], records[row]["start"] = number, image[1]
            records[row]["sizes"] = [each[2] for each in (image, *others)]
            records[row]["checksums"] = [each[3] for each in (image, *others)]
            records[row]["suffix"] = self.suffixes.index(suffix)
        return records


def _metadata(sample: Sample) -> dict:
    height, width = sample.mask.shape
    return {"name": sample.name, "height": height, "width": width}


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
