"""Finds out how the pixels of mask images stand for classes, from all values in them and a list of classes.

Masks hold grey values or colours. Values are class indices, or other numbers that stand for the classes in order, or
the two values 0 and 255. Colours are those of the list of classes, or the colours found. JPEG changes the values that
it stores: each pixel then counts as the nearest value that occurs often.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from apcnet.data.classes import MAX_CLASSES, Color, voc_colors
from apcnet.data.files import is_lossy
from apcnet.data.imports.source import BACKGROUND
from apcnet.data.sample import IGNORE

BORDER = 224 << 16 | 224 << 8 | 192  # the colour of ignored pixels in PASCAL VOC
RARE = 2e-3  # of all pixels of JPEG masks: values that occur less often are noise
FLAT = 24  # the largest difference between neighbouring pixels of one class in JPEG masks
SHARP, CLEAR = 0.9, 0.01  # the shares of pixels with the values of all classes, and of each, in smoothed masks
MANY = 1 << 12  # more different colours than a mask without losses has


@dataclass
class Legend:
    """Holds what a source says about its classes; all of it may be missing."""

    names: list[str] | None = None
    colors: list[Color] | None = None
    values: list[int] | None = None  # the stored value of each class


@dataclass
class Encoding:
    """Maps stored values to labels: `table` from grey values, or from colours as 24-bit numbers."""

    classes: list[str]
    palette: list[Color] | None
    table: dict[int, int]
    colored: bool
    lossy: bool
    words: str  # completes "masks …"
    notes: list[str] = field(default_factory=list)

    def labels(self, path: Path) -> np.ndarray:
        """Reads a mask image as labels (H, W)."""
        stored = read_stored(path, self.colored)
        values = stored if stored.ndim == 2 else packed(stored)
        if self.colored and stored.ndim == 2:
            values = values * 0x010101
        elif not self.colored and stored.ndim == 3:
            values = values & 255
        known = np.array(sorted(self.table))
        found, places = np.unique(values, return_inverse=True)
        if self.lossy:
            nearest = known[_distances(found, known, self.colored).argmin(1)]
        else:
            nearest = found
            unknown = [value for value in found.tolist() if value not in self.table]
            if unknown:
                raise ValueError(f"{path}: expected the values of the other masks, got {self._shown(unknown[0])}")
        labels = np.array([self.table[int(value)] for value in nearest], np.uint8)
        return labels[places.reshape(values.shape)]

    def _shown(self, value: int) -> str:
        return str(unpacked(value)) if self.colored else str(value)


def read_stored(path: Path, by_color: bool = False) -> np.ndarray:
    """Reads the values of a mask image: (H, W), of a palette its indices, or (H, W, 3) colours, also of its palette."""
    with Image.open(path) as image:
        if image.mode in ("1", "L") or image.mode.startswith("I") or (image.mode == "P" and not by_color):
            return np.array(image).astype(np.int64)
        if image.mode in ("LA", "PA"):
            return np.array(image.getchannel(0)).astype(np.int64)
        return np.array(image.convert("RGB")).astype(np.int64)


def packed(colors: np.ndarray) -> np.ndarray:
    """Packs colours (…, 3) into 24-bit numbers, red highest."""
    return colors[..., 0] << 16 | colors[..., 1] << 8 | colors[..., 2]


def unpacked(value: int) -> Color:
    return value >> 16 & 255, value >> 8 & 255, value & 255


def palette_of(path: Path) -> list[Color] | None:
    """Returns the colours of a palette image, or None of another one."""
    with Image.open(path) as image:
        if image.mode != "P" or image.palette is None:
            return None
        parts = image.getpalette() or []
    return [(r, g, b) for r, g, b in zip(parts[::3], parts[1::3], parts[2::3], strict=False)]


def count(path: Path, by_color: bool = False) -> tuple[Counter, bool, bool]:
    """Counts the pixels of each value in a mask, colours as 24-bit numbers; tells if it is coloured, and if lossy."""
    stored = read_stored(path, by_color)
    with Image.open(path) as image:
        lossy = is_lossy(image)
    if stored.ndim == 3:
        grey = bool((stored == stored[..., :1]).all())
        spread = int(np.ptp(stored, axis=2).max())
        if grey or (lossy and spread <= 24):
            stored = stored[..., 0]
    numbers = stored if stored.ndim == 2 else packed(stored)
    if lossy and (inside := _is_flat(stored)).any():  # between two classes JPEG mixes their values
        numbers = numbers[inside]
    values, pixels = np.unique(numbers, return_counts=True)
    return Counter(dict(zip(values.tolist(), pixels.tolist(), strict=True))), stored.ndim == 3, lossy


def infer(
    paths: Sequence[Path], legend: Legend, counted: Iterable[tuple[Counter, bool, bool]], source: str
) -> Encoding:
    """Infers the encoding of all masks together from their counts (`count`) and the list of classes."""
    grey, colored, lossy = Counter(), Counter(), False
    for counts, has_colors, changed in counted:
        (colored if has_colors else grey).update(counts)
        lossy |= changed
    if colored:
        for value, pixels in grey.items():  # masks without colour among coloured ones: black, for example
            colored[value * 0x010101] += pixels
        encoding = _by_color(_frequent(colored, True) if lossy else colored, legend, lossy, source)
    else:
        encoding = _by_value(_frequent(grey, False) if lossy else grey, legend, lossy, source)
        if encoding.palette is None and legend.colors is None:
            encoding.palette = _shared_palette(paths, encoding)
    if lossy:
        encoding.notes.append(
            "masks are JPEG, which changes labels at borders: each pixel became the nearest value; masks saved as PNG "
            "would be exact"
        )
    return encoding


def _is_flat(stored: np.ndarray) -> np.ndarray:
    """Marks the pixels whose neighbours have nearly the same values."""
    planes = stored.reshape(*stored.shape[:2], -1)
    padded = np.pad(planes, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = planes.shape[:2]
    around = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    spread = np.maximum.reduce(around) - np.minimum.reduce(around)
    return (spread <= FLAT).all(-1)


def _frequent(counts: Counter, colored: bool) -> Counter:
    """Keeps the values of JPEG masks that are no noise: the most frequent one, with all near it, and so on."""
    values, pixels = np.array(list(counts)), np.array(list(counts.values()))
    near = 64 if colored else (1 if values.max() < 32 else 16)
    kept, total = Counter(), pixels.sum()
    while pixels.any() and len(kept) <= MAX_CLASSES:
        peak = values[pixels.argmax()]
        close = _distances(values, peak[None], colored)[:, 0] < near
        if pixels[close].sum() >= RARE * total:
            kept[int(peak)] = int(pixels[close].sum())
        pixels[close] = 0
    return kept


def _distances(values: np.ndarray, known: np.ndarray, colored: bool) -> np.ndarray:
    if not colored:
        return np.abs(values[:, None] - known[None])
    parts = [np.stack([each >> 16, each >> 8 & 255, each & 255], -1) for each in (values, known)]
    return np.linalg.norm(parts[0][:, None] - parts[1][None], axis=2)


def _by_value(counts: Counter, legend: Legend, lossy: bool, source: str) -> Encoding:
    values, names = sorted(counts), legend.names
    ignored = {255: IGNORE} if 255 in values or not lossy else {}  # never the nearest of values that do not occur
    if len(values) > MAX_CLASSES + 1 or not 0 <= values[0] <= values[-1] < 1 << 16:
        if (peaks := _peaks_of(counts, names)) is not None:
            return _smoothed(_by_value(peaks, legend, True, source))
        raise ValueError(f"{source}: expected masks of at most {MAX_CLASSES} values, found {len(values)}")

    def made(classes: Sequence[str], table: dict[int, int], words: str, *notes: str) -> Encoding:
        palette = legend.colors if legend.colors and len(legend.colors) == len(classes) else None
        return Encoding(list(classes), palette, table, False, lossy, words, list(notes))

    if legend.values is not None and names is not None:
        table = ignored | {value: i for i, value in enumerate(legend.values)}
        unknown = [value for value in values if value not in table and not lossy]
        if unknown:
            raise ValueError(f"{source}: expected the values of its list of classes, found {unknown[0]} in masks")
        return made(names, table, "the values of its list of classes")
    greys = {color[0]: i for i, color in enumerate(legend.colors or ()) if len(set(color)) == 1}
    if names is not None and greys.keys() >= set(values) and len(greys) == len(names):
        return made(names, greys, "the grey colours of its list of classes")
    if set(values) <= {0, 255} and 255 in values and (names is None or len(names) <= 2):
        classes = names if names and len(names) == 2 else [BACKGROUND, *(names or ["object"])]
        return made(classes, {0: 0, 255: 1}, "0 and 255")
    labelled = [value for value in values if value != IGNORE]
    if names is not None:
        if not labelled or labelled[-1] < len(names):
            return made(names, ignored | {i: i for i in range(len(names))}, "class indices")
        if len(names) == len(values):
            return made(names, {value: i for i, value in enumerate(values)}, f"{len(values)} values, in order")
        if len(names) == len(labelled):
            table = ignored | {value: i for i, value in enumerate(labelled)}
            return made(names, table, f"{len(labelled)} values, in order; 255 is ignored")
        if len(names) + 1 == len(labelled) and labelled[0] == 0:
            table = ignored | {value: i for i, value in enumerate(labelled)}
            return made([BACKGROUND, *names], table, "values with 0 for no class", "0 became the class background")
        if not lossy and (peaks := _peaks_of(counts, names)) is not None:
            return _smoothed(_by_value(peaks, legend, True, source))
        raise ValueError(
            f"{source}: expected {len(names)} values, as many as its list of classes, found {len(values)} in masks: "
            f"{', '.join(map(str, values[:12]))}; give a list of them: --classes FILE"
        )
    if set(labelled) == {0, 1}:
        return made([BACKGROUND, "object"], ignored | {0: 0, 1: 1}, "0 and 1", _rename(labelled))
    few_missing = not labelled or labelled[-1] < min(len(labelled) + 8, 200)
    if few_missing:
        classes = ["class 0"] if not labelled else [f"class {i}" for i in range(labelled[-1] + 1)]
        table = ignored | {i: i for i in range(len(classes))}
        return made(classes, table, "class indices", _rename(classes))
    classes = [f"value {value}" for value in values]
    return made(classes, {value: i for i, value in enumerate(values)}, f"{len(values)} values", _rename(classes))


def _peaks_of(counts: Counter, names: Sequence[str] | None) -> Counter | None:
    """Returns the values of the classes in masks that were smoothed at borders, or None if they are not clear."""
    total = sum(counts.values())
    peaks = Counter({value: counts[value] for value in _frequent(counts, False)})
    clear = sum(pixels >= CLEAR * total for pixels in peaks.values())
    peaks = Counter(dict(peaks.most_common(clear if names is None else len(names))))
    return peaks if 2 <= len(peaks) <= clear and sum(peaks.values()) >= SHARP * total else None


def _smoothed(encoding: Encoding) -> Encoding:
    encoding.notes.append("masks hold values between those of the classes: each pixel became the nearest class")
    return encoding


def _by_color(counts: Counter, legend: Legend, lossy: bool, source: str) -> Encoding:
    found = sorted(counts)
    if len(found) > (MAX_CLASSES if not lossy else MANY):
        raise ValueError(
            f"{source}: expected masks of at most {MAX_CLASSES} colours, found {len(found)}: they are photographs, or "
            "were smoothed"
        )
    names, colors = legend.names, legend.colors
    if (
        names is not None
        and colors is None
        and set(map(unpacked, found)) <= {*voc_colors(len(names)), unpacked(BORDER)}
    ):
        colors = list(voc_colors(len(names)))
    if names is not None and colors is not None:
        table = {red << 16 | green << 8 | blue: i for i, (red, green, blue) in enumerate(colors)}
        if BORDER in found or not lossy:
            table.setdefault(BORDER, IGNORE)
        unknown = [value for value in found if value not in table]
        notes = []
        if unknown and not lossy:
            if table.get(0) is not None or unknown != [0]:
                shown = ", ".join(str(unpacked(value)) for value in unknown[:3])
                raise ValueError(
                    f"{source}: expected the colours of its list of classes, found {shown} in masks; add a line "
                    "with a name and that colour to the list, or give another list: --classes FILE"
                )
            table[0], notes = IGNORE, ["black belongs to no class of the list: it is ignored"]
        return Encoding(list(names), list(colors), table, True, lossy, "the colours of its list of classes", notes)
    if names is not None:
        shown = ", ".join(str(unpacked(value)) for value in found[:4])
        raise ValueError(
            f"{source}: expected the colours of {len(names)} classes in its list, as in `road 128 64 128`, found none; "
            f"masks hold {shown}; write them to a file and add --classes FILE"
        )
    voc = {color: i for i, color in enumerate(voc_colors(256))}
    labelled = [value for value in found if value != BORDER]
    if all(unpacked(value) in voc for value in labelled):
        labelled.sort(key=lambda value: voc[unpacked(value)])
    palette = [unpacked(value) for value in labelled]
    classes = [BACKGROUND if color == (0, 0, 0) else "colour {} {} {}".format(*color) for color in palette]
    table = {value: i for i, value in enumerate(labelled)} | ({BORDER: IGNORE} if BORDER in found else {})
    return Encoding(classes, palette, table, True, lossy, f"{len(palette)} colours", [_rename(classes)])


def _shared_palette(paths: Sequence[Path], encoding: Encoding) -> list[Color] | None:
    """Returns the colours of the classes in the palette of the masks, if they have one with different colours."""
    palette = palette_of(paths[0])
    stored = {label: value for value, label in encoding.table.items() if label != IGNORE}
    if palette is None or len(palette) <= max(stored.values()):
        return None
    colors = [palette[stored[label]] for label in range(len(encoding.classes))]
    return colors if len(set(colors)) == len(colors) else None


def _rename(classes: Sequence[str]) -> str:
    return f"the source names no classes: edit the {len(classes)} names in classes.txt, one a line"
