"""Tests damaged images and masks: each is read as it was stored, or its error names the file.

A battery, see tests/support/battery.py.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from battery import judged
from judge import verdict
from PIL import Image, features

from apcnet.data.files import read_image, read_mask

LABELS = np.random.default_rng(0).integers(0, 19, (40, 56), dtype=np.uint8)
LOSSY = {
    "jpg": {"format": "JPEG"},
    "mpo": {"format": "MPO"},
    "tif": {"format": "TIFF", "compression": "jpeg"},
    "jp2": {"format": "JPEG2000", "irreversible": True, "quality_layers": [20]},
    "avif": {"format": "AVIF", "quality": 60},
}
LOSSLESS = {
    "png": {"format": "PNG"},
    "bmp": {"format": "BMP"},
    "gif": {"format": "GIF"},
    "raw.tif": {"format": "TIFF"},
    "lzw.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "deflate.tif": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
}


def encoded(options: dict) -> bytes:
    """Encodes LABELS in a format."""
    if options["format"] == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    Image.fromarray(LABELS).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_masks_are_refused(tmp_path, kind):
    """Tests that the error names the file and the remedy, also under a name that says PNG."""
    file = tmp_path / "mask.png"
    file.write_bytes(encoded(LOSSY[kind]))
    with pytest.raises(ValueError, match=r"mask\.png: expected .*PNG"):
        read_mask(file)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_masks_keep_their_labels(tmp_path, kind):
    """Tests that each stored value comes back."""
    file = tmp_path / f"mask.{kind}"
    file.write_bytes(encoded(LOSSLESS[kind]))
    assert np.array_equal(read_mask(file).numpy(), LABELS)


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("kind", ["itself", "circle", "pipe", "folder", "device", "empty", "under a file"])
def test_what_is_no_file_is_named(tmp_path, read, kind):
    """Tests links in a circle, pipes, folders, devices and paths below a file."""
    path = tmp_path / "pipe.jpg"
    match kind:
        case "itself":
            path.symlink_to(path)
        case "circle":
            path.symlink_to(tmp_path / "b.jpg")
            (tmp_path / "b.jpg").symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "empty":
            path.touch()
        case "under a file":
            path.touch()
            path = path / "pipe.jpg"
    assert verdict(lambda: read(path), lambda _: False, "pipe.jpg") == "named"


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Damages a file: flips bytes, cuts it, repeats or removes a part, or inserts noise."""
    at, to = sorted(generator.integers(0, len(data), 2))
    match generator.integers(5):
        case 0:
            changed = bytearray(data)
            for place in generator.integers(0, len(data), generator.integers(1, 9)):
                changed[place] = generator.integers(256)
            return bytes(changed)
        case 1:
            return data[:at]
        case 2:
            return data[:to] + data[at:]
        case 3:
            return data[:at] + data[to:]
        case _:
            return data[:at] + generator.bytes(int(generator.integers(1, 99))) + data[at:]


def damages(kind: str, count: int, seed: int) -> Iterator[tuple[str, Callable[[Path], str]]]:
    """Yields damaged files of a format; every second one is read as a mask."""
    if (LOSSLESS | LOSSY)[kind]["format"] == "AVIF" and not features.check("avif"):
        return
    generator, data = np.random.default_rng(seed), encoded((LOSSLESS | LOSSY)[kind])
    for i in range(count):
        as_mask = bool(i % 2)
        yield (f"{i}, a {'mask' if as_mask else 'photo'}", functools.partial(judge, damaged(data, generator), as_mask))


def judge(data: bytes, as_mask: bool, folder: Path) -> str:
    """Reads a damaged file: an image has three planes, a mask is one of bytes."""
    file = folder / "damaged"
    file.write_bytes(data)
    if as_mask:
        return verdict(lambda: read_mask(file), lambda x: x.ndim == 2 and x.dtype == torch.uint8, "damaged")
    return verdict(lambda: read_image(file), lambda x: x.ndim == 3 and len(x) == 3, "damaged")


KINDS = {f"damaged {kind}": functools.partial(damages, kind) for kind in LOSSLESS | LOSSY}


@pytest.mark.parametrize("count", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_named(count):
    counts = judged(__file__, count, seed=count)
    assert all(verdicts.total() == count and verdicts["named"] for verdicts in counts.values())
