"""Cityscapes: 2975 + 500 street scenes of 2048×1024, 19 classes.

    ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png

The download has *_gtFine_labelIds.png in their place; `apcnet prepare cityscapes ROOT` writes those that are read here.
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes
from apcnet.data.layout import Listing, find_root, images_in

PLACES = ("cityscapes",)
CLASSES, PALETTE = read_classes(LISTS / "cityscapes.txt")


def list_cityscapes(root: str | Path | None, split: str = "val") -> Listing:
    """The train or val split; masks hold labelTrainIds, 0 to 18 and 255."""
    check_choice(split, "split", ("train", "val"))
    root = find_root(root, "leftImg8bit", PLACES)
    image_folder, mask_folder = root / "leftImg8bit" / split, root / "gtFine" / split
    images = images_in(image_folder, ending="_leftImg8bit")
    masks = images_in(mask_folder, ending="_gtFine_labelTrainIds")
    unprepared = images_in(mask_folder, ending="_gtFine_labelIds").keys() & images.keys() - masks.keys()
    hint = f"; `apcnet prepare cityscapes {root}` makes them from their labelIds" if unprepared else ""
    wanted = f"{mask_folder}/*_gtFine_labelTrainIds.png"
    return Listing(images, images, masks, image_folder, wanted, CLASSES, PALETTE, hint=hint)
