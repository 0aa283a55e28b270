"""Reads images of more than 8 bits or of other channels than RGB, with every level and channel that the file stores.

    grey of 16 bits (PNG, TIFF)         1 channel
    colour of 16 bits (PNG, TIFF)       3 channels, without alpha
    TIFF of any number of bands         as many channels, in one image or one page for each; integers or floats

Everything else is 8-bit RGB, which `files.read_image` decodes. Levels are float32, which holds 16 bits exactly.
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apcnet.data.png16 import decode, header

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # its first bytes; the last two are of one of more than 4 GB
ALPHA = (1, 2)  # what a TIFF calls a band of opacity
MOST_TAGS, MOST_PAGES = 4096, 1 << 14  # more are a sign of damage
LARGEST = 1 << 24  # float32 holds every integer up to it
SIZES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # the formats of integers in a TIFF, by their type


class Form(NamedTuple):
    """Describes the images of a file: the number of channels, the type of their levels, and the size."""

    channels: int
    kind: str  # uint8, uint16, int16, uint32, int32, float32, float64
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.kind}"


class _Page(NamedTuple):
    """Holds the tags of a page of a TIFF that describe its pixels."""

    tags: dict[int, list[int]]
    order: str  # of the bytes: < or >

    def first(self, tag: int, default: int) -> int:
        return self.tags.get(tag, [default])[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.first(257, 0), self.first(256, 0)

    @property
    def samples(self) -> int:
        return self.first(277, 1)

    @property
    def bands(self) -> int:
        return self.samples - sum(kind in ALPHA for kind in self.tags.get(338, []))

    @property
    def kind(self) -> str:
        name = {1: "uint", 2: "int", 3: "float"}.get(self.first(339, 1), "uint")
        return f"{name}{self.first(258, 1)}"

    @property
    def is_usual(self) -> bool:
        """Returns True if Pillow decodes all of the page to 8-bit RGB: grey, a palette, RGB, CMYK or YCbCr."""
        return self.first(258, 1) <= 8 and (self.bands in (1, 3) or self.first(262, 1) in (5, 6))


def opened(path: str | Path) -> IO[bytes]:
    """Opens a file, or what is read as one: `shards.Member`."""
    return (Path(path) if isinstance(path, str) else path).open("rb")


def form_of(path: str | Path) -> Form | None:
    """Returns the form of an image that is not 8-bit RGB, without decoding it; None for all that Pillow decodes."""
    with opened(path) as file:
        head = file.read(64)
    if png := header(head):
        return Form(3 if png.has_colors else 1, "uint16", png.height, png.width) if png.bits == 16 else None
    if head[:4] not in TIFF:
        return None
    pages = _pages(path)
    if not pages:
        return None
    first = pages[0]
    alike = [page for page in pages if page.size == first.size and not page.first(254, 0) & 1]  # no thumbnails
    if len(alike) > 1 and first.samples > 1:
        raise ValueError(f"{path}: expected one image, or one page for each band, got {len(alike)} pages of colours")
    if len(alike) == 1 and first.is_usual:
        return None
    height, width = first.size[::-1] if first.first(274, 1) in range(5, 9) else first.size
    return Form(len(alike) if first.samples == 1 else first.bands, first.kind, height, width)


def tiff_tags(path: str | Path) -> dict[int, list[int]]:
    """Returns the tags of integers of the first page of a TIFF, by number; none of another or a damaged file."""
    try:
        with opened(path) as file:
            if file.read(4) not in TIFF:
                return {}
        return next((page.tags for page in _pages(path)), {})
    except (struct.error, ValueError, OverflowError, MemoryError, OSError):
        return {}


def read_levels(path: str | Path, form: Form) -> Tensor:
    """Reads the levels of an image of this form: (C, H, W) float32."""
    with opened(path) as file:
        is_png = header(file.read(64)) is not None
        file.seek(0)
        levels = decode(file.read()) if is_png else _tiff(path, form)
    if levels.dtype.kind != "f" and levels.size and abs(levels.astype(np.int64)).max() > LARGEST:
        raise ValueError(f"{path}: expected levels up to {LARGEST}, which float32 holds, got {levels.max()}")
    levels = np.ascontiguousarray(levels[: form.channels], dtype=np.float32)
    if not np.isfinite(levels).all():
        count = int((~np.isfinite(levels)).sum())
        raise ValueError(f"{path}: expected finite levels, found NaN or infinity at {count} places; replace them")
    return torch.from_numpy(levels)


def visible(levels: Tensor, ranges: Sequence[Sequence[float]] | None = None) -> Tensor:
    """Shows levels as 8-bit RGB, (3, H, W): the first three channels, or one in grey, each over its range."""
    if levels.dtype == torch.uint8:
        return levels
    shown = levels[:3] if len(levels) >= 3 else levels[:1].expand(3, -1, -1)
    if ranges is None:
        ranges = [(float(channel.min()), float(channel.max())) for channel in shown]
    scaled = [
        (channel - low) / max(high - low, 1e-12) * 255
        for channel, (low, high) in zip(shown, [ranges[min(i, len(ranges) - 1)] for i in range(3)], strict=True)
    ]
    return torch.stack(scaled).round().clamp(0, 255).to(torch.uint8)


def upright(levels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns levels (C, H, W) as the tag of EXIF or TIFF says."""
    if orientation >= 5:
        levels = levels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        levels = levels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        levels = levels[:, :, ::-1]
    return levels


