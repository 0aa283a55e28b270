"""Writes the masks and lists of names that some downloads lack.

    Cityscapes        *_labelTrainIds.png, from *_labelIds.png
    PASCAL VOC 2012   SegmentationClassAug, aug.txt and trainaug.txt, from the masks of SBD in MATLAB's format
    Pascal Context    SegmentationClassContext, train.txt and val.txt, from trainval_merged.json

Existing files are kept and never overwritten, and each file is written whole or not at all: run an interrupted
preparation again, and it goes on.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image

from apcnet.choices import check_choice
from apcnet.data.cityscapes import plan_cityscapes
from apcnet.data.pascal_context import plan_pascal_context
from apcnet.data.voc2012 import plan_voc2012
from apcnet.files import replacing

PLANS = {"cityscapes": plan_cityscapes, "voc2012": plan_voc2012, "pascal_context": plan_pascal_context}
Progress = Callable[[int, int], None]


def prepare(
    name: str, root: str | Path, source: str | Path | None = None, progress: Progress | None = None
) -> tuple[int, int]:
    """Writes the files of a benchmark that its download lacks; masks first, so that every listed name has its mask.

    Args:
        name: cityscapes, voc2012 or pascal_context.
        root: The folder that holds leftImg8bit or JPEGImages.
        source: For voc2012 the folder of SBD that holds cls, for pascal_context the JSON file; None to look in the
            usual places.
        progress: Is called with the number of files that exist, and of all files.

    Returns:
        The number of files written, and the number that existed before.
    """
    if name == "ade20k":
        raise ValueError(f"name: ade20k needs nothing but its download; to read all of it: apcnet check ade20k {root}")
    check_choice(name, "name", PLANS)
    jobs = list(PLANS[name](root, None if source is None else Path(source)))
    missing = [(out, make) for out, make in jobs if not os.path.lexists(out)]
    masks = [(out, make) for out, make in missing if out.suffix == ".png"]
    lists = [(out, make) for out, make in missing if out.suffix != ".png"]
    done = kept = len(jobs) - len(missing)
    report = progress or (lambda done, total: None)
    report(done, len(jobs))
    for folder in {out.parent for out, _ in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes and encodes without holding the interpreter's lock
    try:
        for group in (masks, lists):
            for future in as_completed([pool.submit(_write, *job) for job in group]):
                future.result()
                done += 1
                report(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    return len(missing), kept


def _write(out: Path, make: Callable[[], np.ndarray | list[str]]) -> None:
    made = make()
    with replacing(out) as temporary:
        if isinstance(made, np.ndarray):
            Image.fromarray(made).save(temporary, format="PNG")
        else:
            temporary.write_text("".join(f"{line}\n" for line in made), encoding="utf-8", errors="surrogateescape")
