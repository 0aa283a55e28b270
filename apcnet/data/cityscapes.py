"""Cityscapes: 2975 + 500 street scenes of 2048×1024, 19 classes.

    ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png

The download has *_gtFine_labelIds.png in their place; `apcnet prepare cityscapes ROOT` writes those that are read here.
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.classes import read_classes
from apcnet.data.files import Files
from apcnet.data.layout import find_root, images_in, pair_up

PLACES = ("cityscapes",)
CLASSES, PALETTE = read_classes(
    """
    road 128 64 128
    sidewalk 244 35 232
    building 70 70 70
    wall 102 102 156
    fence 190 153 153
    pole 153 153 153
    traffic light 250 170 30
    traffic sign 220 220 0
    vegetation 107 142 35
    terrain 152 251 152
    sky 70 130 180
    person 220 20 60
    rider 255 0 0
    car 0 0 142
    truck 0 0 70
    bus 0 60 100
    train 0 80 100
    motorcycle 0 0 230
    bicycle 119 11 32
    """,
    "cityscapes",
)


def open_cityscapes(root: str | Path | None, split: str = "val") -> Files:
    """The train or val split; masks hold labelTrainIds, 0 to 18 and 255."""
    check_choice(split, "split", ("train", "val"))
    root = find_root(root, "leftImg8bit", PLACES)
    image_folder, mask_folder = root / "leftImg8bit" / split, root / "gtFine" / split
    images = images_in(image_folder, ending="_leftImg8bit")
    masks = images_in(mask_folder, ending="_gtFine_labelTrainIds")
    unprepared = images_in(mask_folder, ending="_gtFine_labelIds").keys() & images.keys() - masks.keys()
    hint = f"; `apcnet prepare cityscapes {root}` makes them from their labelIds" if unprepared else ""
    wanted = f"{mask_folder}/*_gtFine_labelTrainIds.png"
    return Files(pair_up(images, images, masks, image_folder, wanted, hint), CLASSES, PALETTE)
