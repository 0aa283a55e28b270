r"""Generates scenes in which the class of a texture depends on its surroundings; no files, any size, any number.

Bands along the border of the image show a cue: checks, dots or mesh. Elsewhere lie patches of fabric that all look the
same; the cue decides which of three classes they are, the context classes. Ground, bricks, pebbles and the three kinds
of band can be told by their texture. There are two families:

- whole: a band along one of the four sides; its cue decides the class of all fabric in the image.
- regional: bands along two opposite sides. A cut across them divides the image in two halves. Each half has its own cue
  in its parts of both bands, which decides the class of the fabric in that half. The pattern of the ground shows which
  half it is: lines like / on the left, \ on the right, rows above, columns below; also in a mirror image.

Nothing local reveals the class. Everything outside the bands, and the colours of the bands, is drawn from the scene's
key without the cues: exchange the cues, and only the pixels of the bands and the labels of bands and fabric change (a
test does it). The distance from band to fabric is at least a third of the side of the image that it is measured along,
in the regional family a quarter; a network whose receptive field is smaller can only guess.

Scenes depend on (seed, family, split, index) alone, in integer arithmetic, so that they are the same to the bit on
every machine; the tests hold the digest of eight of them. The geometry was adjusted while PSP and APC heads were tried
on it, to make both families learnable; it must not be changed to favour a side of a comparison.
"""

import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes
from apcnet.data.sample import IGNORE, Sample
from apcnet.keys import STEP, hashes, keyed, mix

Box = tuple[int, int, int, int]  # top, left, bottom, right
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]  # maps rows and columns of an endless plane to marked or not

LENGTHS = {"train": 16384, "val": 256, "test": 1024}
FAMILIES = {"whole": 1, "regional": 2}  # the number of cues in an image
MIN_SIDE = 48

GROUND, BRICKS, PEBBLES, BAND, FABRIC = 0, 1, 2, 3, 6  # band and fabric: the first class of three, one for each cue
COLOURS = {  # of the plain and of the marked parts of a texture
    GROUND: ((76, 92, 68), (104, 120, 96)),
    BRICKS: ((152, 80, 60), (196, 184, 168)),
    PEBBLES: ((80, 88, 104), (136, 144, 152)),
    BAND: ((56, 56, 80), (208, 204, 184)),
    FABRIC: ((172, 128, 56), (216, 188, 112)),
}
CUES: tuple[Pattern, ...] = (
    lambda v, u: ((v ^ u) & 4) > 0,  # checks
    lambda v, u: (v & u & 4) > 0,  # dots
    lambda v, u: ((v | u) & 4) > 0,  # mesh
)
GROUND_LINES: tuple[Pattern, ...] = (  # on the left, on the right; above and below, before the image is turned
    lambda v, u: ((v + u) & 7) < 3,
    lambda v, u: ((v - u) & 7) < 3,
    lambda v, u: (u & 7) < 3,
    lambda v, u: (v & 7) < 3,
)
OBJECTS: dict[int, Pattern] = {
    BRICKS: lambda v, u: ((v & 7) < 2) | (((u + (v & 8)) & 15) < 2),
    PEBBLES: lambda v, u: (mix((v >> 2 << 32 | u >> 2).astype(np.uint64) * STEP) & 1) > 0,
    FABRIC: lambda v, u: ((v + u) & 7) < 4,
}


