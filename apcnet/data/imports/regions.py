"""Turns polygons, ellipses and run lengths into masks: the shapes in which annotation tools store regions.

A pixel belongs to a region if its centre lies in it: the centre of the pixel in row i and column j is (j + ½, i + ½).
Contours of programs count otherwise: OpenCV's go through the centres of the outermost pixels, whose coordinates they
take as whole numbers, and scikit-image's half a pixel around them. `counting` tells them by their coordinates.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Size = tuple[int, int]  # height and width
WHOLE = 0.02  # of a pixel: coordinates that are stored as shares of the size are rounded


class Patch(NamedTuple):
    """Holds the pixels of a region in the smallest part of its image, because there may be hundreds of regions."""

    top: int
    left: int
    pixels: np.ndarray  # (h, w) bool

    def paint(self, mask: np.ndarray, label: int) -> None:
        """Sets the pixels in a mask (H, W) to a label."""
        height, width = self.pixels.shape
        mask[self.top : self.top + height, self.left : self.left + width][self.pixels] = label


def polygon(points: np.ndarray | Sequence, size: Size) -> np.ndarray:
    """Marks the pixels whose centres lie in a polygon of points (x, y), where its outline encloses them oddly often.

    Every edge toggles the pixels to its right, in the rows whose centres lie between its ends.
    """
    corners = np.asarray(points, np.float64).reshape(-1, 2)
    height, width = size
    toggles = np.zeros((height, width + 1), np.int64)
    for (x, y), (next_x, next_y) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        first, last = sorted((y, next_y))
        rows = np.arange(max(math.ceil(first - 0.5), 0), min(math.ceil(last - 0.5), height))
        if len(rows):
            crossings = x + (rows + 0.5 - y) * ((next_x - x) / (next_y - y))
            toggles[rows, np.ceil(crossings - 0.5).clip(0, width).astype(np.int64)] += 1
    return toggles[:, :width].cumsum(1) % 2 == 1


def counting(rings: Iterable[np.ndarray]) -> str:
    """Tells how the polygons of an image count pixels: "corners", or as contours of "opencv" or of "skimage"."""
    rings = [np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings]
    if not rings:
        return "corners"
    points = np.concatenate(rings)
    whole, half = (abs(points - offset - np.round(points - offset)) < WHOLE for offset in (0, 0.5))
    if (whole ^ half).all() and (whole.sum(1) == 1).all():
        return "skimage"
    steps = np.concatenate([ring - np.roll(ring, 1, axis=0) for ring in rings])
    slanted = (abs(steps) > WHOLE).all(1).any()  # outlines along the edges of pixels are never slanted
    return "opencv" if whole.all() and slanted else "corners"


def fill(rings: Iterable[np.ndarray], size: Size, counted: str) -> Patch:
    """Marks the pixels of all rings, which count pixels as `counting` says; a ring within another one is a hole."""
    rings = [np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings]
    corners = np.concatenate(rings) if rings else np.zeros((1, 2))
    left, top = np.floor(corners.min(0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 2, size[::-1])
    pixels = np.zeros((max(bottom - top, 0), max(right - left, 0)), bool)
    for ring in sorted(rings, key=lambda ring: -np.ptp(ring, axis=0).prod()):
        points, outline = ring - (left, top), np.zeros_like(pixels)
        inside = polygon(points if counted == "corners" else points + 0.5, (pixels.shape[0], pixels.shape[1]))
        if counted == "opencv":
            _draw_outline(points, outline)  # of a hole, too, it lies on pixels of the region
        if inside.any() and pixels[inside | outline].all():
            pixels &= ~inside | outline
        else:
            pixels |= inside | outline
    return Patch(int(top), int(left), pixels)


def cropped(pixels: np.ndarray) -> Patch:
    """Returns the marked pixels of an image, without the rows and columns around them."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return Patch(0, 0, pixels[:0, :0])
    top, left = int(rows[0]), int(columns[0])
    return Patch(top, left, pixels[top : rows[-1] + 1, left : columns[-1] + 1].copy())


