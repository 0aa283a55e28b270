"""Images and masks: the data sets, one file each, and what is done to a sample on its way into a network."""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.ade20k import open_ade20k
from apcnet.data.cityscapes import open_cityscapes
from apcnet.data.files import Files
from apcnet.data.folder import open_folder
from apcnet.data.pascal_context import open_pascal_context
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.synthetic import Synthetic
from apcnet.data.voc2012 import open_voc2012

__all__ = ["IGNORE", "NAMES", "Sample", "open"]

_ON_DISK = {
    "cityscapes": open_cityscapes,
    "ade20k": open_ade20k,
    "voc2012": open_voc2012,
    "pascal_context": open_pascal_context,
    "folder": open_folder,
}
NAMES = ("synthetic", *_ON_DISK)


def open(name: str, root: str | Path | None = None, split: str = "val", **options) -> Files | Synthetic:
    """A data set: `len(data)`, `data[i] -> Sample`, `data.names`, `data.classes`, `data.palette`.

    Args:
        name: cityscapes, ade20k, voc2012, pascal_context, folder or synthetic.
        root: the folder that holds leftImg8bit, images or JPEGImages, or one with the official folder in it; None for
            synthetic.
        split: train or val; of voc2012 trainaug too, of folder any.
        options: of pascal_context classes=59; of folder and synthetic all that `folder.open_folder` and
            `synthetic.Synthetic` take.
    """
    check_choice(name, "name", NAMES)
    if name != "synthetic":
        return _ON_DISK[name](root, split, **options)
    if root is not None:
        raise ValueError(f"root: expected None, synthetic scenes are generated, got {str(root)!r}")
    return Synthetic(split, **options)
