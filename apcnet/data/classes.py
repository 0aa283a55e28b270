"""Lists of classes: their names, their colours, and which value in a mask stands for which.

A list is a file with a line for each class, the name and then red, green and blue: `traffic light 250 170 30`. Those
of the benchmarks are in the folder class_lists; a user's own is classes.txt beside the images.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from apcnet.data.sample import IGNORE

LISTS = Path(__file__).parent / "class_lists"
UNKNOWN = 254  # in a label table: a value that masks of this data set do not hold
MOST = 254  # classes that a label of 8 bits can tell apart, beside IGNORE and UNKNOWN

Color = tuple[int, int, int]
_COLORED = re.compile(r"(.*\S)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)")


def read_classes(file: Path) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """The names and colours that a list gives; colours may be left out, of all classes.

    Empty lines and lines that begin with # say nothing.
    """
    lines, source = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()], str(file)
    lines = [line for line in lines if line and not line.startswith("#")]
    matches = [_COLORED.fullmatch(line) for line in lines]
    if not any(matches):
        return check_classes(lines, None, source)
    if not all(matches):
        raise ValueError(f"{source}: some classes have a colour, {lines[matches.index(None)]!r} has none")
    return check_classes(
        [match[1] for match in matches], [tuple(map(int, match.groups()[1:])) for match in matches], source
    )


def check_classes(
    names: Sequence[str], palette: Sequence[Sequence[int]] | None, source: str
) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Names and colours as they are kept, if they are fit for it; the colours of VOC if none are given."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{source}: expected a sequence of names, got {names!r}")
    if not 1 <= len(names) <= MOST:
        raise ValueError(f"{source}: expected 1 to {MOST} classes, got {len(names)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{source}: the class {twice[0]!r} is there twice")
    if palette is None:
        return tuple(names), voc_colors(len(names))
    colors = tuple(tuple(map(int, color)) for color in palette)
    if len(colors) != len(names):
        raise ValueError(f"{source}: {len(names)} classes, but {len(colors)} colours")
    for name, color in zip(names, colors, strict=True):
        if len(color) != 3 or not all(0 <= part <= 255 for part in color):
            raise ValueError(f"{source}: the colour of {name!r}: expected three numbers of 0 to 255, got {color}")
    return tuple(names), colors


def voc_colors(count: int) -> tuple[Color, ...]:
    """Distinct colours, those of PASCAL VOC: the bits of an index, three at a time, from the highest bit down."""

    def part(index: int, channel: int) -> int:
        return sum((index >> 3 * place + channel & 1) << 7 - place for place in range(3))

    return tuple((part(i, 0), part(i, 1), part(i, 2)) for i in range(count))


def label_table(classes: int, stored: Mapping[int, int] | None = None) -> np.ndarray:
    """For each of the 256 values that a mask may hold: the index of its class, IGNORE or UNKNOWN.

    Args:
        classes: how many there are.
        stored: from stored values to indices or IGNORE; None: classes are stored as their indices. 255 is IGNORE
            unless it is said to be something else.
    """
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    table[255] = IGNORE
    for value, label in (dict(zip(range(classes), range(classes), strict=True)) if stored is None else stored).items():
        if value not in range(256) or (label not in range(classes) and label != IGNORE):
            raise ValueError(
                f"labels: expected values of 0 to 255 to stand for indices of 0 to {classes - 1} or {IGNORE}, "
                f"got {value!r}: {label!r}"
            )
        table[value] = label
    return table


def reduced_labels(classes: int) -> np.ndarray:
    """The table of benchmarks that store 0 for what no class covers, and class i as i + 1."""
    return label_table(classes, {0: IGNORE} | {i + 1: i for i in range(classes)})
