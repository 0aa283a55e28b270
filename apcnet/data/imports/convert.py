"""Converts a source to a folder to train on: recognises it, splits it, and writes images, masks and a list of classes.

    OUT/images/{train,val}/NAME.*     copies of the source's images; the source itself is never changed
    OUT/masks/{train,val}/NAME.png    the index of a class at each pixel, or 255
    OUT/classes.txt                   written last: without it the conversion is not complete
    OUT/examples.png                  twelve images with their masks, to see whether they fit
    OUT/import.json                   the source and the options; an import with the same ones goes on

Each file is written whole or not at all, and files that are there are kept.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from apcnet.data.classes import check_classes
from apcnet.data.files import image_size, read_mask
from apcnet.data.imports import coco, cvat, labelme, labelstudio, masks, sheet, yolo
from apcnet.data.imports.regions import Size
from apcnet.data.imports.source import Item, Source
from apcnet.data.imports.split import VAL_SHARE, choose_val, groups_by
from apcnet.data.layout import SUFFIXES, files_below
from apcnet.files import make_folder, read_json, remove_leftovers, replacing, write_json

Progress = Callable[[str, int, int], None]
READERS = (labelstudio, coco, labelme, cvat, yolo)  # in the order in which they are asked; mask images come last
KNOWN = "COCO, YOLO, LabelMe, CVAT, Label Studio, Roboflow, VOC or Cityscapes, or images with masks beside them"


@dataclass(frozen=True)
class Imported:
    """Tells what an import has taken its source for, and what it has written."""

    format: str
    classes: tuple[str, ...]
    splits: dict[str, int]  # the number of samples of each split
    notes: tuple[str, ...]
    written: int
    kept: int


def root_of(source: Path) -> Path:
    """Returns the folder of a source: of a file of annotations the nearest one above it that holds images."""
    if source.is_dir():
        return source
    beside = any(path.suffix.lower() in SUFFIXES for path in files_below(source.parent))
    return source.parent if beside else source.parent.parent


def recognise(source: Path) -> str | None:
    """Returns the kind of annotations in a folder or file, or None if there are none that can be imported."""
    root = root_of(source)
    for reader in READERS:
        if _files(reader, root, source):
            return reader.KIND
    return masks.KIND if source.is_dir() and masks.files(root).pairs else None


def convert(
    source: str | Path,
    out: str | Path,
    *,
    classes: str | Path | None = None,
    val_share: float = VAL_SHARE,
    seed: int = 0,
    groups: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Imported:
    """Converts a source to a folder for `apcnet.data.open("folder", …)`.

    Args:
        source: The folder, or the file of annotations in it.
        out: The folder to write, outside the source.
        classes: A file that lists the classes, and perhaps their colours; None takes what the source says.
        val_share: The share of val, if the source is not split.
        seed: Another seed gives another split.
        groups: A regular expression; names in which it matches the same text stay in one split.
        progress: Is called with what is done, and the numbers of finished and of all samples.

    Returns:
        What the source was taken for, and the numbers of files.
    """
    source, out = Path(source), Path(out)
    _check(source, out, val_share, classes)
    read = _read(source, None if classes is None else Path(classes), progress)
    names, palette = check_classes(tuple(read.classes), read.palette, str(source))
    items = _split(_with_unique_names(read, source), val_share, seed, groups, progress)
    options = {"source": str(source.resolve()), "classes": list(names), "val_share": val_share}
    options |= {"seed": seed, "groups": groups, "format": read.format}
    _claim(out, options)
    counts, written = _write(items, out, progress)
    sheet.write(out / "examples.png", items, counts, names, palette)
    lines = [f"{name} {red} {green} {blue}\n" for name, (red, green, blue) in zip(names, palette, strict=True)]
    with replacing(out / "classes.txt") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    splits = dict(Counter(item.split or "" for item in items))
    return Imported(read.format, names, splits, tuple(read.notes), written, len(items) - written)


def _check(source: Path, out: Path, val_share: float, classes: str | Path | None) -> None:
    if source.suffix.lower() in (".zip", ".gz", ".tar") and source.is_file():
        raise ValueError(f"source: expected a folder, got {source}; unpack it first, then import the folder")
    if not source.exists():
        raise FileNotFoundError(f"source: expected a folder or a file of annotations, got {source}: there is none")
    root = root_of(source).resolve()
    if root == out.resolve() or root in out.resolve().parents:
        raise ValueError(f"out: expected a folder outside the source, which is never changed, got {out}")
    if not 0 < val_share < 1:
        raise ValueError(f"val_share: expected a share between 0 and 1, got {val_share}")
    if classes is not None and not Path(classes).is_file():
        raise FileNotFoundError(f"classes: expected a file with one class on each line, got {classes}: there is none")


def _files(reader, root: Path, source: Path) -> list[Path]:
    found = reader.files(root)
    return found if source.is_dir() else [path for path in found if path == source]


def _read(source: Path, classes: Path | None, progress: Progress) -> Source:
    root = root_of(source)
    for reader in READERS:
        if files := _files(reader, root, source):
            read = reader.read(root, files)
            if classes is not None:
                raise ValueError(f"classes: expected none with {reader.KIND}, which names its classes, got {classes}")
            break
    else:
        pairing = masks.files(root)
        if not source.is_dir() or not pairing.pairs:
            raise ValueError(f"source: expected {KNOWN}, found nothing of these in {source}")
        read = masks.read(root, pairing, classes, lambda done, total: progress("reading masks", done, total))
    if not read.items:
        reason = f" ({'; '.join(read.notes)})" if read.notes else ""
        raise ValueError(f"source: expected images for {read.format} in {source}, found none{reason}")
    return read


def _with_unique_names(read: Source, source: Path) -> list[Item]:
    """Gives samples of one name and split their whole paths as names."""
    root = root_of(source)
    alike = Counter((item.name, item.split) for item in read.items)
    items = [
        item if alike[item.name, item.split] == 1 else item._replace(name=_whole_name(item.image, root))
        for item in read.items
    ]
    twice = [key for key, number in Counter((item.name, item.split) for item in items).items() if number > 1]
    if twice:
        raise ValueError(f"source: expected one annotation for each image, got several for {twice[0][0]}")
    return sorted(items, key=lambda item: (item.split or "", item.name))


def _whole_name(image: Path, root: Path) -> str:
    return image.relative_to(root).as_posix().replace(".", "_")


def _split(items: list[Item], share: float, seed: int, groups: str | None, progress: Progress) -> list[Item]:
    """Keeps the source's train and val, or chooses val among all samples that are not for test."""
    splits = {item.split for item in items}
    if {"train", "val"} <= splits:
        return [item if item.split else item._replace(split="train") for item in items]
    pool = [item for item in items if item.split != "test"] or items
    if len(pool) < 2:
        raise ValueError(f"source: expected two images or more, one to train on and one to test with, got {len(pool)}")
    present = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for item, labels in zip(pool, threads.map(_present, pool), strict=True):
            present[item.name] = labels
            progress("splitting", len(present), len(pool))
    names = [item.name for item in pool]
    val = choose_val(names, present, share, seed, groups_by(groups, names) if groups else None)
    if not val or len(val) == len(names):
        raise ValueError(f"groups: expected two groups or more, but {groups!r} puts all images into one")
    chosen = {id(item): "val" if item.name in val else "train" for item in pool}
    return [item._replace(split=chosen.get(id(item), item.split)) for item in items]


