"""Reads Pascal Context: 4998 + 5105 photographs of VOC 2010 with every pixel labelled, 59 classes and background.

    ROOT/JPEGImages/*.jpg
    ROOT/SegmentationClassContext/*.png      0 for the background, classes in alphabetical order from 1
    ROOT/ImageSets/SegmentationContext/{train,val}.txt

`apcnet prepare pascal_context ROOT` makes the masks and the lists from the annotations of PASCAL in Detail,
trainval_merged.json. The file lists images (image_id, file_name, height, width, phase) and regions (image_id,
category_id and a mask), later ones above earlier ones. A mask is a run-length code in COCO's compressed form: lengths
of zeros and ones in turn, column by column. The result equals that of mmsegmentation's converter, which needs the
`detail` package.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes, reduced_labels
from apcnet.data.imports.regions import from_text
from apcnet.data.layout import Job, Listing, find_root, images_in, names_in

PLACES = ("VOC2010", "VOCdevkit/VOC2010")
CLASSES, PALETTE = read_classes(LISTS / "pascal_context.txt")
# The 59 of the 459 categories that are classes, in the alphabetical order of the classes.
CATEGORIES = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159),
    *(162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368),
    *(397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
CLASS_OF = {0: 0} | {category: i + 1 for i, category in enumerate(CATEGORIES)}  # 0: pixels without a region


def list_pascal_context(root: str | Path | None, split: str = "val", classes: int = 60) -> Listing:
    """Lists the train or val split, with 60 or 59 classes.

    60 classes include the background, as in the paper's comparison and mmsegmentation's pascal_context; with 59 the
    background is ignored, as in pascal_context_59.
    """
    check_choice(split, "split", ("train", "val"))
    if classes not in (60, 59):
        raise ValueError(f"classes: expected 60 (with background) or 59 (without), got {classes!r}")
    root = find_root(root, "JPEGImages", PLACES)
    image_folder, mask_folder = root / "JPEGImages", root / "SegmentationClassContext"
    listed = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    hint = f"; run `apcnet prepare pascal_context {root}` to make it"
    for place in (listed, mask_folder):
        if not place.exists():
            raise FileNotFoundError(f"expected {place}, but there is none{hint}")
    labels = None if classes == 60 else reduced_labels(59)
    files = names_in(listed), images_in(image_folder), images_in(mask_folder), image_folder, mask_folder
    return Listing(*files, CLASSES[-classes:], PALETTE[-classes:], labels, hint)


def plan_pascal_context(root: str | Path, source: Path | None = None) -> Iterator[Job]:
    """Yields the masks and lists to write."""
    root = find_root(root, "JPEGImages", PLACES)
    source = source or root / "trainval_merged.json"
    if not source.is_file():
        raise FileNotFoundError(
            f"source: expected {source}, from the download of PASCAL in Detail, but there is no such file"
        )
    try:
        annotations = json.loads(source.read_bytes())
        images, regions = annotations["images"], defaultdict(list)
        for region in annotations["annos_segmentation"]:
            regions[region["image_id"]].append(region)
        phases = {phase: [image for image in images if image["phase"] == phase] for phase in ("train", "val")}
        names = {phase: sorted(Path(image["file_name"]).stem for image in phases[phase]) for phase in phases}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source}: expected the format of PASCAL in Detail's trainval_merged.json, got {error!r}"
        ) from error
    for image in (*phases["train"], *phases["val"]):
        out = root / "SegmentationClassContext" / f"{Path(image['file_name']).stem}.png"
        yield out, partial(paint, image, regions[image["image_id"]], source)
    for phase, listed in names.items():
        yield root / "ImageSets" / "SegmentationContext" / f"{phase}.txt", partial(list, listed)


def paint(image: dict, regions: list[dict], source: Path) -> np.ndarray:
    """Draws the mask of an image from its regions, later ones above earlier ones."""
    height, width = image["height"], image["width"]
    categories = np.zeros(width * height, dtype=np.int64)  # column by column, as the regions are stored
    for region in regions:
        try:
            code = region["segmentation"]
            if code["size"] != [height, width]:
                raise ValueError(f"expected the size of the image, {[height, width]}, got {code['size']}")
            categories[from_text(code["counts"], width * height)] = region["category_id"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: region {region.get('id')} of {image['file_name']}: {error}") from error
    unknown = sorted(set(np.unique(categories).tolist()) - CLASS_OF.keys())
    if unknown:
        raise ValueError(
            f"{source}: expected categories of the 59 classes, got category {unknown[0]} in {image['file_name']}"
        )
    table = np.zeros(max(CLASS_OF) + 1, dtype=np.uint8)
    table[list(CLASS_OF)] = list(CLASS_OF.values())
    return np.ascontiguousarray(table[categories].reshape(width, height).T)
