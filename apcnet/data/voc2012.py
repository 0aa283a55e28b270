"""Reads PASCAL VOC 2012: photographs with 20 kinds of objects and background; 1464 + 1449, and 9118 more from SBD.

    ROOT/JPEGImages/*.jpg
    ROOT/SegmentationClass/*.png        VOC's masks, 255 at the borders of objects
    ROOT/SegmentationClassAug/*.png     SBD's masks, which `apcnet prepare voc2012 ROOT` writes
    ROOT/ImageSets/Segmentation/{train,val,aug,trainaug}.txt

Networks are trained on `trainaug`: the names of train.txt with VOC's masks, and all other names with SBD's. The other
names are those of trainaug.txt, or of aug.txt if there is no trainaug.txt. Without a folder SegmentationClassAug, all
masks are read from SegmentationClass, because some downloads hold both kinds there.

SBD's download unpacks to benchmark_RELEASE/dataset, with cls/*.mat, train.txt and val.txt. Its own splits do not matter
here: VOC's val is the test set, and all other images are for training.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.choices import check_choice
from apcnet.data.classes import LISTS, read_classes
from apcnet.data.layout import Job, Listing, find_root, images_in, names_in
from apcnet.data.matlab import read_field

PLACES = ("VOC2012", "VOCdevkit/VOC2012")
CLASSES, PALETTE = read_classes(LISTS / "voc2012.txt")
SBD_PLACES = ("benchmark_RELEASE/dataset", "VOCaug/dataset")  # in the root, or in up to three folders above it


def list_voc2012(root: str | Path | None, split: str = "val") -> Listing:
    """Lists the train, trainaug or val split; masks hold 0 to 20, and 255 at borders."""
    check_choice(split, "split", ("train", "trainaug", "val"))
    root = find_root(root, "JPEGImages", PLACES)
    image_folder, mask_folder, more = root / "JPEGImages", root / "SegmentationClass", root / "SegmentationClassAug"
    lists, masks, wanted, hint = root / "ImageSets" / "Segmentation", images_in(mask_folder), f"{mask_folder}", ""
    if split == "trainaug":
        train = set(names_in(lists / "train.txt"))
        hint = f"; run `apcnet prepare voc2012 {root}` to make the files of SBD"
        names = _trainaug_names(lists, train, hint)
        if more.is_dir():
            masks = {name: masks[name] for name in train & masks.keys()}
            masks |= {name: path for name, path in images_in(more).items() if name not in train}
            wanted = f"{mask_folder} (names of train.txt) or {more} (all others)"
    else:
        names = names_in(lists / f"{split}.txt")
    return Listing(names, images_in(image_folder), masks, image_folder, wanted, CLASSES, PALETTE, hint=hint)


def _trainaug_names(lists: Path, train: set[str], hint: str) -> list[str]:
    if (lists / "trainaug.txt").is_file():
        return names_in(lists / "trainaug.txt")
    if (lists / "aug.txt").is_file():
        return [*train, *set(names_in(lists / "aug.txt")) - train]
    raise FileNotFoundError(f"expected trainaug.txt or aug.txt in {lists}, found neither{hint}")


def plan_voc2012(root: str | Path, source: Path | None = None) -> Iterator[Job]:
    """Yields the masks and lists to write for SBD's images."""
    root = find_root(root, "JPEGImages", PLACES)
    source = source or _find_sbd(root)
    lists = root / "ImageSets" / "Segmentation"
    train, val = set(names_in(lists / "train.txt")), set(names_in(lists / "val.txt"))
    sbd = set(names_in(source / "train.txt")) | set(names_in(source / "val.txt"))
    missing = sorted(name for name in sbd if not (source / "cls" / f"{name}.mat").is_file())
    if missing:
        raise FileNotFoundError(
            f"source: expected {len(sbd)} masks in {source / 'cls'}, "
            f"but {len(missing)} of them are missing: {missing[0]}.mat, …"
        )
    for name in sorted(sbd):
        path = source / "cls" / f"{name}.mat"
        yield root / "SegmentationClassAug" / f"{name}.png", partial(convert, path)
    yield lists / "aug.txt", lambda: sorted(sbd - train - val)
    yield lists / "trainaug.txt", lambda: sorted((sbd | train) - val)


def convert(path: Path) -> np.ndarray:
    """Reads a mask of SBD as labels, (H, W) uint8."""
    labels = read_field(path, "GTcls", "Segmentation")
    if labels.ndim != 2 or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(
            f"{path}: expected a mask of labels from 0 to {len(CLASSES) - 1}, "
            f"got the shape {labels.shape} and labels up to {labels.max()}"
        )
    return np.ascontiguousarray(labels, dtype=np.uint8)


def _find_sbd(root: Path) -> Path:
    root = root.resolve()
    folders = [above / place for above in (root, *root.parents[:3]) for place in SBD_PLACES]
    for folder in folders:
        if (folder / "cls").is_dir():
            return folder
    raise FileNotFoundError(
        f"source: expected SBD's masks in {folders[0]} or a folder above, found none; "
        f"run `apcnet prepare voc2012 {root} --source FOLDER` with the folder that holds cls"
    )
