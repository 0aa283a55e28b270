"""Images and masks: the data sets, one file each, and what is done to a sample on its way into a network."""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data import augment
from apcnet.data.ade20k import list_ade20k
from apcnet.data.cityscapes import list_cityscapes
from apcnet.data.files import Files
from apcnet.data.folder import list_folder
from apcnet.data.pascal_context import list_pascal_context
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.synthetic import Synthetic
from apcnet.data.voc2012 import list_voc2012

__all__ = ["IGNORE", "NAMES", "Sample", "augment", "open"]

ON_DISK = {  # what lists the files of each
    "cityscapes": list_cityscapes,
    "ade20k": list_ade20k,
    "voc2012": list_voc2012,
    "pascal_context": list_pascal_context,
    "folder": list_folder,
}
NAMES = ("synthetic", *ON_DISK)


def open(name: str, root: str | Path | None = None, split: str = "val", **options) -> Files | Synthetic:
    """A data set: `len(data)`, `data[i] -> Sample`, `data.names`, `data.classes`, `data.palette`.

    Args:
        name: cityscapes, ade20k, voc2012, pascal_context, folder or synthetic.
        root: the folder that holds leftImg8bit, images or JPEGImages, or one with the official folder in it; None for
            synthetic.
        split: train or val; of voc2012 trainaug too, of folder any.
        options: of pascal_context classes=59; of folder and synthetic all that `folder.list_folder` and
            `synthetic.Synthetic` take.
    """
    check_choice(name, "name", NAMES)
    if name != "synthetic":
        return ON_DISK[name](root, split, **options).open()
    if root is not None:
        raise ValueError(f"root: expected None, synthetic scenes are generated, got {str(root)!r}")
    return Synthetic(split, **options)
