"""Draws labels in colours, overlays, legends, previews of training and confusion matrices.

Labels are (H, W) integers; a label outside the classes, usually 255, is ignored. Images are (3, H, W) uint8. Pillow
draws with its built-in font, which has little more than ASCII: other names lose their accents or become the number of
their class.
"""

import functools
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from apcnet.files import replacing

Color = tuple[int, int, int]
Entry = tuple[Color, str]  # one entry of a legend

PAPER, INK, FAINT = (255, 255, 255), (38, 42, 50), (138, 143, 153)
IGNORED, WRONG = (56, 58, 62), (232, 28, 52)
# Colours of wrong and of ignored pixels: the first one that no class has, or else the one least like any class.
WRONGS = (WRONG, (236, 0, 200), (0, 214, 230), (250, 230, 0), (255, 128, 0), (60, 255, 60), (110, 0, 255))
GREYS = (IGNORED, (206, 208, 212), (128, 130, 134), (255, 255, 255))
UNLIKE, UNLIKE_GREY = 0.09, 0.04  # distances in Oklab from which two colours are not taken for each other
# The darkest colours of a confusion matrix, on the diagonal and off it.
RIGHT_SHARE, WRONG_SHARE = (16, 66, 148), (196, 18, 40)
# A preview reduces larger pictures to LARGEST pixels, and enlarges smaller ones up to ENLARGED.
LARGEST, ENLARGED = 480, 288
PLAIN = str.maketrans(dict(zip("ßæœøØłŁđı–", ("ss", "ae", "oe", "o", "O", "l", "L", "d", "i", "-"), strict=True)))


@functools.lru_cache
def palette(num_classes: int) -> tuple[Color, ...]:
    """Returns colours for classes without a palette, each as different from the ones before it as possible.

    No colour is dark, pale or grey. A longer palette starts with the colours of a shorter one.

    Args:
        num_classes: Number of colours.
    """
    steps = np.round(np.linspace(0, 255, 17)).astype(np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(colors)
    lightness, chroma = places[:, 0], np.hypot(places[:, 1], places[:, 2])
    fit = (lightness > 0.42) & (lightness < 0.9) & (chroma > 0.08) & (chroma < 0.2)
    colors, places = colors[fit], places[fit]
    if not 1 <= num_classes <= len(colors):
        raise ValueError(f"num_classes: expected 1 to {len(colors)}, got {num_classes}")
    nearest = np.min([_distances(places, other) for other in _oklab(np.array([IGNORED, PAPER]))], axis=0)
    chosen = []
    for _ in range(num_classes):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distances(places, places[chosen[-1]]))
    return tuple(tuple(colors[i].tolist()) for i in chosen)


def wrong_color(palette: Sequence[Color]) -> Color:
    """Returns the colour of wrong pixels: red, or another one where a class has that colour."""
    return _unlike(tuple(palette), WRONGS, UNLIKE)


def ignored_color(palette: Sequence[Color]) -> Color:
    """Returns the colour of ignored pixels: dark grey, or another grey where a class has that colour."""
    return _unlike(tuple(palette), GREYS, UNLIKE_GREY)


def colourise(labels: Tensor | np.ndarray, palette: Sequence[Color]) -> Image.Image:
    """Draws labels in the colours of their classes; ignored pixels are dark grey, or another grey if a class is.

    Args:
        labels: (H, W) integers.
        palette: RGB colour of each class.
    """
    table = np.array([*palette, ignored_color(palette)], np.uint8)
    return Image.fromarray(table[_indices(labels, len(palette))])


