"""Generated scenes in which the class of a texture depends on its surroundings; no files, any size, any number.

Bands along the picture's border show a cue: checks, dots or mesh. Elsewhere lie patches of fabric, all of one look, and
the cue decides which of three classes they are: the context classes. Ground, bricks, pebbles and the three kinds of
band are told by their looks. Two families:

- whole: a band along one of the four sides; its cue decides about all fabric in the picture.
- regional: bands along two opposite sides. The picture is cut in two across them, and each half has another cue in its
  parts of both bands, which decides about the fabric in that half. How the ground is raked says which half it is: like
  / on the left, \\ on the right, in rows above, in columns below; in a mirror image as well.

Nothing local gives the class away. All that is drawn outside the bands, and the bands' colours too, is a function of
the scene's key, without knowledge of the cues: exchange the cues, and nothing changes but the bands' pixels and the
labels of bands and fabric (a test does it). From a band to fabric it is at least a third of the picture's depth as the
band sees it, in the regional family a quarter; a network whose field reaches less far can only guess.

Scenes follow from (seed, family, split, index) alone, in integer arithmetic, so that they are the same to the bit on
every machine; the digest of eight of them is committed with the tests. Their geometry was changed while PSP and APC
heads were tried on them, to make both families learnable; it is not to be changed for a comparison's sake.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes
from apcnet.data.sample import IGNORE, Sample
from apcnet.keys import STEP, hashes, keyed, mix

Box = tuple[int, int, int, int]  # top, left, bottom, right
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]  # where an endless plane of rows and columns is marked

LENGTHS = {"train": 16384, "val": 256, "test": 1024}
FAMILIES = {"whole": 1, "regional": 2}  # how many cues there are in a picture
SMALLEST = 48

GROUND, BRICKS, PEBBLES, BAND, FABRIC = 0, 1, 2, 3, 6  # band and fabric: the first class of three, one for each cue
COLOURS = {  # of the plane, and of what is marked on it
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
RAKED: tuple[Pattern, ...] = (  # on the left, on the right; above and below, before the picture is turned
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
    """A data set of generated scenes.

    Args:
        split: train, val or test; no scene is in two of them.
        family: whole or regional.
        size: (height, width) of the pictures, 48 at least.
        seed: any integer; another one gives other scenes.
        length: how many scenes there are; None: 16384 to train with, 256 in val, 1024 in test.

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
        if min(height, width) < SMALLEST:
            raise ValueError(f"size: expected {SMALLEST} pixels a side at least, got {(height, width)}")
        length = LENGTHS[split] if length is None else length
        for name, number in (("seed", seed), ("length", length)):
            if not isinstance(number, int):
                raise TypeError(f"{name}: expected an integer, got {number!r}")
        if not 0 < length <= 1 << 32:
            raise ValueError(f"length: expected 1 to 2**32 scenes, got {length}")
        self.split, self.family, self.size = split, family, (height, width)
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    @functools.cached_property
    def names(self) -> list[str]:
        return [self._name(index) for index in range(self.length)]

    def __getitem__(self, index: int) -> Sample:
        index = range(self.length)[index]
        # A key of its own for each scene of a seed: 32 bits of index below the number of the family's split.
        part = list(FAMILIES).index(self.family) * len(LENGTHS) + list(LENGTHS).index(self.split)
        key = keyed(self.seed, part << 32 | index)
        image, mask = draw(key, self.size, cues_of(key, FAMILIES[self.family]))
        return Sample(torch.from_numpy(image), torch.from_numpy(mask), self._name(index))

    def _name(self, index: int) -> str:
        return f"{self.family}-{self.split}-{index:06}"


class Draws:
    """Integers one after another, each a function of a key and of how many came before it."""

    def __init__(self, key: int):
        self.key, self.count = key, 0

    def between(self, low: int, high: int) -> int:
        """From low to high, both included."""
        self.count += 1
        return low + keyed(self.key, self.count) % (high - low + 1)


def cues_of(key: int, count: int) -> list[int]:
    """The cues of a scene, one, or two different ones."""
    draws = Draws(keyed(key, -1))
    first = draws.between(0, len(CUES) - 1)
    return [first, (first + draws.between(1, len(CUES) - 1)) % len(CUES)][:count]


