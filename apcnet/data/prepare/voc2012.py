"""PASCAL VOC 2012: the masks of the Semantic Boundaries Dataset (SBD), which has five times as many as VOC itself.

Its download unpacks to benchmark_RELEASE/dataset, with cls/*.mat, train.txt and val.txt. Its own splits do not matter
here: VOC's val stays what is tested on, everything else is there to train on.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.data.layout import find_root, names_in
from apcnet.data.prepare.jobs import Job
from apcnet.data.prepare.matlab import read_field
from apcnet.data.voc2012 import CLASSES, PLACES

USUAL = ("benchmark_RELEASE/dataset", "VOCaug/dataset")  # beside the root, or up to two folders above


def plan_voc2012(root: str | Path, source: Path | None = None) -> Iterator[Job]:
    root = find_root(root, "JPEGImages", PLACES)
    source = source or _find_sbd(root)
    lists = root / "ImageSets" / "Segmentation"
    train, val = set(names_in(lists / "train.txt")), set(names_in(lists / "val.txt"))
    sbd = set(names_in(source / "train.txt")) | set(names_in(source / "val.txt"))
    missing = sorted(name for name in sbd if not (source / "cls" / f"{name}.mat").is_file())
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(sbd)} masks are not in {source / 'cls'}: {missing[0]}.mat, …")
    for name in sorted(sbd):
        path = source / "cls" / f"{name}.mat"
        yield Job(root / "SegmentationClassAug" / f"{name}.png", partial(convert, path))
    yield Job(lists / "aug.txt", lambda: sorted(sbd - train - val))
    yield Job(lists / "trainaug.txt", lambda: sorted((sbd | train) - val))


def convert(path: Path) -> np.ndarray:
    labels = read_field(path, "GTcls", "Segmentation")
    if labels.ndim != 2 or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(
            f"{path}: expected a mask of labels 0 to {len(CLASSES) - 1}, got {labels.shape}, {labels.max()}"
        )
    return np.ascontiguousarray(labels, dtype=np.uint8)


def _find_sbd(root: Path) -> Path:
    root = root.resolve()
    folders = [above / place for above in (root, *root.parents[:3]) for place in USUAL]
    for folder in folders:
        if (folder / "cls").is_dir():
            return folder
    raise FileNotFoundError(
        f"source: the masks of SBD were looked for in {folders[0]} and above, in vain; name the folder that holds cls"
    )
