"""Reads lists of classes with their colours, and maps the values in masks to class indices.

A list is a text file with one line for each class: the name, then red, green and blue, as in
`traffic light 250 170 30`. The folder class_lists holds the lists of the benchmarks; a data set of your own has a
classes.txt beside its images.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from apcnet.data.sample import IGNORE

LISTS = Path(__file__).parent / "class_lists"
UNKNOWN = 254  # marks values in a label table that masks of this data set must not hold
MAX_CLASSES = 254  # 8-bit labels, without IGNORE and UNKNOWN

Color = tuple[int, int, int]
_COLORED = re.compile(r"(.*\S)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)")


def read_classes(file: Path) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Reads the names and colours of classes from a file; either all classes have colours, or none.

    Empty lines and lines that begin with # are skipped. Without colours, the classes get those of PASCAL VOC.
    """
    try:
        text, source = file.read_text(encoding="utf-8-sig"), str(file)
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}: expected text in UTF-8, got other bytes in line {line}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    colored = [match for line in lines if (match := _COLORED.fullmatch(line))]
    if not colored:
        return check_classes(lines, None, source)
    if len(colored) < len(lines):
        plain = next(line for line in lines if not _COLORED.fullmatch(line))
        raise ValueError(f"{source}: expected a colour for every class or for none, but {plain!r} has none")
    return check_classes(
        [match[1] for match in colored], [tuple(map(int, match.groups()[1:])) for match in colored], source
    )


def check_classes(
    names: Sequence[str], palette: Sequence[Sequence[int]] | None, source: str
) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Returns names and colours as tuples, or raises an error that names `source`; without colours it takes VOC's."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{source}: expected a sequence of names, got {names!r}")
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"{source}: expected 1 to {MAX_CLASSES} classes, got {len(names)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{source}: expected different names, but lists the class {repeated[0]!r} twice")
    if palette is None:
        return tuple(names), voc_colors(len(names))
    if len(palette) != len(names):
        raise ValueError(f"{source}: expected a colour for each of {len(names)} classes, got {len(palette)} colours")
    return tuple(names), tuple(_check_color(color, name, source) for name, color in zip(names, palette, strict=True))


def _check_color(given: Sequence[int], name: str, source: str) -> Color:
    match tuple(map(int, given)):
        case (red, green, blue) if all(0 <= part <= 255 for part in (red, green, blue)):
            return red, green, blue
        case color:
            raise ValueError(f"{source}: the colour of {name!r}: expected three numbers from 0 to 255, got {color}")


def voc_colors(count: int) -> tuple[Color, ...]:
    """Returns distinct colours, PASCAL VOC's: the bits of an index, three at a time, from the highest bit down."""

    def part(index: int, channel: int) -> int:
        return sum((index >> 3 * place + channel & 1) << 7 - place for place in range(3))

    return tuple((part(i, 0), part(i, 1), part(i, 2)) for i in range(count))


def label_table(classes: int, stored: Mapping[int, int] | None = None) -> np.ndarray:
    """Makes the table that maps each of the 256 values of a mask to the index of its class, IGNORE or UNKNOWN.

    Args:
        classes: The number of classes.
        stored: Maps stored values to indices or IGNORE; None if masks store the indices themselves. 255 is IGNORE
            unless it is mapped to something else.
    """
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    table[255] = IGNORE
    for value, label in (dict(zip(range(classes), range(classes), strict=True)) if stored is None else stored).items():
        if value not in range(256) or (label not in range(classes) and label != IGNORE):
            raise ValueError(
                f"labels: expected values from 0 to 255 mapped to indices from 0 to {classes - 1} or to {IGNORE}, "
                f"got {value!r}: {label!r}"
            )
        table[value] = label
    return table


def reduced_labels(classes: int) -> np.ndarray:
    """Makes the label table of benchmarks that store class i as i + 1, and 0 where there is no class."""
    return label_table(classes, {0: IGNORE} | {i + 1: i for i in range(classes)})
