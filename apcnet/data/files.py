"""Reads data sets that consist of files: every image and mask is decoded on access, or raises an error that names it.

Images of 8 bits become RGB as OpenCV decodes them for mmsegmentation: turned upright by their EXIF tag, without alpha.
Images of more bits or of other channels keep every level and channel, as float32 (`levels`). Masks are never turned or
converted: the stored values count.
"""

import functools
import operator
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from apcnet.data.classes import UNKNOWN, Color, label_table
from apcnet.data.levels import Form, form_of, opened, read_levels
from apcnet.data.sample import DamagedError, Sample

_EXACT = ("1", "L", "P")  # the modes of Pillow that keep the stored value of each pixel
_WIDE = ("I;16", "I;16B", "I;16L", "I;16N")
# Pillow's names of what decodes to other values than were stored; JPEG 2000 does not tell whether it is lossless
_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF", "WEBP")
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 exchange width and height


class Pair(NamedTuple):
    """Holds the name of a sample and the paths of its image and mask, or the members of shards that stand for them."""

    name: str
    image: Path
    mask: Path


class Files:
    """Reads each sample of a data set from an image file and a mask file.

    Args:
        pairs: The files of each sample, in order.
        classes: The names of the classes.
        palette: A colour for each class.
        labels: The `classes.label_table` that maps stored values to labels; None if masks store class indices.
    """

    def __init__(
        self, pairs: Sequence[Pair], classes: Sequence[str], palette: Sequence[Color], labels: np.ndarray | None = None
    ):
        self.pairs, self.classes, self.palette = pairs, classes, palette
        self.labels = label_table(len(classes)) if labels is None else labels

    @property
    def names(self) -> Sequence[str]:
        """Returns the names of all samples, in order."""
        names = getattr(self.pairs, "names", None)  # of millions in shards, which are read when needed
        return [pair.name for pair in self.pairs] if names is None else names

    @functools.cached_property
    def form(self) -> Form | None:
        """Returns the form of the first image, which all others share; None for 8-bit RGB."""
        return checked_form(self.pairs[0].image) if self.pairs else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[operator.index(index)]
        try:
            image, stored = read_as(pair.image, self.form), read_mask(pair.mask)
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
                f"{int(unknown.sum())} pixels, expected {_ranges(self.labels != UNKNOWN)}; "
                "run `apcnet check` to find the cause"
            )
        return mask


def read_image(path: str | Path) -> Tensor:
    """Reads an image file as an RGB tensor, (3, H, W) uint8; of 16 bits it keeps the upper 8."""
    return _load(path, levels_of)


def read_as(path: str | Path, form: Form | None) -> Tensor:
    """Reads an image with all its levels and channels, if they are of this form: (C, H, W), uint8 for None."""
    found = checked_form(path)
    if (found and found[:2]) != (form and form[:2]):
        expected, given = (str(each or "8-bit RGB") for each in (form, found))
        raise ValueError(f"{path}: expected {expected}, as the first image, got {given}")
    if form is None:
        return read_image(path)
    try:
        return read_levels(path, form)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # decoders raise many kinds of errors
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: cannot be decoded: {error}") from error


def checked_form(path: str | Path) -> Form | None:
    """Returns the form of an image file, or raises an error that names the file."""
    _check_regular(path)
    try:
        return form_of(path)
    except DamagedError:
        raise
    except (struct.error, ValueError, OverflowError, MemoryError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """Returns the height and width of an image file as `read_image` reads it, without decoding it."""
    if form := checked_form(path):
        return form.height, form.width
    try:
        with opened(path) as file, Image.open(file) as image:
            turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # Pillow's decoders raise a dozen kinds of errors
        raise ValueError(f"{path}: cannot be decoded: {error}") from error


def levels_of(image: Image.Image) -> Tensor:
    """Turns a Pillow image upright, in place, and returns its RGB levels, (3, H, W) uint8."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits for each channel, got 32 (Pillow's mode {image.mode})")
    if image.mode in _WIDE:
        return torch.from_numpy(np.stack([(np.asarray(image) >> 8).astype(np.uint8)] * 3))
    image = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


def read_mask(path: str | Path) -> Tensor:
    """Reads the values that a mask file stores, (H, W) uint8: the grey levels, or the indices into its palette."""
    image = _load(path)
    if is_lossy(image):
        found = f"TIFF compressed by {image.info['compression']}" if image.format == "TIFF" else image.format
        raise ValueError(
            f"{path}: expected a PNG, got {found}, which changes the labels that it stores; "
            "write the mask anew from its source, as a PNG"
        )
    if image.mode in _EXACT:
        return torch.from_numpy(np.array(image).astype(np.uint8, copy=False))
    if image.mode in _WIDE:
        values = np.asarray(image)
        if values.max() > 255:
            raise ValueError(f"{path}: expected labels from 0 to 255, got the value {values.max()}")
        return torch.from_numpy(values.astype(np.uint8))
    found = {"RGB": "colours", "RGBA": "colours"}.get(image.mode, "other values")
    raise ValueError(
        f"{path}: expected a grey or palette PNG with a class index at each pixel, got {found} "
        f"(Pillow's mode {image.mode}); run `apcnet check` to find the cause"
    )


def is_lossy(image: Image.Image) -> bool:
    """Returns True if the file of an image changes the values that it stores."""
    compression = image.info.get("compression") if image.format == "TIFF" else None
    return image.format in _LOSSY or compression in _LOSSY_IN_TIFF


def _load(path: str | Path, convert: Callable = lambda image: image):
    _check_regular(path)
    with opened(path) as file:  # outside the try: a missing file stays a FileNotFoundError
        try:
            image = Image.open(file)
            image.load()
            return convert(image)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path}: expected an image in a format that Pillow reads, got something else") from error
        except Exception as error:  # Pillow's decoders raise a dozen kinds of errors
            raise ValueError(f"{path}: cannot be decoded: {error}") from error


def _check_regular(path: str | Path) -> None:
    """Checks that a path is a file before it is opened, because opening a pipe waits for ever."""
    try:
        mode = (Path(path) if isinstance(path, str) else path).stat().st_mode
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: expected an image file, got a path that cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected an image file, got a folder, a pipe or a device")


def _check_sizes(pair: Pair, image: Tensor, mask: Tensor) -> None:
    (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
    if (height, width) == (mask_height, mask_width):
        return
    turned = (height, width) == (mask_width, mask_height)
    raise ValueError(
        f"{pair.image} is {width}x{height}, but its mask {pair.mask} is {mask_width}x{mask_height}"
        + ("; images are turned upright by their EXIF tag, so masks must be stored upright" if turned else "")
    )


def _ranges(allowed: np.ndarray) -> str:
    """Writes the allowed values as ranges: "0 to 18, 255"."""
    values, parts = np.flatnonzero(allowed), []
    for run in np.split(values, np.flatnonzero(np.diff(values) > 1) + 1):
        parts.append(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(parts)
