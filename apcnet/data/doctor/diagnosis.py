"""Diagnoses an image and its mask, and infers from the values in masks how they were made."""

import hashlib
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apcnet.data.classes import UNKNOWN, Color
from apcnet.data.files import ORIENTATION, Files, Pair, checked_form, read_as, read_mask
from apcnet.data.levels import Form, opened
from apcnet.data.sample import IGNORE, DamagedError
from apcnet.data.statistics import Moments

ERRORS = (OSError, ValueError, MemoryError, ModuleNotFoundError)


class Problem(NamedTuple):
    """Describes what is wrong with a sample."""

    kind: str  # one of report.SEVERITY
    cause: str  # the same text for every sample with this cause, so that they can be counted
    detail: str = ""


class Inspection(NamedTuple):
    """Holds the result of reading a pair of files; it is small, because one is kept for each pair."""

    problems: list[Problem]
    digest: bytes | None  # of the size and the decoded pixels of the image; None if it cannot be decoded
    values: dict[int, int] | None  # the pixels of each value in the mask; None if it holds no values
    moments: Moments | None = None  # of the levels of an image that is not 8-bit RGB


class Inspector:
    """Inspects pairs of files on access, so that `stream.loader` can spread them over processes."""

    def __init__(self, pairs: Sequence[Pair], palette: Sequence[Color], labels: np.ndarray, form: Form | None = None):
        self.pairs, self.palette, self.labels, self.form = pairs, palette, labels, form

    def __getitem__(self, index: int) -> Inspection:
        """Decodes both files of a pair; whatever is wrong with them becomes part of the result."""
        pair, problems = self.pairs[index], []
        digest = values = size = mask_size = moments = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                image = read_as(pair.image, self.form)
                size, digest = tuple(image.shape[1:]), _digest(image)
                moments = None if image.dtype == torch.uint8 else Moments.of(image)
                del image
            except ERRORS as error:
                problems.append(Problem("unreadable image", _why_unreadable(pair.image, error), str(error)))
            try:
                mask = read_mask(pair.mask)
                counts = torch.bincount(mask.flatten()).tolist()
                mask_size, values = tuple(mask.shape), {value: count for value, count in enumerate(counts) if count}
                problems += _compare_palettes(pair.mask, values, self.palette, self.labels)
            except ERRORS as error:
                problem, mask_size, values = _inspect_rejected_mask(pair.mask, self.palette, error)
                problems += problem
            if size and mask_size:
                problems += _compare_sizes(pair, size, mask_size)
        problems += [Problem("warning of the decoder", each.category.__name__, str(each.message)) for each in caught]
        return Inspection(list(dict.fromkeys(problems)), digest, values, moments)


def _digest(image: Tensor) -> bytes:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.numpy())
    return digest.digest()


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, DamagedError):
        return "the shard is damaged, or the server fails: upload the shard again"
    try:
        with opened(path) as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return "a link to a missing file" if path.is_symlink() and not path.exists() else "the file cannot be opened"
    if not path.stat().st_size:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file: run `git lfs pull`"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in place of the file: download it again"
    if "exceeds limit" in str(error):
        return "larger than Pillow decodes (Image.MAX_IMAGE_PIXELS): cut it into tiles"
    if "truncated" in str(error) or "too early" in str(error):
        return "the file ends too early: copy or download it again"
    if "as the first image" in str(error):
        return "other levels or channels than the first image: convert one of them"
    if "finite levels" in str(error):
        return "levels that are no numbers: replace NaN and infinity, or remove the image"
    return "the file is damaged, or in a format that Pillow does not read"


def _inspect_rejected_mask(
    path: Path, palette: Collection[Color], error: Exception
) -> tuple[list[Problem], tuple[int, int] | None, dict[int, int] | None]:
    """Finds out why read_mask rejected a mask: returns the problems, and the size and the values if it has them."""
    try:
        with opened(path) as file, Image.open(file) as image:
            image.load()
    except Exception as failure:  # Pillow's decoders raise a dozen kinds of errors
        return [Problem("unreadable mask", _why_unreadable(path, failure), str(error))], None, None
    size, detail = (image.height, image.width), f"Pillow's mode {image.mode}"
    if image.format == "JPEG":
        cause = "a JPEG, which changes the stored values: make the masks again, as PNG"
    elif image.mode.startswith("I;16"):  # read_mask rejects only those with values above 255
        values, counts = np.unique(np.asarray(image), return_counts=True)
        return [], size, dict(zip(values.tolist(), counts.tolist(), strict=True))
    elif image.mode in ("RGB", "RGBA"):
        cause, detail = _about_colors(image.convert("RGB"), palette)
    else:
        cause = "neither grey nor palette: save the indices as 8-bit grey"
    return [Problem("mask without indices", cause, detail)], size, None


def _about_colors(image: Image.Image, palette: Collection[Color]) -> tuple[str, str]:
    found = image.getcolors(maxcolors=256)
    if found is None:
        return "more colours than a mask has: a photograph, or a mask that was smoothed or compressed", "more than 256"
    colors = sorted(color for _, color in found)
    named = f"{len(colors)} colours, such as {', '.join(map(str, colors[:3]))}"
    unknown = set(colors) - set(palette) - {(0, 0, 0), (255, 255, 255), (224, 224, 192)}  # borders of VOC
    if not unknown:
        return "the colours of the classes instead of their indices: save the index of each colour's class", named
    if all(red == green == blue for red, green, blue in colors):
        return "the same value in red, green and blue: save one of the three, as grey", named
    return "colours that belong to no class: map them to indices with the list that the masks were made with", named


