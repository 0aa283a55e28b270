"""Pascal Context: 4998 + 5105 photographs of VOC 2010 labelled to the last corner, 59 classes and background.

    ROOT/JPEGImages/*.jpg
    ROOT/SegmentationClassContext/*.png      0: background, the classes in alphabetical order from 1
    ROOT/ImageSets/SegmentationContext/{train,val}.txt

`apcnet prepare pascal_context ROOT` makes the masks and the lists from trainval_merged.json.
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes, reduced_labels
from apcnet.data.layout import Listing, find_root, images_in, names_in

PLACES = ("VOC2010", "VOCdevkit/VOC2010")
CLASSES, PALETTE = read_classes(LISTS / "pascal_context.txt")


def list_pascal_context(root: str | Path | None, split: str = "val", classes: int = 60) -> Listing:
    """The train or val split.

    Args:
        root: the folder that holds JPEGImages.
        split: train or val.
        classes: 60 with background as a class, as in the paper's comparison and mmsegmentation's pascal_context;
            59 without, what is background is ignored then (pascal_context_59).
    """
    check_choice(split, "split", ("train", "val"))
    if classes not in (60, 59):
        raise ValueError(f"classes: expected 60, with background, or 59, without, got {classes!r}")
    root = find_root(root, "JPEGImages", PLACES)
    image_folder, mask_folder = root / "JPEGImages", root / "SegmentationClassContext"
    listed = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    hint = f"; `apcnet prepare pascal_context {root}` makes it"
    for place in (listed, mask_folder):
        if not place.exists():
            raise FileNotFoundError(f"there is no {place}{hint}")
    labels = None if classes == 60 else reduced_labels(59)
    files = names_in(listed), images_in(image_folder), images_in(mask_folder), image_folder, mask_folder
    return Listing(*files, CLASSES[-classes:], PALETTE[-classes:], labels, hint)
