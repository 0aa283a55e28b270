"""Reads ADE20K as in the scene parsing challenge of 2016: 20210 + 2000 scenes, 150 classes.

ROOT/images/{training,validation}/*.jpg
ROOT/annotations/{training,validation}/*.png       0 where there is no class, i + 1 for class i
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes, reduced_labels
from apcnet.data.layout import Listing, find_root, images_in

PLACES = ("ADEChallengeData2016", "ade/ADEChallengeData2016")
FOLDERS = {"train": "training", "val": "validation"}
CLASSES, PALETTE = read_classes(LISTS / "ade20k.txt")


def list_ade20k(root: str | Path | None, split: str = "val") -> Listing:
    """Lists the train or val split; pixels without a class are ignored."""
    check_choice(split, "split", FOLDERS)
    root = find_root(root, "images", PLACES)
    image_folder, mask_folder = root / "images" / FOLDERS[split], root / "annotations" / FOLDERS[split]
    images, masks = images_in(image_folder), images_in(mask_folder)
    names, labels = images.keys() | masks.keys(), reduced_labels(len(CLASSES))
    return Listing(names, images, masks, image_folder, mask_folder, CLASSES, PALETTE, labels)
