"""What is wrong with an image and its mask, and what the values in masks tell of how they were made."""

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
from apcnet.data.files import Files, Pair, read_image, read_mask
from apcnet.data.sample import IGNORE

ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright, from 5 on width and height are exchanged
ERRORS = (OSError, ValueError, MemoryError)


class Problem(NamedTuple):
    kind: str  # one of report.SEVERITY
    cause: str  # the same words for all that have it, so that they can be counted
    detail: str = ""


class Look(NamedTuple):
    """What was seen of a pair of files; it is small, as one is kept for each of them."""

    problems: list[Problem]
    digest: bytes | None  # of the image's size and pixels as they are decoded; None: they are not
    values: dict[int, int] | None  # how many pixels of the mask hold each value; None: it holds no values


class Looks:
    """looks[i] is a Look at pair i, taken when it is asked for: what `stream.loader` spreads over processes."""

    def __init__(self, pairs: Sequence[Pair], palette: Sequence[Color], labels: np.ndarray):
        self.pairs, self.palette, self.labels = pairs, palette, labels

    def __getitem__(self, index: int) -> Look:
        """Decodes both files of a pair. Whatever is wrong with them is part of the result."""
        pair, problems = self.pairs[index], []
        digest = values = size = mask_size = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                image = read_image(pair.image)
                size, digest = tuple(image.shape[1:]), _digest(image)
                del image
            except ERRORS as error:
                problems.append(Problem("unreadable image", _why_unreadable(pair.image, error), str(error)))
            try:
                mask = read_mask(pair.mask)
                counts = torch.bincount(mask.flatten()).tolist()
                mask_size, values = tuple(mask.shape), {value: count for value, count in enumerate(counts) if count}
                problems += _compare_palettes(pair.mask, values, self.palette, self.labels)
            except ERRORS as error:
                problem, mask_size, values = _second_look(pair.mask, self.palette, error)
                problems += problem
            if size and mask_size:
                problems += _compare_sizes(pair, size, mask_size)
        problems += [Problem("warning of the decoder", each.category.__name__, str(each.message)) for each in said]
        return Look(list(dict.fromkeys(problems)), digest, values)


def _digest(image: Tensor) -> bytes:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.numpy())
    return digest.digest()


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return "a link that leads nowhere" if path.is_symlink() and not path.exists() else "the file cannot be opened"
    if not path.stat().st_size:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file: git lfs pull"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in place of the file: download it again"
    if "exceeds limit" in str(error):
        return "larger than Pillow decodes (Image.MAX_IMAGE_PIXELS): cut it into tiles"
    if "truncated" in str(error):
        return "the file ends too early: copy or download it again"
    return "the file is damaged, or of a format that is not known"


