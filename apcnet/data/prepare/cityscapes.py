"""Cityscapes: of the 34 labels of the download 19 are classes, the rest is ignored."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.data.cityscapes import CLASSES, PLACES
from apcnet.data.classes import UNKNOWN, label_table
from apcnet.data.files import read_mask
from apcnet.data.layout import find_root, images_in
from apcnet.data.prepare.jobs import Job
from apcnet.data.sample import IGNORE

STORED, MADE = "_gtFine_labelIds", "_gtFine_labelTrainIds"
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the classes, in their order
LABELS = label_table(len(CLASSES), dict.fromkeys(range(34), IGNORE) | {value: i for i, value in enumerate(IDS)})


def plan_cityscapes(root: str | Path, source: Path | None = None) -> Iterator[Job]:
    if source is not None:
        raise ValueError(f"source: expected None, Cityscapes is prepared from what is in its root, got {str(source)!r}")
    folder = find_root(root, "gtFine", PLACES) / "gtFine"
    stored = images_in(folder, ending=STORED)
    if not stored:
        raise FileNotFoundError(f"there is no *{STORED}.png in {folder}")
    for path in stored.values():
        yield Job(path.with_name(path.stem.removesuffix(STORED) + f"{MADE}.png"), partial(convert, path))


def convert(path: Path) -> np.ndarray:
    labels = LABELS[read_mask(path).numpy()]
    if (labels == UNKNOWN).any():
        raise ValueError(f"{path}: expected labels of 0 to 33, got more")
    return labels