def _draw_outline(points: np.ndarray, pixels: np.ndarray) -> None:
    """Marks the pixels on the lines between points, which are the outermost pixels of a contour."""
    for (x, y), (next_x, next_y) in zip(points, np.roll(points, -1, axis=0), strict=True):
        count = int(max(abs(next_x - x), abs(next_y - y)) + 0.5) + 1
        rows = np.round(np.linspace(y, next_y, count)).astype(int)
        columns = np.round(np.linspace(x, next_x, count)).astype(int)
        inside = (rows >= 0) & (rows < pixels.shape[0]) & (columns >= 0) & (columns < pixels.shape[1])
        pixels[rows[inside], columns[inside]] = True


def rectangle(left: float, top: float, right: float, bottom: float, size: Size) -> np.ndarray:
    """Marks the pixels whose centres lie in a rectangle."""
    return polygon([(left, top), (right, top), (right, bottom), (left, bottom)], size)


def ellipse(x: float, y: float, radius_x: float, radius_y: float, size: Size) -> np.ndarray:
    """Marks the pixels whose centres lie in an upright ellipse."""
    v, u = np.ogrid[: size[0], : size[1]]
    return ((u + 0.5 - x) / max(radius_x, 1e-9)) ** 2 + ((v + 0.5 - y) / max(radius_y, 1e-9)) ** 2 <= 1


def from_lengths(lengths: Sequence[int] | np.ndarray, pixels: int) -> np.ndarray:
    """Decodes the lengths of runs, of zeros and ones in turn, to a boolean for every pixel."""
    lengths = np.asarray(lengths, np.int64)
    if (lengths < 0).any() or lengths.sum() != pixels:
        raise ValueError(f"expected run lengths of {pixels} pixels, got {lengths.sum()}")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def coco_run_lengths(code: dict, size: Size) -> np.ndarray:
    """Decodes COCO's run lengths, column by column: a list, or a text of 5 bits for each character."""
    if tuple(code["size"]) != tuple(size):
        raise ValueError(f"expected the size of the image, {list(size)}, got {list(code['size'])}")
    counts = code["counts"]
    flat = from_text(counts, size[0] * size[1]) if isinstance(counts, str) else from_lengths(counts, size[0] * size[1])
    return flat.reshape(size[1], size[0]).T


def from_text(counts: str, pixels: int) -> np.ndarray:
    """Decodes COCO's compressed run lengths to a boolean for every pixel.

    A length takes a few characters, each 48 + its next 5 bits, lowest first, + 32 if more follow; the highest bit is
    the sign. From the fourth length on, the difference to the length two before it is stored.
    """
    digits = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits & 32 == 0)
    if len(last) == 0 or last[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError("expected a run-length code, got other characters")
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    lengths = np.add.reduceat((digits & 31) << 5 * place, first)
    lengths -= np.where(digits[last] & 16, 1 << 5 * (place[last] + 1), 0)
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    if lengths.min() < 0 or lengths.sum() != pixels:
        raise ValueError(f"expected a run-length code of {pixels} pixels, got one of {lengths.sum()}")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def label_studio_run_lengths(code: Sequence[int], size: Size) -> np.ndarray:
    """Decodes Label Studio's run lengths of RGBA values; alpha marks the region.

    The bits are: 32 for the number of values, 5 for the width of a value less 1, four times 4 for widths of lengths
    less 1; then runs: 1 bit whether the value repeats, 2 for which width, the length less 1, and one value or each.
    """
    bits = "".join(f"{byte:08b}" for byte in bytes(code))
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        if position > len(bits):
            raise ValueError("expected Label Studio's run lengths, got too few bytes")
        return int(bits[position - count : position], 2)

    values = np.zeros(take(32), np.uint8)
    width, lengths = take(5) + 1, [take(4) + 1 for _ in range(4)]
    if len(values) != 4 * size[0] * size[1]:
        raise ValueError(f"expected run lengths of {size[0] * size[1]} pixels, got {len(values) // 4}")
    i = 0
    while i < len(values):
        repeats, length = take(1), lengths[take(2)]
        end = i + take(length) + 1
        if repeats:
            values[i:end] = take(width)
        else:
            for place in range(i, min(end, len(values))):
                values[place] = take(width)
        i = end
    return values.reshape(*size, 4)[..., 3] > 0