def _second_look(path: Path, palette: Collection[Color], error: Exception):
    """Why read_mask did not take a mask: the problem if it is one, size and values if it has them."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as failure:  # of a dozen kinds, as in read_mask
        return [Problem("unreadable mask", _why_unreadable(path, failure), str(error))], None, None
    size, detail = (image.height, image.width), f"Pillow's mode {image.mode}"
    if image.format == "JPEG":
        cause = "a JPEG, which changes the values it stores: make the masks anew, as PNG"
    elif image.mode.startswith("I;16"):  # more than 255 then
        values, counts = np.unique(np.asarray(image), return_counts=True)
        return [], size, dict(zip(values.tolist(), counts.tolist(), strict=True))
    elif image.mode == "1":
        cause = "one bit for each pixel: save 0 and 1 as grey of 8 bits"
    elif image.mode in ("RGB", "RGBA"):
        cause, detail = _about_colors(image.convert("RGB"), palette)
    else:
        cause = "neither grey nor palette: save the indices as grey of 8 bits"
    return [Problem("mask without indices", cause, detail)], size, None


def _about_colors(image: Image.Image, palette: Collection[Color]) -> tuple[str, str]:
    found = image.getcolors(maxcolors=256)
    if found is None:
        return "colours, more than masks have: a picture, or a mask that was smoothed or compressed", "more than 256"
    colors = sorted(color for _, color in found)
    named = f"{len(colors)} colours, such as {', '.join(map(str, colors[:3]))}"
    unknown = set(colors) - set(palette) - {(0, 0, 0), (255, 255, 255), (224, 224, 192)}  # borders of VOC
    if not unknown:
        return "the colours of the classes in place of their indices: save the index of each colour's class", named
    if all(red == green == blue for red, green, blue in colors):
        return "the same value in red, green and blue: save one of the three, as grey", named
    return "colours, some of them of no class: translate them to indices with the list they were made with", named


def _compare_palettes(path: Path, values: Iterable[int], palette: Sequence[Color], labels: np.ndarray) -> list[Problem]:
    """Programs that draw pictures number colours as they meet them; the indices then say nothing about classes."""
    with Image.open(path) as image:
        if (image.format, image.mode) != ("PNG", "P") or image.palette is None:
            return []
        own = image.palette.palette  # getpalette would decode the pixels
    colors = {value: tuple(own[3 * value : 3 * value + 3]) for value in values if labels[value] < len(palette)}
    strange = [value for value, color in colors.items() if color != palette[labels[value]]]
    if not strange or not set(colors.values()) <= set(palette):
        return []
    cause = "palette image in the colours of the classes, but with other indices: save the index of each colour's class"
    owner = palette.index(colors[strange[0]])
    return [Problem("palette disagrees", cause, f"{strange[0]} has the colour of class {owner}")]


def _compare_sizes(pair: Pair, size: tuple[int, int], mask_size: tuple[int, int]) -> list[Problem]:
    with Image.open(pair.image) as image:
        # a PNG would be decoded for an EXIF block behind its pixels
        absent = image.format == "PNG" and "exif" not in image.info
        orientation = 1 if absent else image.getexif().get(ORIENTATION, 1)
    detail = f"image {size[1]}×{size[0]}, mask {mask_size[1]}×{mask_size[0]}"
    turned_back = size == mask_size[::-1]
    if size == mask_size:
        if orientation not in range(2, 9) or (orientation >= 5 and size[0] != size[1]):
            return []
        cause = "the image is turned as its EXIF says, and the sizes do not tell whether its mask is turned as well"
        return [Problem("turned image", cause, f"orientation {orientation}")]
    if turned_back and orientation in range(5, 9):
        cause = "the image is turned upright as its EXIF says, its mask is not: turn the mask as well"
    elif turned_back:
        cause = "one of the two is turned by 90°"
    elif size[0] * mask_size[1] == size[1] * mask_size[0]:
        cause = "one of the two was resized"
    else:
        cause = "not the mask of this image, or one of the two was cropped"
    return [Problem("sizes differ", cause, detail)]


def label_of(value: int, labels: np.ndarray) -> int:
    """The class that a stored value stands for, IGNORE or UNKNOWN."""
    return int(labels[value]) if value < len(labels) else UNKNOWN


def problem_of_values(values: Mapping[int, int], name: str, data: Files) -> Problem | None:
    """What the values in all masks of a split, and how many pixels hold each, say is wrong with the masks.

    Values that stand for nothing are the stronger evidence; where there are none, labels may still be shifted or lost.
    """
    classes, stands_for = len(data.classes), {value: label_of(value, data.labels) for value in values}
    reduced = bool(data.labels[0] == IGNORE and data.labels[1] == 0)
    if UNKNOWN in stands_for.values():
        return Problem("labels out of range", _why_unknown(values, name, data, reduced))
    if set(values) == {0, 255} and stands_for[255] == IGNORE and classes > 1:
        hint = ", or give labels={0: 0, 255: 1}" if name == "folder" else ""
        return Problem("nothing to learn", f"masks of 0 and 255, and 255 is ignored: save 1 in its place{hint}")
    if values and set(stands_for.values()) == {IGNORE}:
        return Problem("nothing to learn", "every pixel of every mask is ignored")
    if reduced and classes > 1 and set(values) - {255} == set(range(classes)):
        cause = (
            f"all values of 0 to {classes - 1} and never {classes}: class indices perhaps, that were reduced already "
            "(reduce_zero_label). Here 0 is ignored, and the first class is 1"
        )
        return Problem("labels shifted", cause)
    return None


def _why_unknown(values: Mapping[int, int], name: str, data: Files, reduced: bool) -> str:
    seen, classes = sorted(set(values) - {255}), len(data.classes)
    if name == "cityscapes" and seen[-1] <= 33:
        return (
            "labelIds in place of labelTrainIds: the masks were not converted. "
            "Move these *_labelTrainIds.png away, then `apcnet prepare cityscapes ROOT` makes them"
        )
    if name == "pascal_context" and seen[-1] > 59:
        return "the 459 labels of the whole annotation: `apcnet prepare pascal_context ROOT` makes masks of 59 classes"
    greys = np.asarray(Image.fromarray(np.array([data.palette], np.uint8)).convert("L"))
    if len(seen) > 2 and set(seen) <= set(greys.flat):
        return "the brightness of the classes' colours: coloured masks were converted to grey, which loses the indices"
    if not reduced and seen[-1] == classes:
        shift = f"{{0: 255, 1: 0, …, {classes}: {classes - 1}}}"
        ignoring = f"give labels={shift}" if name == "folder" else f"store them as {shift} says"
        if 0 in seen:
            return (
                f"off by one, {classes + 1} values for {classes} classes: 0 is background, or what no class covers. "
                f"List it as the first class, or have it ignored (reduce_zero_label): {ignoring}"
            )
        return f"off by one, the classes are counted from 1 (reduce_zero_label): {ignoring}"
    step = math.gcd(*seen)
    if step > 1 and len(seen) > 1 and seen[-1] // step < classes + reduced:
        return f"every value is a multiple of {step}: indices were stretched to be seen. Divide by {step}"
    return (
        f"values of {seen[0]} to {seen[-1]} for {classes} classes: the list of classes is too short, "
        "or the masks are those of other data"
    )