def _pages(path: str | Path) -> list[_Page]:
    """Reads the tags of all pages of a TIFF, also of one of more than 4 GB."""
    with opened(path) as file:
        order = "<" if file.read(2) == b"II" else ">"
        big = struct.unpack(f"{order}H", file.read(2))[0] == 43
        number, count_format, entry_size = ("Q", "Q", 20) if big else ("I", "H", 12)
        if big:
            file.read(4)
        (place,) = struct.unpack(order + number, file.read(struct.calcsize(number)))
        pages, seen = [], set()
        while place and place not in seen:
            seen.add(place)
            file.seek(place)
            (count,) = struct.unpack(order + count_format, file.read(struct.calcsize(count_format)))
            if count > MOST_TAGS or len(pages) > MOST_PAGES:
                raise ValueError("the table of contents of the TIFF is damaged")
            entries, tags = file.read(count * entry_size), {}
            (place,) = struct.unpack(order + number, file.read(struct.calcsize(number)))
            for i in range(count):
                entry = entries[i * entry_size : (i + 1) * entry_size]
                tag, kind, length = struct.unpack(f"{order}HH{number}", entry[: 4 + struct.calcsize(number)])
                if kind not in SIZES or length > 1 << 20:
                    continue
                inline, size = entry[4 + struct.calcsize(number) :], length * struct.calcsize(SIZES[kind])
                if size > len(inline):
                    file.seek(struct.unpack(order + number, inline)[0])
                    inline = file.read(size)
                tags[tag] = list(struct.unpack(f"{order}{length}{SIZES[kind]}", inline[:size]))
            pages.append(_Page(tags, order))
    return pages


def _tiff(path: str | Path, form: Form) -> np.ndarray:
    """Decodes the bands of a TIFF: by Pillow, by the lines below, or by the package tifffile."""
    first = _pages(path)[0]
    if first.samples == 1 and form.kind in ("uint8", "uint16", "float32", "int32"):
        bands = []
        with opened(path) as file, Image.open(file) as image:
            for number in range(form.channels):
                image.seek(number)
                bands.append(np.array(image))
        levels = np.stack(bands)
    elif first.first(259, 1) in (1, 8, 32946) and first.first(317, 1) == 1 and 273 in first.tags:
        levels = _strips(path, first)
    else:
        levels = _by_tifffile(path, first)
    return upright(levels, first.first(274, 1))


def _strips(path: str | Path, page: _Page) -> np.ndarray:
    """Decodes strips that are stored as they are, or deflated."""
    height, width = page.size
    parts = []
    with opened(path) as file:
        for place, length in zip(page.tags[273], page.tags[279], strict=True):
            file.seek(place)
            part = file.read(length)
            parts.append(part if page.first(259, 1) == 1 else zlib.decompress(part))
    bits = page.first(258, 1)
    dtype = np.dtype(f"{page.order}{page.kind[0]}{bits // 8}")
    values = np.frombuffer(b"".join(parts), dtype)
    if page.first(284, 1) == 2:  # one plane after the other
        return values.reshape(page.samples, height, width)
    return values.reshape(height, width, page.samples).transpose(2, 0, 1)


def _by_tifffile(path: str | Path, page: _Page) -> np.ndarray:
    try:
        import tifffile  # an extra
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: expected the package tifffile, which reads this compression; install it: pip install tifffile"
        ) from None
    with opened(path) as file:
        levels = tifffile.imread(file)
    if levels.ndim == 2:
        return levels[None]
    planes_first = page.first(284, 1) == 2 or page.samples == 1
    return levels if planes_first else levels.transpose(2, 0, 1)