def _compare_palettes(path: Path, values: Iterable[int], palette: Sequence[Color], labels: np.ndarray) -> list[Problem]:
    """Finds indices that a drawing program numbered by itself, so that only the colours still show the classes."""
    with opened(path) as file, Image.open(file) as image:
        if (image.format, image.mode) != ("PNG", "P") or image.palette is None:
            return []
        own = image.palette.palette  # getpalette would decode the pixels
    colors = {value: tuple(own[3 * value : 3 * value + 3]) for value in values if labels[value] < len(palette)}
    different = [value for value, color in colors.items() if color != palette[labels[value]]]
    if not different or not set(colors.values()) <= set(palette):
        return []
    cause = "palette image in the colours of the classes, but with other indices: save the index of each colour's class"
    owner = palette.index(colors[different[0]])
    return [Problem("palette disagrees", cause, f"{different[0]} has the colour of class {owner}")]


def _compare_sizes(pair: Pair, size: tuple[int, int], mask_size: tuple[int, int]) -> list[Problem]:
    orientation = 1 if checked_form(pair.image) else _orientation(pair.image)
    detail = f"image {size[1]}×{size[0]}, mask {mask_size[1]}×{mask_size[0]}"
    turned_back = size == mask_size[::-1]
    if size == mask_size:
        if orientation not in range(2, 9) or (orientation >= 5 and size[0] != size[1]):
            return []
        cause = "the image is turned by its EXIF tag, and the sizes do not show whether its mask is turned as well"
        return [Problem("turned image", cause, f"orientation {orientation}")]
    if turned_back and orientation in range(5, 9):
        cause = "the image is turned upright by its EXIF tag, its mask is not: turn the mask as well"
    elif turned_back:
        cause = "one of the two is turned by 90°"
    elif size[0] * mask_size[1] == size[1] * mask_size[0]:
        cause = "one of the two was resized"
    else:
        cause = "not the mask of this image, or one of the two was cropped"
    return [Problem("sizes differ", cause, detail)]


def _orientation(path: Path) -> int:
    with opened(path) as file, Image.open(file) as image:
        # getexif would decode a whole PNG in search of an EXIF block after its pixels
        absent = image.format == "PNG" and "exif" not in image.info
        return 1 if absent else image.getexif().get(ORIENTATION, 1)


def label_of(value: int, labels: np.ndarray) -> int:
    """Returns the class index of a stored value, IGNORE or UNKNOWN."""
    return int(labels[value]) if value < len(labels) else UNKNOWN


def problem_of_values(values: Mapping[int, int], name: str, data: Files) -> Problem | None:
    """Finds what is wrong with the masks of a split from the pixels of each value in all of them.

    Values without a meaning are the stronger evidence; without any, labels may still be shifted or lost.
    """
    classes, stands_for = len(data.classes), {value: label_of(value, data.labels) for value in values}
    reduced = bool(data.labels[0] == IGNORE and data.labels[1] == 0)
    if UNKNOWN in stands_for.values():
        return Problem("labels out of range", _why_unknown(values, name, data, reduced))
    if set(values) == {0, 255} and stands_for[255] == IGNORE and (classes > 1 or name == "folder"):
        hint = ", or give labels={0: 0, 255: 1}, on the command line --labels 0 0 255 1" if name == "folder" else ""
        return Problem("nothing to learn", f"masks of 0 and 255, and 255 is ignored: save 1 in its place{hint}")
    if values and set(stands_for.values()) == {IGNORE}:
        return Problem("nothing to learn", "every pixel of every mask is ignored")
    if reduced and classes > 1 and set(values) - {255} == set(range(classes)):
        cause = (
            f"all values from 0 to {classes - 1} and never {classes}: perhaps class indices that are already reduced "
            "(reduce_zero_label). This data set ignores 0, and its first class is 1"
        )
        return Problem("labels shifted", cause)
    return None


def _why_unknown(values: Mapping[int, int], name: str, data: Files, reduced: bool) -> str:
    seen, classes = sorted(set(values) - {255}), len(data.classes)
    if name == "cityscapes" and seen[-1] <= 33:
        return (
            "labelIds instead of labelTrainIds: the masks were not converted. "
            "Move these *_labelTrainIds.png away, then run `apcnet prepare cityscapes ROOT` to make them"
        )
    if name == "pascal_context" and seen[-1] > 59:
        return "all 459 labels of the annotation: run `apcnet prepare pascal_context ROOT` to make masks of 59 classes"
    greys = np.asarray(Image.fromarray(np.array([data.palette], np.uint8)).convert("L"))
    if len(seen) > 2 and set(seen) <= set(greys.flat):
        return "the brightness of the classes' colours: coloured masks were converted to grey, which loses the indices"
    if not reduced and seen[-1] == classes:
        shift = f"{{0: 255, 1: 0, …, {classes}: {classes - 1}}}"
        ignoring = f"give labels={shift}" if name == "folder" else f"store them as {shift} says"
        if 0 in seen:
            return (
                f"off by one, {classes + 1} values for {classes} classes: 0 is background, or pixels without a class. "
                f"List it as the first class, or ignore it (reduce_zero_label): {ignoring}"
            )
        return f"off by one, the classes are counted from 1 (reduce_zero_label): {ignoring}"
    step = math.gcd(*seen)
    if step > 1 and len(seen) > 1 and seen[-1] // step < classes + reduced:
        return f"every value is a multiple of {step}: indices were stretched to be visible. Divide by {step}"
    return (
        f"values from {seen[0]} to {seen[-1]} for {classes} classes: the list of classes is too short, "
        "or the masks belong to other data"
    )