def overlay(image: Tensor, labels: Tensor | np.ndarray, palette: Sequence[Color], opacity: float = 0.5) -> Image.Image:
    """Blends an image with the colours of its labels; ignored pixels show the image alone.

    Args:
        image: (3, H, W) uint8.
        labels: (H, W) integers.
        palette: RGB colour of each class.
        opacity: Share of the labels' colours, 0 to 1.

    Example:
        >>> save(overlay(image, labels, palette(21)), "overlay.png")
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    photo, indices = _photo(image), _indices(labels, len(palette))
    _check_sizes(photo, labels=indices)
    blended = Image.blend(photo, colourise(labels, palette), opacity)
    blended.paste(photo, mask=Image.fromarray(indices == len(palette)))
    return blended


def legend(
    present: Iterable[int], classes: Sequence[str], palette: Sequence[Color], width: int, more: Sequence[Entry] = ()
) -> Image.Image:
    """Draws a legend with the colours and names of classes.

    Args:
        present: Labels to list; those outside the classes become one entry "ignored".
        classes: Name of each class.
        palette: RGB colour of each class.
        width: Width in pixels, which sets the number of columns; the picture is wider if one column needs it.
        more: Further (colour, name) entries.
    """
    entries = [*_entries(present, classes, palette), *more]
    size = _text_size(width)
    font, margin, line, gap = _font(size), round(size * 1.2), round(size * 1.7), round(size * 1.5)
    names = [_shortened(name, font, 15 * size) for _, name in entries]
    column = line + math.ceil(max((font.getlength(name) for name in names), default=0)) + gap
    columns = min(max((width - 2 * margin + gap) // column, 1), max(len(entries), 1))
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (max(width, 2 * margin + columns * column - gap), 2 * margin + rows * line), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, ((color, _), name) in enumerate(zip(entries, names, strict=True)):
        left, top = margin + i // rows * column, margin + i % rows * line
        box = left, top + (line - size) // 2, left + size, top + (line + size) // 2
        draw.rounded_rectangle(box, size // 5, color, outline=tuple(part * 3 // 4 for part in color))
        draw.text((left + line, top + line // 2), name, INK, font, anchor="lm")
    return sheet


def with_legend(
    picture: Image.Image, labels: Tensor | np.ndarray, classes: Sequence[str], palette: Sequence[Color]
) -> Image.Image:
    """Returns a picture with a legend below it that lists the classes in `labels`."""
    present = _present(_indices(labels, len(palette)))
    below = legend(present, classes, palette, picture.width)
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
    size = _text_size(4 * cell)
    margin, gap, line = round(size * 1.2), size * 3 // 4, size * 2
    width = 2 * margin + 4 * cell + 3 * gap
    below = legend(present, classes, palette, width, [(wrong_color(palette), "wrong")])
    height = margin + line + sum(pictures[0].height + line for pictures in panels) + below.height
    page = Image.new("RGB", (max(width, below.width), height), PAPER)
    draw, font = ImageDraw.Draw(page), _font(size)
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


def confusion(matrix: Tensor | np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Draws a confusion matrix; each row shows how the pixels of one true class were predicted.

    Correct predictions are blue and wrong ones red. The colour grows with the square root of the share, so that a few
    per cent are visible. Cells show per cent where there is room. Names of classes without pixels are faint.

    Args:
        matrix: (K, K) counts; rows are targets, columns are predictions, as in `ConfusionMatrix.matrix`.
        classes: Name of each class.
    """
    counts = torch.as_tensor(matrix).double().cpu().numpy()
    if counts.shape != (len(classes), len(classes)) or not len(classes):
        raise ValueError(f"matrix: expected ({len(classes)}, {len(classes)}), a row for each class, got {counts.shape}")
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    cell = min(max(960 // len(classes), 15), 84)
    side, font = cell * len(classes), _font(min(max(cell - 3, 11), 16))
    names = [_shortened(_legible(name, i), font, 220) for i, name in enumerate(classes)]
    name_width = math.ceil(max(font.getlength(name) for name in names)) + 10
    big = _font(_text_size(side))
    margin, title, key = 24, 36, _key()
    left, top = margin + title + name_width, margin + title + name_width
    page = Image.new("RGB", (left + max(side, key.width) + margin, top + side + key.height + 2 * margin), PAPER)
    page.paste(_heat(shares, cell), (left, top))
    draw = ImageDraw.Draw(page)
    draw.text((left + side // 2, margin + 10), "prediction", INK, big, anchor="mm")
    _upright(page, margin + 10, top + (side + math.ceil(big.getlength("truth"))) // 2, "truth", big, INK)
    for i, (name, total) in enumerate(zip(names, totals[:, 0], strict=True)):
        middle, ink = i * cell + cell // 2, INK if total else FAINT
        draw.text((left - 8, top + middle), name, ink, font, anchor="rm")
        _upright(page, left + middle, top - 8, name, font, ink)
    if cell >= 26:
        number = _font(min(cell * 2 // 5, 20))
        for i, j in np.argwhere(shares >= 0.005):
            place = left + j * cell + cell // 2, top + i * cell + cell // 2
            draw.text(place, f"{100 * shares[i, j]:.0f}", PAPER if shares[i, j] > 0.2 else INK, number, anchor="mm")
    page.paste(key, (left - 4, top + side + margin))
    return page


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture to NAME.png or NAME.jpg; the file appears whole or not at all."""
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"path: expected a name that ends with one of {', '.join(kinds)}, got {path}")
    content = io.BytesIO()  # Pillow does not notice that a JPEG cannot be written to a full disk
    picture.save(content, kind, **({"quality": 92} if kind == "JPEG" else {}))
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


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


def _entries(present: Iterable[int], classes: Sequence[str], palette: Sequence[Color]) -> list[Entry]:
    """Returns the entries of a legend in the order of classes, with "ignored" at the end."""
    if len(classes) != len(palette):
        raise ValueError(f"classes, palette: expected a colour for each name, got {len(classes)} and {len(palette)}")
    labels = sorted({int(label) for label in present})
    classed = [label for label in labels if 0 <= label < len(classes)]
    colors = ((i, palette[i]) for i in classed)
    entries: list[Entry] = [((red, green, blue), _legible(classes[i], i)) for i, (red, green, blue) in colors]
    return entries if len(classed) == len(labels) else [*entries, (ignored_color(palette), "ignored")]


def _heat(shares: np.ndarray, cell: int) -> Image.Image:
    """Draws the cells of a confusion matrix with light lines between them."""
    darkest = np.where(np.eye(len(shares), dtype=bool)[..., None], RIGHT_SHARE, WRONG_SHARE)
    colors = _shades(shares, darkest).repeat(cell, 0).repeat(cell, 1)
    colors[cell - 1 :: cell] = colors[:, cell - 1 :: cell] = PAPER
    return Image.fromarray(colors)


def _shades(shares: np.ndarray, darkest: Color | np.ndarray) -> np.ndarray:
    """Returns colours from nearly white to the darkest, by the square root of the shares; RGB is the last axis."""
    pale = np.array([242, 243, 246])
    return np.round(pale + np.sqrt(shares)[..., None] * (darkest - pale)).astype(np.uint8)


def _key() -> Image.Image:
    """Draws the colour scale of a confusion matrix."""
    font, width, height, left = _font(13), 260, 12, 4
    sheet = Image.new("RGB", (width + 64, 76), PAPER)
    draw = ImageDraw.Draw(sheet)
    shares = np.broadcast_to(np.linspace(0, 1, width) ** 2, (height, width))
    for top, darkest, name in ((0, RIGHT_SHARE, "right"), (height + 6, WRONG_SHARE, "wrong")):
        sheet.paste(Image.fromarray(_shades(shares, darkest)), (left, top))
        draw.text((left + width + 10, top + height // 2), name, INK, font, anchor="lm")
    bottom = 2 * height + 6
    for share in (0, 1, 10, 25, 50, 100):
        place = left + round((width - 1) * math.sqrt(share / 100))
        draw.line((place, bottom + 1, place, bottom + 4), FAINT)
        draw.text((place, bottom + 14), str(share), FAINT, font, anchor="mm")
    draw.text((left, bottom + 36), "per cent of the true pixels of a class", FAINT, font, anchor="lm")
    return sheet


def _upright(page: Image.Image, middle: int, foot: int, text: str, font: ImageFont.FreeTypeFont, ink: Color) -> None:
    """Writes text from bottom to top: it starts at the y of `foot` and is centred at the x of `middle`."""
    length, height = math.ceil(font.getlength(text)), 2 * math.ceil(font.size)
    letters = Image.new("L", (length, height))
    ImageDraw.Draw(letters).text((0, height // 2), text, 255, font, anchor="lm")
    letters = letters.transpose(Image.Transpose.ROTATE_90)
    page.paste(ink, (middle - height // 2, foot - length), letters)


def _text_size(width: int) -> int:
    """Returns the size of letters for a picture of this width."""
    return max(14, width // 70)


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _legible(name: str, index: int) -> str:
    """Returns a class's name if the font has its letters, else without accents, else "class" and its number."""
    if _known(name):
        return name
    plain = unicodedata.normalize("NFKD", name).translate(PLAIN)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return plain if _known(plain) else f"class {index}"


@functools.lru_cache
def _known(text: str) -> bool:
    """Returns True if the font has every letter; for others it draws a box."""
    font = _font(14)
    box = bytes(font.getmask("\uffff"))
    return bool(text) and all(bytes(font.getmask(letter)) != box for letter in text)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cuts off a text at a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


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


@functools.lru_cache
def _unlike(palette: tuple[Color, ...], candidates: tuple[Color, ...], enough: float) -> Color:
    """Returns the first candidate at this distance from every colour of a palette, or else the one furthest away."""
    places = _oklab(np.array(palette))
    nearest = [float(_distances(places, place).min()) for place in _oklab(np.array(candidates))]
    apart = next((i for i, distance in enumerate(nearest) if distance >= enough), int(np.argmax(nearest)))
    return candidates[apart]


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Converts sRGB colours, 0–255, to Oklab, where distances are close to perceived differences."""
    levels = colors / 255
    linear = np.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    to_cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return np.cbrt(linear @ to_cones.T) @ to_lab.T


def _distances(places: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns rounded distances, so that their maximum does not depend on a machine's last bit."""
    return np.round(np.linalg.norm(places - other, axis=1), 6)