def _present(item: Item) -> set[int]:
    return set(np.unique(item.mask(image_size(item.image))).tolist()) - {255}


def _claim(out: Path, options: dict) -> None:
    """Makes the folder, or checks that it holds the same import."""
    make_folder(out, "out")
    path = out / "import.json"
    if not path.exists():
        if any(out.iterdir()):
            raise ValueError(f"out: expected a new or empty folder, got {out}, which holds other files")
        write_json(path, options)
        return
    before = read_json(path)
    if changed := [name for name in options if before.get(name) != options[name]]:
        raise ValueError(
            f"out: {out} holds another import: {changed[0]} was {before.get(changed[0])!r} and is "
            f"{options[changed[0]]!r}; name another folder"
        )


def _write(items: Sequence[Item], out: Path, progress: Progress) -> tuple[list[Counter], int]:
    """Writes images and masks; returns the pixels of each label in each mask, and the number of new masks."""
    for folder in {place.parent for item in items for place in _places(item, out)}:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    counts, written = [], 0
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes and encodes without holding the interpreter's lock
    try:
        for count, new in pool.map(lambda item: _write_one(item, *_places(item, out)), items):
            counts.append(count)
            written += new
            progress("importing", len(counts), len(items))
    finally:
        pool.shutdown(cancel_futures=True)
    return counts, written


def _places(item: Item, out: Path) -> tuple[Path, Path]:
    assert item.split is not None  # _split gives one to each
    name = Path(item.split, item.name)
    return out / "images" / name.with_name(name.name + item.image.suffix), out / "masks" / f"{name}.png"


def _write_one(item: Item, image: Path, mask: Path) -> tuple[Counter, bool]:
    """Writes an image and its mask, unless the mask is there: it is written last."""
    new = not mask.exists()
    if new:
        size: Size = image_size(item.image)
        labels = item.mask(size)
        if labels.shape != size:
            given = f"{labels.shape[1]}×{labels.shape[0]}"
            raise ValueError(f"{item.image}: expected a mask of {size[1]}×{size[0]}, got one of {given}")
        with replacing(image) as temporary:
            shutil.copyfile(item.image, temporary)
        with replacing(mask) as temporary:
            Image.fromarray(labels.astype(np.uint8)).save(temporary, format="PNG")
    else:
        labels = read_mask(mask).numpy()
    values, pixels = np.unique(labels, return_counts=True)
    return Counter(dict(zip(values.tolist(), pixels.tolist(), strict=True))), new