def draw(key: int, size: tuple[int, int], cues: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A scene: image (3, H, W) and mask (H, W), uint8. It is drawn with a band on top, then turned and mirrored."""
    draws = Draws(key)
    turned, reversed_, mirrored = (draws.between(0, 1) for _ in range(3))
    depth, breadth = size[::-1] if turned else size
    bands, clutter, fabric = rows(depth, len(cues))
    aside = breadth // 24  # between fabric and cut: no doubt on which side it is
    cut = breadth // 2 + draws.between(-aside, aside)
    if len(cues) == 1:
        edges, grounds = [0, breadth], [RAKED[draws.between(0, 3)]]
    else:
        edges, grounds = [0, cut, breadth], RAKED[2:] if turned else RAKED[:2]
        reversed_ = mirrored = 0  # the ground says which half it is
    picture = Picture(depth, breadth, draws)
    for cue, ground, left, right in zip(cues, grounds, edges[:-1], edges[1:], strict=True):
        picture.fill((0, left, depth, right), rectangle, GROUND, ground, GROUND)
        for top, bottom in bands:
            picture.fill((top, left, bottom, right), rectangle, BAND, CUES[cue], BAND + cue)
        for _ in range(4 // len(cues)):
            texture = draws.between(BRICKS, PEBBLES)
            box, shape = somewhere(draws, (clutter[0], left + 1, clutter[1], right - 1), quarters=1)
            picture.fill(box, shape, texture, OBJECTS[texture], texture)
        for _ in range(2):
            box, shape = somewhere(draws, (fabric[0], left + aside, fabric[1], right - aside), quarters=2)
            picture.fill(box, shape, FABRIC, OBJECTS[FABRIC], FABRIC + cue)
    noise = hashes(keyed(key, 0), depth * breadth).reshape(depth, breadth)
    for channel, shift in zip(picture.image, (0, 8, 16), strict=True):
        channel += ((noise >> shift) & 31).astype(np.int16) - 16
    image, mask = picture.image.clip(0, 255).astype(np.uint8), outlined(picture.mask)
    if turned:
        image, mask = image.swapaxes(1, 2), mask.T
    down, right = (-1 if flipped else 1 for flipped in (reversed_, mirrored))
    return np.ascontiguousarray(image[:, ::down, ::right]), np.ascontiguousarray(mask[::down, ::right])


class Picture:
    """An image and its mask, and what is drawn on them."""

    def __init__(self, height: int, width: int, draws: Draws):
        self.image = np.empty((3, height, width), np.int16)
        self.mask = np.empty((height, width), np.uint8)
        self.draws = draws

    def fill(self, box: Box, shape: Callable, texture: int, pattern: Pattern, label: int) -> None:
        """Fills a shape with any part of a pattern's plane, in a shade of the texture's colours."""
        top, left, bottom, right = box
        inside = shape(bottom - top, right - left, self.draws)
        v, u = np.ogrid[: bottom - top, : right - left]
        marked = pattern(v + self.draws.between(0, 1 << 16), u + self.draws.between(0, 1 << 16))
        for pixels, plain, mark in zip(self.image[:, top:bottom, left:right], *COLOURS[texture], strict=True):
            shade = self.draws.between(-20, 20)
            np.copyto(pixels, np.where(marked, np.int16(mark + shade), np.int16(plain + shade)), where=inside)
        self.mask[top:bottom, left:right][inside] = label


def rows(depth: int, cues: int) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    """From which row to which there are the bands, what needs no context, and fabric."""
    if cues == 1:
        band, gap = depth // 6, depth // 3
        return [(0, band)], (band + 1, depth - 1), (band + gap, depth - 1)
    band, gap = max(8, depth // 9), depth // 4
    return [(0, band), (depth - band, depth)], (band + 1, depth - band - 1), (band + gap, depth - band - gap)


def somewhere(draws: Draws, area: Box, quarters: int) -> tuple[Box, Callable]:
    """A box in an area, its sides so many quarters of the area's short side, up to one more, and a shape."""
    top, left, bottom, right = area
    short = min(bottom - top, right - left)
    height, width = (draws.between(short * quarters // 4, short * (quarters + 1) // 4) for _ in range(2))
    y, x = draws.between(top, bottom - height), draws.between(left, right - width)
    return (y, x, y + height, x + width), (rectangle, ellipse, polygon)[draws.between(0, 2)]


def rectangle(height: int, width: int, draws: Draws) -> np.ndarray:
    return np.ones((height, width), bool)


def ellipse(height: int, width: int, draws: Draws) -> np.ndarray:
    """The pixels whose centres lie in the ellipse that fills the box; twice their distances are integers."""
    v, u = np.ogrid[1 - height : height : 2, 1 - width : width : 2]
    return (v * width) ** 2 + (u * height) ** 2 <= (height * width) ** 2


def polygon(height: int, width: int, draws: Draws) -> np.ndarray:
    """A convex quadrilateral with a corner on every side of the box."""
    v, u = np.ogrid[1 : 2 * height : 2, 1 : 2 * width : 2]
    height, width = 2 * height, 2 * width
    along = [draws.between(side // 4, side - side // 4) for side in (width, height, width, height)]
    corners = [(0, along[0]), (along[1], width), (height, along[2]), (along[3], 0)]  # clockwise from the top
    inside = np.ones((height // 2, width // 2), bool)
    for (y, x), (next_y, next_x) in zip(corners, corners[1:] + corners[:1], strict=True):
        inside &= (next_x - x) * (v - y) >= (next_y - y) * (u - x)
    return inside


def outlined(mask: np.ndarray) -> np.ndarray:
    """The mask with 255 on both sides of every border between two classes, as annotators leave them."""
    border = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        pixels, marks = mask.swapaxes(0, axis), border.swapaxes(0, axis)
        differs = pixels[1:] != pixels[:-1]
        marks[1:] |= differs
        marks[:-1] |= differs
    return np.where(border, np.uint8(IGNORE), mask)
