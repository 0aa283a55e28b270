"""Draws labels in colours, overlays, legends, previews of training and confusion matrices.

Labels are (H, W) integers; a label outside the classes, usually 255, is ignored. Images are (3, H, W) uint8. `colors`
chooses colours, `text` writes names in any script that the system has a font for, `matrix` draws confusion matrices.
"""

import io
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from apcnet.draw.colors import IGNORED, PAPER, WRONG, Color, backgrounds, ignored_color, palette, wrong_color
from apcnet.draw.matrix import FAINT, INK, RIGHT_SHARE, WRONG_SHARE, confusion
from apcnet.draw.text import Written, built_in, save_names, text_size, written
from apcnet.files import replacing

__all__ = [
    "FAINT",
    "IGNORED",
    "INK",
    "PAPER",
    "RIGHT_SHARE",
    "WRONG",
    "WRONG_SHARE",
    "Color",
    "backgrounds",
    "colourise",
    "confusion",
    "encoded",
    "ignored_color",
    "legend",
    "overlay",
    "palette",
    "preview",
    "save",
    "save_names",
    "with_legend",
    "wrong_color",
]

Entry = tuple[Color | None, Written]  # one entry of a legend; None for a box that is not filled
NOTE = "numbers: classes whose names no font of this system can write"
# A preview reduces larger pictures to LARGEST pixels, and enlarges smaller ones up to ENLARGED.
LARGEST, ENLARGED = 480, 288


def colourise(labels: Tensor | np.ndarray, palette: Sequence[Color]) -> Image.Image:
    """Draws labels in the colours of their classes; ignored pixels are dark grey, or another grey if a class is.

    Args:
        labels: (H, W) integers.
        palette: RGB colour of each class.
    """
    table = np.array([*palette, ignored_color(palette)], np.uint8)
    return Image.fromarray(table[_indices(labels, len(palette))])


