"""A data set of one's own: a folder of images, a folder of masks and the names of the classes.

    ROOT/images/{train,val}/*            or   ROOT/images/*, ROOT/masks/* and lists of names, ROOT/{train,val}.txt
    ROOT/masks/{train,val}/*.png
    ROOT/classes.txt                     a class a line, its colour after it if you like: road 128 64 128

A mask has the name of its image and holds at each pixel the index of a class, 0 for the first, or 255 where nothing is
to be learnt. It takes three lines:

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
    """The data set in a folder.

    Args:
        root: the folder that holds images and masks.
        split: of any name: the images of images/SPLIT, or those that SPLIT.txt lists. None: all there are.
        classes: their names; None: as classes.txt says.
        palette: a colour for each; None: as classes.txt says, or VOC's colours.
        labels: what each value in the masks stands for, the index of a class or 255; None: for themselves. Masks of
            0 and 255, say, are {0: 0, 255: 1}.
    """
    root = find_root(root, "images")
    if classes is not None:
        classes, palette = check_classes(classes, palette, "classes")
    else:
        if not (root / "classes.txt").is_file():
            raise FileNotFoundError(f"there is no classes.txt in {root}: list the classes there, or give classes=(…)")
        classes, listed_palette = read_classes(root / "classes.txt")
        classes, palette = check_classes(classes, palette or listed_palette, "palette")
    image_folder, mask_folder, listed = root / "images", root / "masks", root / f"{split}.txt"
    by_folder = split is not None and (image_folder / split).is_dir()
    by_list = split is not None and listed.is_file()
    if by_folder and by_list:
        raise ValueError(f"{root}: has both a folder images/{split} and a list {split}.txt; keep one of them")
    if split is not None and not (by_folder or by_list):
        raise FileNotFoundError(
            f"split: there is neither a folder images/{split} nor a list {split}.txt in {root}; it has "
            f"{_splits(root) or 'no splits'}; None takes all images"
        )
    if by_folder:
        image_folder, mask_folder = image_folder / split, mask_folder / split
    images, masks = images_in(image_folder), images_in(mask_folder)
    names = names_in(listed) if by_list else images.keys() | masks.keys()
    table = label_table(len(classes), labels)
    return Listing(names, images, masks, image_folder, mask_folder, classes, palette, table)


def _splits(root: Path) -> str:
    folders = {path.name for path in (root / "images").iterdir() if path.is_dir()}
    lists = {path.stem for path in root.glob("*.txt")} - {"classes"}
    return ", ".join(sorted(folders | lists))
