"""Reads a data set of your own: a folder of images, a folder of masks and the names of the classes.

    ROOT/images/{train,val}/*            or   ROOT/images/*, ROOT/masks/* and lists of names, ROOT/{train,val}.txt
    ROOT/masks/{train,val}/*.png
    ROOT/classes.txt                     one class on each line, with or without its colour: road 128 64 128

A mask has the name of its image. Each of its pixels holds the index of a class, 0 for the first, or 255 to be ignored:

    data = apcnet.data.open("folder", "my data", split="train")
    print(len(data), data.classes)
    image, mask, name = data[0]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from apcnet.data.classes import check_classes, label_table, read_classes
from apcnet.data.layout import Listing, find_root, images_in, names_in


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
        split: The split by its name: the images in images/SPLIT, or those that SPLIT.txt lists; None for all images.
        classes: The names of the classes; None to read them from classes.txt.
        palette: A colour for each class; None for those of classes.txt, or VOC's.
        labels: Maps the values stored in masks to class indices or 255, as {0: 0, 255: 1} does for masks of 0 and
            255; None if masks store class indices.
    """
    root = find_root(root, "images")
    if classes is not None:
        classes, palette = check_classes(classes, palette, "classes")
    else:
        if not (root / "classes.txt").is_file():
            raise FileNotFoundError(
                f"classes: expected names in {root / 'classes.txt'}, but there is no such file; "
                "write one class on each line, or give classes=(…)"
            )
        classes, listed_palette = read_classes(root / "classes.txt")
        classes, palette = check_classes(classes, palette or listed_palette, "palette")
    image_folder, mask_folder, listed = root / "images", root / "masks", None
    if split is not None:
        listed = root / f"{split}.txt" if (root / f"{split}.txt").is_file() else None
        by_folder = (image_folder / split).is_dir()
        if by_folder and listed:
            raise ValueError(f"{root}: has both a folder images/{split} and a list {split}.txt; keep one of them")
        if not by_folder and not listed:
            raise FileNotFoundError(
                f"split: expected a folder images/{split} or a list {split}.txt in {root}, which has "
                f"{_splits(root) or 'no splits'}; None takes all images"
            )
        if by_folder:
            image_folder, mask_folder = image_folder / split, mask_folder / split
    images, masks = images_in(image_folder), images_in(mask_folder)
    names = names_in(listed) if listed else images.keys() | masks.keys()
    table = label_table(len(classes), labels)
    return Listing(names, images, masks, image_folder, mask_folder, classes, palette, table)


def _splits(root: Path) -> str:
    folders = {path.name for path in (root / "images").iterdir() if path.is_dir()}
    lists = {path.stem for path in root.glob("*.txt")} - {"classes"}
    return ", ".join(sorted(folders | lists))
