"""Data sets that lie in files: images and masks are decoded as they are asked for, each file or a clear error.

Images become RGB of 8 bits as OpenCV makes them for mmsegmentation: turned upright where EXIF says so, alpha dropped,
the upper 8 of 16 bits kept. Masks are never turned or converted: what is stored in them is what counts.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from apcnet.data.classes import UNKNOWN, Color, label_table
from apcnet.data.sample import Sample

_EXACT = ("L", "P")  # modes of Pillow whose pixels are one byte, as it is stored
_WIDE = ("I;16", "I;16B", "I;16L", "I;16N")


class Pair(NamedTuple):
    name: str
    image: Path
    mask: Path


@dataclass(eq=False)
class Files:
    """A data set of pairs of files, in the order of the samples."""

    pairs: Sequence[Pair]
    classes: Sequence[str]
    palette: Sequence[Color]
    labels: np.ndarray | None = None  # what stored values stand for, a `classes.label_table`; None: indices of classes

    def __post_init__(self):
        if self.labels is None:
            self.labels = label_table(len(self.classes))

    @property
    def names(self) -> list[str]:
        return [pair.name for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[operator.index(index)]
        try:
            image, stored = read_image(pair.image), read_mask(pair.mask)
            _check_sizes(pair, image, stored)
            return Sample(image, self._labels_of(pair, stored), pair.name)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"sample {index} of {len(self)}: {error}") from error

    def _labels_of(self, pair: Pair, stored: Tensor) -> Tensor:
        # bytes.translate takes a quarter of the time of indexing a table
        mapped = bytearray(stored.numpy()).translate(self.labels.tobytes())
        mask = torch.frombuffer(mapped, dtype=torch.uint8).view(stored.shape)
        unknown = mask == UNKNOWN
        if unknown.any():
            values = stored[unknown].unique().tolist()
            raise ValueError(
                f"{pair.mask}: holds {', '.join(map(str, values[:5]))}{' …' if len(values) > 5 else ''} at "
                f"{int(unknown.sum())} pixels, expected {_ranges(self.labels != UNKNOWN)}; `apcnet check` finds out why"
            )
        return mask


def read_image(path: str | Path) -> Tensor:
    """The image as (3, H, W) uint8, RGB."""
    return _load(path, levels_of)


def levels_of(image: Image.Image) -> Tensor:
    """The levels of an image, which is turned upright, as (3, H, W) uint8, RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits for each channel, got 32 (Pillow's mode {image.mode})")
    if image.mode in _WIDE:
        return torch.from_numpy(np.stack([(np.asarray(image) >> 8).astype(np.uint8)] * 3))
    image = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


def read_mask(path: str | Path) -> Tensor:
    """The values that a mask holds as (H, W) uint8; of a palette image its indices."""
    image = _load(path)
    if image.format == "JPEG":
        raise ValueError(f"{path}: is a JPEG, which does not keep labels as they were; expected a PNG")
    if image.mode in _EXACT:
        return torch.from_numpy(np.array(image))
    if image.mode in _WIDE:
        values = np.asarray(image)
        if values.max() > 255:
            raise ValueError(f"{path}: holds the value {values.max()}, expected labels of 0 to 255")
        return torch.from_numpy(values.astype(np.uint8))
    found = {"1": "one bit", "RGB": "colours", "RGBA": "colours"}.get(image.mode, "other values")
    raise ValueError(
        f"{path}: holds {found} (Pillow's mode {image.mode}), expected the index of a class at each pixel, "
        "as grey or palette PNGs hold it; `apcnet check` says more"
    )


def _load(path: str | Path, convert: Callable = lambda image: image):
    with open(path, "rb") as file:  # a file that is not there is an error of its own
        try:
            image = Image.open(file)
            image.load()
            return convert(image)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path}: is no image, or of a format that Pillow does not know") from error
        except Exception as error:  # of a dozen kinds: Pillow raises what its decoders happen to run into
            raise ValueError(f"{path}: cannot be decoded, {error}") from error


def _check_sizes(pair: Pair, image: Tensor, mask: Tensor) -> None:
    (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
    if (height, width) == (mask_height, mask_width):
        return
    turned = (height, width) == (mask_width, mask_height)
    raise ValueError(
        f"{pair.image} is {width}x{height}, but its mask {pair.mask} is {mask_width}x{mask_height}"
        + ("; images are turned upright as their EXIF says, masks have to be so already" if turned else "")
    )


def _ranges(allowed: np.ndarray) -> str:
    """0 to 18, 255."""
    values, parts = np.flatnonzero(allowed), []
    for run in np.split(values, np.flatnonzero(np.diff(values) > 1) + 1):
        parts.append(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(parts)
