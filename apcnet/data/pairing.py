"""Pairs images with mask images by the names that people and tools give to files and folders.

    images/a.jpg, masks/a.png        folders of many names: labels, annotations, ann_dir, SegmentationClass, gtFine, …
    train/a.jpg, train/a_mask.png    endings: _mask, _seg, _label, _gt, _labelIds, …
    a.jpg, a.png                     one folder, where the suffix tells them apart

Splits are folders (train, val, valid, validation, test) or lists (train.txt, ImageSets/Segmentation/train.txt).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from apcnet.data.layout import SUFFIXES, files_below, names_in

IMAGE_FOLDERS = {"images", "image", "imgs", "img", "img_dir", "jpegimages", "leftimg8bit", "photos", "rgb"}
MASK_FOLDERS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "ann_dir", "gt", "groundtruth"),
    *("ground_truth", "segmentationclass", "segmentation", "segmentations", "seg", "gtfine", "labelled", "mask_images"),
}
OTHER_FOLDERS = {"segmentationobject", "instances", "segmentationclassvisualization", "overlays", "preview"}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MASK_ENDING = re.compile(
    r"(.+?)((?:[_.-](?:gtFine_labelTrainIds|gtFine_labelIds|labelTrainIds|labelIds|gtFine))"
    r"|[_.-](?:masks?|seg|segmentation|labels?|gt|groundtruth|annotation|L))",
    re.IGNORECASE,
)
IMAGE_ENDING = re.compile(r"(.+?)[_.-](?:leftImg8bit|image|img|rgb)", re.IGNORECASE)
PHOTO_ENDING = re.compile(r"(.+)\.(?:jpe?g|png|bmp|tiff?|webp)", re.IGNORECASE)  # a.jpg.png, the mask of a.jpg
# The ways to name images and masks alike, the first that pairs some: which endings they lose, and if folders count.
WAYS = [
    (images, masks, folders)
    for folders in (True, False)
    for images in (None, IMAGE_ENDING)
    for masks in (None, MASK_ENDING, PHOTO_ENDING)
]
UNUSED_ENDING = re.compile(r".+_gt(?:Fine|Coarse)_(?:color|instanceIds|polygons)", re.IGNORECASE)


class Named(NamedTuple):
    """Holds the name of a sample and its split, or None if the files do not tell."""

    name: str
    split: str | None


@dataclass
class Pairing:
    """Holds the images and masks of a folder by name and split, and the reasons of the pairing in words."""

    images: dict[Named, Path] = field(default_factory=dict)
    masks: dict[Named, Path] = field(default_factory=dict)

    @property
    def pairs(self) -> list[Named]:
        """Returns the names that have both files, in order."""
        return sorted(self.images.keys() & self.masks.keys(), key=lambda each: (each.split or "", each.name))


def find_pairs(root: Path) -> Pairing:
    """Pairs the images and masks below a folder; masks without an image are left out of the pairs."""
    files = [path for path in files_below(root) if path.suffix.lower() in SUFFIXES]
    parts = {path: PurePosixPath(path.relative_to(root).as_posix()) for path in files}
    files = [path for path in files if not _is_unused(parts[path])]
    masks = [path for path in files if _folders_of(parts[path]) & MASK_FOLDERS]
    images = [path for path in files if path not in set(masks)]
    if not masks or not images:
        masks = [path for path in files if MASK_ENDING.fullmatch(path.stem)]
        images = [path for path in files if path not in set(masks)]
    if not masks or not images:
        images, masks = _by_suffix(files, parts)
    if any(_folders_of(parts[path]) & IMAGE_FOLDERS for path in images):
        images = [path for path in images if _folders_of(parts[path]) & IMAGE_FOLDERS]
    return _with_lists(root, _matched(root, images, masks))


def _folders_of(path: PurePosixPath) -> set[str]:
    return {part.lower() for part in path.parts[:-1]}


def _is_unused(path: PurePosixPath) -> bool:
    return bool(_folders_of(path) & OTHER_FOLDERS) or bool(UNUSED_ENDING.fullmatch(path.stem))


def _by_suffix(files: list[Path], parts: Mapping[Path, PurePosixPath]) -> tuple[list[Path], list[Path]]:
    """Tells images from masks that have the same name in the same folder: the image is a JPEG, the mask a PNG."""
    alike = defaultdict(dict)
    for path in files:
        alike[parts[path].with_suffix("")][path.suffix.lower()] = path
    images, masks = [], []
    for found in alike.values():
        photo = next((found[suffix] for suffix in (".jpg", ".jpeg", ".webp") if suffix in found), None)
        mask = next((found[suffix] for suffix in (".png", ".bmp", ".tif", ".tiff") if suffix in found), None)
        if photo and mask:
            images.append(photo)
            masks.append(mask)
    return images, masks


def _matched(root: Path, images: list[Path], masks: list[Path]) -> Pairing:
    """Names images and masks by their paths without the words that tell their kind and split."""
    image_names, mask_names = {}, {}
    for image_ending, mask_ending, folders in WAYS:
        image_names = _named(root, images, image_ending, folders)
        mask_names = _named(root, masks, mask_ending, folders)
        if {name.name for name in image_names} & {name.name for name in mask_names}:
            break
    if not any(name.split for name in mask_names):  # one folder of masks serves the images of all splits
        plain = {name.name: path for name, path in mask_names.items()}
        mask_names = {name: plain[name.name] for name in image_names if name.name in plain} or mask_names
    return Pairing(image_names, mask_names)


def _named(root: Path, files: Iterable[Path], ending: re.Pattern | None, folders: bool) -> dict[Named, Path]:
    """Names files by the folders and the name that are left, if `folders` count at all."""
    found: dict[Named, Path] = {}
    for path in sorted(files):
        split, kept = None, []
        for part in path.relative_to(root).parts[:-1]:
            lower = part.lower()
            if split is None and lower in SPLITS:
                split = SPLITS[lower]
            elif folders and lower not in IMAGE_FOLDERS | MASK_FOLDERS:
                kept.append(part)
        match = ending.fullmatch(path.stem) if ending else None
        name = Named("/".join([*kept, match[1] if match else path.stem]), split)
        if name in found:
            better = _more_useful(found[name], path)
            if better is None:
                raise ValueError(
                    f"{root}: expected one file of each name, got {found[name]} and {path}; remove one of them"
                )
            path = better
        found[name] = path
    return found


def _more_useful(one: Path, other: Path) -> Path | None:
    """Returns the one of two masks of an image that holds the classes to train on, in Cityscapes' names."""
    for ending in ("labelTrainIds", "labelIds"):
        chosen = [path for path in (one, other) if path.stem.endswith(ending)]
        if len(chosen) == 1:
            return chosen[0]
    return None


def _with_lists(root: Path, pairing: Pairing) -> Pairing:
    """Takes the splits from lists of names, if the folders do not tell them."""
    if any(name.split for name in pairing.images):
        return pairing
    places = (root, root / "ImageSets" / "Segmentation", root / "splits")
    lists = {split: place / f"{split}.txt" for place in places for split in ("test", "train", "val")}
    listed = {}
    for split, path in lists.items():
        if path.is_file():
            listed |= {PurePosixPath(line.split()[0]).with_suffix("").name: split for line in names_in(path)}

    def moved(files: Mapping[Named, Path]) -> dict[Named, Path]:
        return {Named(name.name, listed.get(PurePosixPath(name.name).name)): path for name, path in files.items()}

    return Pairing(moved(pairing.images), moved(pairing.masks)) if listed else pairing