class Synthetic:
    """Generates a data set of scenes, which needs no files.

    Args:
        split: train, val or test; no scene is in two of them.
        family: whole or regional.
        size: The (height, width) of the images, at least 48 each.
        seed: Any integer; other seeds give other scenes.
        length: The number of scenes; None for 16384 in train, 256 in val and 1024 in test.

    `context_classes` holds the indices of the classes that only their surroundings tell apart.
    """

    classes, palette = read_classes(LISTS / "synthetic.txt")
    context_classes = (6, 7, 8)

    def __init__(
        self,
        split: str = "train",
        family: str = "whole",
        size: tuple[int, int] = (96, 96),
        seed: int = 0,
        length: int | None = None,
    ):
        check_choice(split, "split", LENGTHS)
        check_choice(family, "family", FAMILIES)
        try:
            height, width = map(operator.index, size)
        except (TypeError, ValueError):
            raise TypeError(f"size: expected two integers (height, width), got {size!r}") from None
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"size: expected at least {MIN_SIDE} pixels a side, got {(height, width)}")
        length = LENGTHS[split] if length is None else length
        for name, number in (("seed", seed), ("length", length)):
            if not isinstance(number, int):
                raise TypeError(f"{name}: expected an integer, got {number!r}")
        if not 0 < length <= 1 << 32:
            raise ValueError(f"length: expected 1 to 2**32 scenes, got {length}")
        self.split, self.family, self.size = split, family, (height, width)
        self.seed, self.length = seed, length
        self._names: list[str] | None = None  # made on demand: there may be billions of scenes

    def __len__(self) -> int:
        return self.length

    @property
    def names(self) -> list[str]:
        """Returns the names of all scenes, in order."""
        if self._names is None:
            self._names = [self._name(index) for index in range(self.length)]
        return self._names

    def __getitem__(self, index: int) -> Sample:
        index = range(self.length)[index]
        # Each scene of a seed has its own key: 32 bits of index, and above them the number of its family and split.
        part = list(FAMILIES).index(self.family) * len(LENGTHS) + list(LENGTHS).index(self.split)
        key = keyed(self.seed, part << 32 | index)
        image, mask = draw(key, self.size, cues_of(key, FAMILIES[self.family]))
        return Sample(torch.from_numpy(image), torch.from_numpy(mask), self._name(index))

    def _name(self, index: int) -> str:
        return f"{self.family}-{self.split}-{index:06}"


class RandomIntegers:
    """Draws integers in sequence, each a function of the key and of the number drawn before it."""

    def __init__(self, key: int):
        self.key, self.count = key, 0

    def between(self, low: int, high: int) -> int:
        """Returns the next integer, from low to high, both included."""
        self.count += 1
        return low + keyed(self.key, self.count) % (high - low + 1)


def cues_of(key: int, count: int) -> list[int]:
    """Draws the cues of a scene, one or two different ones."""
    random = RandomIntegers(keyed(key, -1))
    first = random.between(0, len(CUES) - 1)
    return [first, (first + random.between(1, len(CUES) - 1)) % len(CUES)][:count]


