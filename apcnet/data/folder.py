"""Reads a data set of your own: images, masks with class indices, and the names of the classes.

    ROOT/images/{train,val}/*            or   ROOT/images/*, ROOT/masks/* and lists of names, ROOT/{train,val}.txt
    ROOT/masks/{train,val}/*.png
    ROOT/classes.txt                     one class on each line, with or without its colour: road 128 64 128

A mask has the name of its image, or that name with an ending such as _mask. Each of its pixels holds the index of a
class, 0 for the first, or 255 to be ignored. Other names of folders are taken too, and one folder for both kinds of
files (`pairing`). Without any split, every fifth image or so is in val, chosen by its name alone. With two classes and
masks of 0 and 255, 255 is the second class.

    data = apcnet.data.open("folder", "my data", split="train")
    print(len(data), data.classes)
    image, mask, name = data[0]
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from apcnet.data.classes import Color, check_classes, label_table, read_classes
from apcnet.data.files import read_mask
from apcnet.data.imports.split import choose_val
from apcnet.data.layout import Listing, find_root, images_in, names_in
from apcnet.data.pairing import MASK_ENDING, Named, find_pairs

ALL = "all"  # the split of all images
CHOSEN = ("train", "val")  # the splits that are made of all images if there are none
TELLING = 64  # masks of 0 and 255 to see before 255 counts as a class


def list_folder(
    root: str | Path | None,
    split: str | None = "val",
    classes: Sequence[str] | None = None,
    palette: Sequence[tuple[int, int, int]] | None = None,
    labels: Mapping[int, int] | None = None,
) -> Listing:
    """Lists the samples of a folder.

    Args:
        root: The folder that holds images and masks.
        split: The split by its name: the images in images/SPLIT, or those that SPLIT.txt lists; "all" or None for all
            images.
        classes: The names of the classes; None to read them from classes.txt.
        palette: A colour for each class; None for those of classes.txt, or VOC's.
        labels: Maps the values stored in masks to class indices or 255, as {0: 0, 255: 1} does for masks of 0 and
            255; None if masks store class indices, or if there are two classes and masks hold 0 and 255 alone.
    """
    split = None if split == ALL else split
    usual = root is not None and all((Path(root) / folder).is_dir() for folder in ("images", "masks"))
    if root is not None and not usual and Path(root).is_dir() and (found := find_pairs(Path(root))).pairs:
        names, colors = _classes(Path(root), classes, palette)
        images, masks = found.images, found.masks
        folders = {images[name].parent for name in found.pairs}  # pictures elsewhere are no samples
        chosen = _of_split(Path(root), [name for name in images if images[name].parent in folders], split)
        pictures = {name.name: images[name] for name in chosen}
        drawn = {name.name: masks[name] for name in chosen if name in masks}
        table = _labels(len(names), labels, masks.values())
        return Listing(pictures, pictures, drawn, Path(root), Path(root), names, colors, table, _complete(root))
    if root is not None and not usual and Path(root).is_dir() and (kind := _kind_of(Path(root))):
        raise ValueError(f"root: {root} holds {kind}, which have to be imported first; type: {import_command(root)}")
    root = find_root(root, "images")
    names, colors = _classes(root, classes, palette)
    image_folder, mask_folder, listed = root / "images", root / "masks", None
    if split is not None:
        listed = root / f"{split}.txt" if (root / f"{split}.txt").is_file() else None
        by_folder = (image_folder / split).is_dir()
        if by_folder and listed:
            raise ValueError(f"{root}: has both a folder images/{split} and a list {split}.txt; keep one of them")
        if by_folder:
            image_folder, mask_folder = image_folder / split, mask_folder / split
        elif not listed:
            return _chosen(root, split, names, colors, labels)
    images, masks = images_in(image_folder), _masks_of(mask_folder, image_folder)
    wanted = names_in(listed) if listed else images.keys() | masks.keys()
    table = _labels(len(names), labels, _all_masks(root))
    return Listing(wanted, images, masks, image_folder, mask_folder, names, colors, table, _complete(root))


def import_command(root: str | Path) -> str:
    """Returns the command that converts a folder to one that can be trained on."""
    place = Path(root)
    name = f"{place.resolve().name}-imported"
    out = place.with_name(name) if place.name not in ("", "..") else place / ".." / name
    return shlex.join(["apcnet", "import", str(root), str(out)])


def _complete(root: str | Path) -> str:
    """Returns a hint for samples that lack a file."""
    return f"; add it, or let `{import_command(root)}` take those that have both"


def _kind_of(root: Path) -> str | None:
    """Returns the kind of annotations that can be imported from a folder."""
    from apcnet.data.imports.convert import recognise  # which imports this package

    return recognise(root)


def _classes(
    root: Path, classes: Sequence[str] | None, palette: Sequence[Color] | None
) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    if classes is not None:
        return check_classes(classes, palette, "classes")
    path = root / "classes.txt"
    if not path.is_file():
        if (root / "import.json").is_file():
            raise FileNotFoundError(f"classes: {root} holds an import that was stopped; run `apcnet import` again")
        raise FileNotFoundError(
            f"classes: expected names in {path}, but there is no such file; write one class on each line, let "
            f"`{import_command(root)}` find them, or give classes=(…)"
        )
    names, listed = read_classes(path)
    return check_classes(names, palette or listed, "palette")


def _of_split(root: Path, names: Sequence[Named], split: str | None) -> list[Named]:
    """Returns the names of a split that `pairing` has found, or chooses train and val if it has found none."""
    splits = {name.split for name in names} - {None}
    if split is None or split in splits:
        return [name for name in names if split is None or name.split == split]
    if split not in CHOSEN or splits:
        raise FileNotFoundError(_no_split(root, split, sorted(filter(None, splits))))
    val = choose_val([name.name for name in names])
    return [name for name in names if (name.name in val) == (split == "val")]


def _chosen(root: Path, split: str, classes, palette, labels: Mapping[int, int] | None) -> Listing:
    """Lists train or val, chosen among all images of a folder without splits."""
    found = _splits(root)
    if split not in CHOSEN or set(found) & set(CHOSEN):
        raise FileNotFoundError(_no_split(root, split, found))
    images, masks = images_in(root / "images"), _masks_of(root / "masks", root / "images")
    names = images.keys() | masks.keys()
    val = choose_val(sorted(images.keys() & masks.keys())) if len(images.keys() & masks.keys()) > 1 else set()
    chosen = [name for name in names if (name in val) == (split == "val")]
    if not chosen:
        raise FileNotFoundError(f"split: expected two images or more with masks in {root}, for train and val")
    table = _labels(len(classes), labels, _all_masks(root))
    inside = {name: path for name, path in masks.items() if (name in val) == (split == "val")}
    return Listing(chosen, images, inside, root / "images", root / "masks", classes, palette, table, _complete(root))


def _no_split(root: Path, split: str, found: Sequence[str]) -> str:
    flags = {"train": "--split", "val": "--val-split"}
    others = [name for name in found if name not in CHOSEN]
    hint = f"add {flags[split]} {others[0]}, or " if split in flags and others else ""
    made = f"let `{import_command(root)}` make them" if split in flags else f"or type {ALL} for all images"
    return (
        f"split: expected a folder images/{split} or a list {split}.txt in {root}, which has "
        f"{', '.join(found) or 'no splits'}; {hint}{made}"
    )


def _splits(root: Path) -> list[str]:
    folders = {path.name for path in (root / "images").iterdir() if path.is_dir()}
    lists = {path.stem for path in root.glob("*.txt")} - {"classes"}
    return sorted(folders | lists)


def _masks_of(folder: Path, image_folder: Path) -> dict[str, Path]:
    """Finds the masks in a folder, by the names of their images: without an ending that all of them share."""
    masks = images_in(folder)
    matches = {name: MASK_ENDING.fullmatch(name) for name in masks}
    if not masks or not all(matches.values()) or masks.keys() & images_in(image_folder).keys():
        return masks
    return {match[1]: masks[name] for name, match in matches.items() if match}


def _all_masks(root: Path) -> Iterable[Path]:
    return images_in(root / "masks").values() if (root / "masks").is_dir() else ()


def _labels(count: int, labels: Mapping[int, int] | None, masks: Iterable[Path]) -> np.ndarray:
    """Makes the table of labels, where two classes and masks of 0 and 255 alone mean that 255 is the second class."""
    if labels is None and count == 2 and _are_binary(sorted(masks)):
        labels = {0: 0, 255: 1}
    return label_table(count, labels)


def _are_binary(masks: Sequence[Path]) -> bool:
    """Tells whether masks hold 0 and 255 alone, from the first that tell, spread evenly over all."""
    telling = 0
    for start in range(step := max(1, len(masks) // TELLING)):
        for path in masks[start::step]:
            try:
                values = set(np.unique(read_mask(path).numpy()).tolist())
            except (ValueError, OSError):  # `check` and training name it
                continue
            if values - {0, 255}:
                return False
            telling += 255 in values
            if telling >= TELLING:
                return True
    return telling > 0