def overlay(
    image: Tensor,
    labels: Tensor | np.ndarray,
    palette: Sequence[Color],
    opacity: float = 0.5,
    clear: Collection[int] = (),
) -> Image.Image:
    """Blends an image with the colours of its labels; ignored pixels and clear classes show the image alone.

    Args:
        image: (3, H, W) uint8.
        labels: (H, W) integers.
        palette: RGB colour of each class.
        opacity: Share of the labels' colours, 0 to 1.
        clear: Classes to leave out, such as `backgrounds` returns.

    Example:
        >>> save(overlay(image, labels, palette(21)), "overlay.png")
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    photo, indices = _photo(image), _indices(labels, len(palette))
    _check_sizes(photo, labels=indices)
    blended = Image.blend(photo, colourise(labels, palette), opacity)
    blended.paste(photo, mask=Image.fromarray(np.isin(indices, [*clear, len(palette)])))
    return blended


def legend(
    present: Iterable[int],
    classes: Sequence[str],
    palette: Sequence[Color],
    width: int,
    more: Sequence[tuple[Color, str]] = (),
    clear: Collection[int] = (),
) -> Image.Image:
    """Draws a legend with the colours and names of classes.

    A name that no font can write is shown by the number of its class, and a note says so.

    Args:
        present: Labels to list; those outside the classes become one entry "ignored".
        classes: Name of each class.
        palette: RGB colour of each class.
        width: Width in pixels, which sets the number of columns; the picture is wider if one column needs it.
        more: Further (colour, name) entries.
        clear: Classes whose boxes are empty, because the picture shows the image alone there.
    """
    size = text_size(width)
    entries = _entries(present, classes, palette, size, clear)
    entries += [(color, written(name, 0, size, 15 * size)) for color, name in more]
    margin, line, gap = round(size * 1.2), round(size * 1.7), round(size * 1.5)
    column = line + max((name.width for _, name in entries), default=0) + gap
    columns = min(max((width - 2 * margin + gap) // column, 1), max(len(entries), 1))
    rows = -(-len(entries) // columns)
    note = [NOTE] if any(name.text.isdecimal() and name.text not in classes for _, name in entries) else []
    note_width = math.ceil(max((built_in(size).getlength(text) for text in note), default=0))
    inner = max(columns * column - gap, note_width)
    sheet = Image.new("RGB", (max(width, 2 * margin + inner), 2 * margin + (rows + len(note)) * line), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (color, name) in enumerate(entries):
        left, top = margin + i // rows * column, margin + i % rows * line
        box = left, top + (line - size) // 2, left + size, top + (line + size) // 2
        edge = FAINT if color is None else tuple(part * 3 // 4 for part in color)
        draw.rounded_rectangle(box, size // 5, color or PAPER, outline=edge)
        draw.text((left + line, top + line // 2), name.text, INK, name.font, anchor="lm")
    for text in note:
        draw.text((margin, margin + rows * line + line // 2), text, FAINT, built_in(size), anchor="lm")
    return sheet


def with_legend(
    picture: Image.Image,
    labels: Tensor | np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Color],
    clear: Collection[int] = (),
) -> Image.Image:
    """Returns a picture with a legend below it that lists the classes in `labels`."""
    present = _present(_indices(labels, len(palette)))
    below = legend(present, classes, palette, picture.width, clear=clear)
    page = Image.new("RGB", (max(picture.width, below.width), picture.height + below.height), PAPER)
    page.paste(picture, ((page.width - picture.width) // 2, 0))
    page.paste(below, (0, picture.height))
    return page


def preview(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], palette: Sequence[Color]
) -> Image.Image:
    """Draws rows of image, truth, prediction and error, with a legend below.

    Errors are red on the dimmed image and ignored pixels grey, or in other colours if classes have these. The caption
    is the share of wrong pixels among those that are not ignored. Large pictures are reduced, small ones enlarged.

    Args:
        rows: (image, truth, prediction) for each row: (3, H, W) uint8, and two times (H, W) integers.
        classes: Name of each class.
        palette: RGB colour of each class.
    """
    if not rows:
        raise ValueError("rows: expected one or more, got none")
    panels, shares, present = [], [], set()
    for image, truth, prediction in rows:
        pictures, share, found = _panels(image, truth, prediction, palette)
        panels.append(pictures)
        shares.append(share)
        present |= found
    cell = max(picture.width for pictures in panels for picture in pictures)
    size = text_size(4 * cell)
    margin, gap, line = round(size * 1.2), size * 3 // 4, size * 2
    width = 2 * margin + 4 * cell + 3 * gap
    below = legend(present, classes, palette, width, [(wrong_color(palette), "wrong")])
    height = margin + line + sum(pictures[0].height + line for pictures in panels) + below.height
    page = Image.new("RGB", (max(width, below.width), height), PAPER)
    draw, font = ImageDraw.Draw(page), built_in(size)
    lefts = [margin + i * (cell + gap) for i in range(4)]
    for left, caption in zip(lefts, ("image", "truth", "prediction", "error"), strict=True):
        draw.text((left + cell // 2, margin + line // 2 - 4), caption, INK, font, anchor="mm")
    top = margin + line
    for pictures, share in zip(panels, shares, strict=True):
        for left, picture in zip(lefts, pictures, strict=True):
            page.paste(picture, (left + (cell - picture.width) // 2, top))
        top += pictures[0].height
        draw.text((lefts[3] + cell // 2, top + line // 2), share, FAINT, font, anchor="mm")
        top += line
    page.paste(below, (0, top))
    return page


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture to NAME.png or NAME.jpg; the file appears whole or not at all."""
    content = encoded(picture, path)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def encoded(picture: Image.Image, path: str | Path) -> memoryview:
    """Returns the content of the file NAME.png or NAME.jpg of a picture."""
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"path: expected a name that ends with one of {', '.join(kinds)}, got {path}")
    content = io.BytesIO()  # Pillow does not notice that a JPEG cannot be written to a full disk
    picture.save(content, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return content.getbuffer()


def _panels(
    image: Tensor, truth: Tensor, prediction: Tensor, palette: Sequence[Color]
) -> tuple[list[Image.Image], str, set[int]]:
    """Returns the four pictures of a row of a preview, the share of wrong pixels and the labels present."""
    photo, true, predicted = _photo(image), _indices(truth, len(palette)), _indices(prediction, len(palette))
    _check_sizes(photo, truth=true, prediction=predicted)
    counts = true < len(palette)
    wrong = counts & (true != predicted)
    errors = np.asarray(photo.convert("L").convert("RGB")) // 2 + 64
    errors[wrong], errors[~counts] = wrong_color(palette), ignored_color(palette)
    pictures = [photo, colourise(truth, palette), colourise(prediction, palette), Image.fromarray(errors)]
    share = f"{wrong.sum() / counts.sum():.1%} wrong" if counts.any() else "all ignored"
    return [_fitted(picture) for picture in pictures], share, {*_present(true), *_present(predicted)}


def _fitted(picture: Image.Image) -> Image.Image:
    """Resizes a picture for a preview: reduces it by the mean over boxes, or enlarges each pixel to a square."""
    longest = max(picture.size)
    if longest > LARGEST:
        size = [max(1, round(side * LARGEST / longest)) for side in picture.size]
        return picture.resize(size, Image.Resampling.BOX)
    times = max(1, ENLARGED // longest)
    return picture.resize([side * times for side in picture.size], Image.Resampling.NEAREST)


def _entries(
    present: Iterable[int], classes: Sequence[str], palette: Sequence[Color], size: int, clear: Collection[int]
) -> list[Entry]:
    """Returns the entries of a legend in the order of classes, with "ignored" at the end."""
    if len(classes) != len(palette):
        raise ValueError(f"classes, palette: expected a colour for each name, got {len(classes)} and {len(palette)}")
    labels = sorted({int(label) for label in present})
    classed = [label for label in labels if 0 <= label < len(classes)]
    entries: list[Entry] = [
        (None if i in clear else palette[i], written(classes[i], i, size, 15 * size)) for i in classed
    ]
    if len(classed) == len(labels):
        return entries
    return [*entries, (ignored_color(palette), Written("ignored", built_in(size)))]


def _indices(labels: Tensor | np.ndarray, count: int) -> np.ndarray:
    """Converts labels to int32 and replaces those outside 0…count−1 by count."""
    array = labels if isinstance(labels, np.ndarray) else torch.as_tensor(labels).cpu().numpy()
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {array.dtype}")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"labels: expected the shape (H, W) without a 0, got {array.shape}")
    return np.where((array >= 0) & (array < count), array.astype(np.int32), np.int32(count))


def _present(indices: np.ndarray) -> list[int]:
    return np.flatnonzero(np.bincount(indices.ravel())).tolist()


def _photo(image: Tensor) -> Image.Image:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        given = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a (3, H, W) tensor of torch.uint8, got {given}")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _check_sizes(photo: Image.Image, **labels: np.ndarray) -> None:
    for name, given in labels.items():
        if given.shape[::-1] != photo.size:
            raise ValueError(f"{name}: expected {photo.size[::-1]}, the image's size, got {given.shape}")
