"""What some downloads need before they can be read: masks in other formats, and lists of names.

    Cityscapes        labelIds to labelTrainIds
    PASCAL VOC 2012   the masks of SBD, in MATLAB's format, to SegmentationClassAug, and aug.txt and trainaug.txt
    Pascal Context    trainval_merged.json to SegmentationClassContext, and train.txt and val.txt

What is there already is kept and never overwritten, and every file is written whole or not at all: preparation that was
interrupted is simply run again.
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.prepare.cityscapes import plan_cityscapes
from apcnet.data.prepare.jobs import Prepared, Progress, run
from apcnet.data.prepare.pascal_context import plan_pascal_context
from apcnet.data.prepare.voc2012 import plan_voc2012

__all__ = ["NAMES", "Prepared", "prepare"]

_PLANS = {"cityscapes": plan_cityscapes, "voc2012": plan_voc2012, "pascal_context": plan_pascal_context}
NAMES = tuple(_PLANS)


def prepare(
    name: str, root: str | Path, source: str | Path | None = None, progress: Progress | None = None
) -> Prepared:
    """Writes the files of a benchmark that its download lacks.

    Args:
        name: cityscapes, voc2012 or pascal_context.
        root: of the benchmark, as for `apcnet.data.open`.
        source: of voc2012 the folder of SBD that holds cls, of pascal_context the JSON file; None: where they are
            usually put.
        progress: is called with how many files are there and how many there will be.

    Returns:
        How many files were written, and how many were there already.
    """
    check_choice(name, "name", NAMES)
    return run(_PLANS[name](root, None if source is None else Path(source)), progress)
