"""Reads Cityscapes: 2975 + 500 street scenes of 2048×1024, 19 classes.

    ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png

The download has *_gtFine_labelIds.png instead, with 34 labels, of which 19 are classes and the others are ignored;
`apcnet prepare cityscapes ROOT` writes the files that are read here.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, UNKNOWN, label_table, read_classes
from apcnet.data.files import read_mask
from apcnet.data.layout import Job, Listing, find_root, images_in
from apcnet.data.sample import IGNORE

PLACES = ("cityscapes",)
CLASSES, PALETTE = read_classes(LISTS / "cityscapes.txt")
STORED, PREPARED = "_gtFine_labelIds", "_gtFine_labelTrainIds"
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # labelIds in the order of the classes
LABELS = label_table(len(CLASSES), dict.fromkeys(range(34), IGNORE) | {value: i for i, value in enumerate(IDS)})


def list_cityscapes(root: str | Path | None, split: str = "val") -> Listing:
    """Lists the train or val split; masks hold labelTrainIds, 0 to 18 and 255."""
    check_choice(split, "split", ("train", "val"))
    root = find_root(root, "leftImg8bit", PLACES)
    image_folder, mask_folder = root / "leftImg8bit" / split, root / "gtFine" / split
    images = images_in(image_folder, ending="_leftImg8bit")
    masks = images_in(mask_folder, ending=PREPARED)
    unprepared = images_in(mask_folder, ending=STORED).keys() & images.keys() - masks.keys()
    hint = f"; run `apcnet prepare cityscapes {root}` to make them from their labelIds" if unprepared else ""
    wanted = f"{mask_folder}/*_gtFine_labelTrainIds.png"
    return Listing(images, images, masks, image_folder, wanted, CLASSES, PALETTE, hint=hint)


def plan_cityscapes(root: str | Path, source: Path | None = None) -> Iterator[Job]:
    """Yields the masks of labelTrainIds to write."""
    if source is not None:
        raise ValueError(f"source: expected None, Cityscapes is prepared from the files in root, got {str(source)!r}")
    folder = find_root(root, "gtFine", PLACES) / "gtFine"
    stored = images_in(folder, ending=STORED)
    if not stored:
        raise FileNotFoundError(f"root: expected *{STORED}.png in {folder}, found none")
    for path in stored.values():
        yield path.with_name(path.stem.removesuffix(STORED) + f"{PREPARED}.png"), partial(convert, path)


def convert(path: Path) -> np.ndarray:
    """Reads a mask of labelIds and maps it to labelTrainIds."""
    labels = LABELS[read_mask(path).numpy()]
    if (labels == UNKNOWN).any():
        raise ValueError(f"{path}: expected labels from 0 to 33, got others")
    return labels