def draw(key: int, size: tuple[int, int], cues: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene, image (3, H, W) and mask (H, W) in uint8: first with a band on top, then turned and mirrored."""
    random = RandomIntegers(key)
    turned, reversed_, mirrored = (random.between(0, 1) for _ in range(3))
    depth, breadth = size[::-1] if turned else size
    bands, clutter, fabric = row_ranges(depth, len(cues))
    margin = breadth // 24  # the distance between fabric and cut, so that its side is clear
    cut = breadth // 2 + random.between(-margin, margin)
    if len(cues) == 1:
        edges, grounds = [0, breadth], [GROUND_LINES[random.between(0, 3)]]
    else:
        edges, grounds = [0, cut, breadth], GROUND_LINES[2:] if turned else GROUND_LINES[:2]
        reversed_ = mirrored = 0  # the ground shows which half it is
    picture = Picture(depth, breadth, random)
    for cue, ground, left, right in zip(cues, grounds, edges[:-1], edges[1:], strict=True):
        picture.fill((0, left, depth, right), rectangle, GROUND, ground, GROUND)
        for top, bottom in bands:
            picture.fill((top, left, bottom, right), rectangle, BAND, CUES[cue], BAND + cue)
        for _ in range(4 // len(cues)):
            texture = random.between(BRICKS, PEBBLES)
            box, shape = random_shape(random, (clutter[0], left + 1, clutter[1], right - 1), quarters=1)
            picture.fill(box, shape, texture, OBJECTS[texture], texture)
        for _ in range(2):
            box, shape = random_shape(random, (fabric[0], left + margin, fabric[1], right - margin), quarters=2)
            picture.fill(box, shape, FABRIC, OBJECTS[FABRIC], FABRIC + cue)
    noise = hashes(keyed(key, 0), depth * breadth).reshape(depth, breadth)
    for channel, shift in zip(picture.image, (0, 8, 16), strict=True):
        channel += ((noise >> shift) & 31).astype(np.int16) - 16
    image, mask = picture.image.clip(0, 255).astype(np.uint8), with_ignored_borders(picture.mask)
    if turned:
        image, mask = image.swapaxes(1, 2), mask.T
    down, right = (-1 if flipped else 1 for flipped in (reversed_, mirrored))
    return np.ascontiguousarray(image[:, ::down, ::right]), np.ascontiguousarray(mask[::down, ::right])


class Picture:
    """Holds an image and its mask while shapes are drawn on both."""

    def __init__(self, height: int, width: int, random: RandomIntegers):
        self.image = np.empty((3, height, width), np.int16)
        self.mask = np.empty((height, width), np.uint8)
        self.random = random

    def fill(self, box: Box, shape: Callable, texture: int, pattern: Pattern, label: int) -> None:
        """Fills a shape with a random part of a pattern, in a random shade of the texture's colours."""
        top, left, bottom, right = box
        inside = shape(bottom - top, right - left, self.random)
        v, u = np.ogrid[: bottom - top, : right - left]
        marked = pattern(v + self.random.between(0, 1 << 16), u + self.random.between(0, 1 << 16))
        for pixels, plain, mark in zip(self.image[:, top:bottom, left:right], *COLOURS[texture], strict=True):
            shade = self.random.between(-20, 20)
            np.copyto(pixels, np.where(marked, np.int16(mark + shade), np.int16(plain + shade)), where=inside)
        self.mask[top:bottom, left:right][inside] = label


def row_ranges(depth: int, cues: int) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    """Returns the ranges of rows (first, last + 1) of the bands, of bricks and pebbles, and of fabric."""
    if cues == 1:
        band, gap = depth // 6, depth // 3
        return [(0, band)], (band + 1, depth - 1), (band + gap, depth - 1)
    band, gap = max(8, depth // 9), depth // 4
    return [(0, band), (depth - band, depth)], (band + 1, depth - band - 1), (band + gap, depth - band - gap)


def random_shape(random: RandomIntegers, area: Box, quarters: int) -> tuple[Box, Callable]:
    """Draws a box in an area and a shape; the sides are between `quarters` and one more quarter of the short side."""
    top, left, bottom, right = area
    short = min(bottom - top, right - left)
    height, width = (random.between(short * quarters // 4, short * (quarters + 1) // 4) for _ in range(2))
    y, x = random.between(top, bottom - height), random.between(left, right - width)
    return (y, x, y + height, x + width), (rectangle, ellipse, polygon)[random.between(0, 2)]


def rectangle(height: int, width: int, random: RandomIntegers) -> np.ndarray:
    """Marks every pixel of the box."""
    return np.ones((height, width), bool)


def ellipse(height: int, width: int, random: RandomIntegers) -> np.ndarray:
    """Marks the pixels whose centres lie in the ellipse that fills the box, by distances doubled to be integers."""
    v, u = np.ogrid[1 - height : height : 2, 1 - width : width : 2]
    return (v * width) ** 2 + (u * height) ** 2 <= (height * width) ** 2


def polygon(height: int, width: int, random: RandomIntegers) -> np.ndarray:
    """Marks a convex quadrilateral with a corner on every side of the box."""
    v, u = np.ogrid[1 : 2 * height : 2, 1 : 2 * width : 2]
    height, width = 2 * height, 2 * width
    along = [random.between(side // 4, side - side // 4) for side in (width, height, width, height)]
    corners = [(0, along[0]), (along[1], width), (height, along[2]), (along[3], 0)]  # clockwise from the top
    inside = np.ones((height // 2, width // 2), bool)
    for (y, x), (next_y, next_x) in zip(corners, corners[1:] + corners[:1], strict=True):
        inside &= (next_x - x) * (v - y) >= (next_y - y) * (u - x)
    return inside


def with_ignored_borders(mask: np.ndarray) -> np.ndarray:
    """Sets both sides of every border between two classes to 255, as annotators do."""
    border = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        pixels, marks = mask.swapaxes(0, axis), border.swapaxes(0, axis)
        differs = pixels[1:] != pixels[:-1]
        marks[1:] |= differs
        marks[:-1] |= differs
    return np.where(border, np.uint8(IGNORE), mask)
