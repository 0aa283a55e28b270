"""Opens data sets of images and masks, and prepares their samples for a network.

Every data set has a file of its own. `augment` holds the steps of training and test pipelines, `stream` the order in
which training sees the samples, and `doctor` the checks of `apcnet check`.
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data import augment
from apcnet.data.ade20k import list_ade20k
from apcnet.data.cityscapes import list_cityscapes
from apcnet.data.files import Files
from apcnet.data.folder import list_folder
from apcnet.data.pascal_context import list_pascal_context
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.shards import open_shards
from apcnet.data.synthetic import Synthetic
from apcnet.data.voc2012 import list_voc2012

__all__ = ["IGNORE", "NAMES", "Sample", "augment", "open"]

ON_DISK = {  # the function that lists the files of each data set
    "cityscapes": list_cityscapes,
    "ade20k": list_ade20k,
    "voc2012": list_voc2012,
    "pascal_context": list_pascal_context,
    "folder": list_folder,
}
NAMES = ("synthetic", *ON_DISK, "shards")


def open(name: str, root: str | Path | None = None, split: str = "val", **options) -> Files | Synthetic:
    """Opens a split of a data set.

    Args:
        name: cityscapes, ade20k, voc2012, pascal_context, folder, shards or synthetic.
        root: The folder that holds leftImg8bit, images or JPEGImages, or its parent under the official name; for
            shards, the folder or the address (s3://…) of what `apcnet pack` has written; None for synthetic.
        split: train or val; voc2012 also has trainaug, synthetic has test, and folder takes any name.
        options: More arguments of the data set: `classes=59` for pascal_context, those of `folder.list_folder` for
            folder, of `shards.open_shards` for shards, and of `synthetic.Synthetic` for synthetic.

    Returns:
        The data set, with `len(data)`, `data[i]` (a Sample), `data.names`, `data.classes` and `data.palette`.

    Example:
        >>> data = apcnet.data.open("synthetic", split="val")
        >>> image, mask, name = data[0]
        >>> image.shape, mask.shape, name
        (torch.Size([3, 96, 96]), torch.Size([96, 96]), 'whole-val-000000')
    """
    check_choice(name, "name", NAMES)
    if name == "shards":
        return open_shards(root, split, **options)
    if name != "synthetic":
        return ON_DISK[name](root, split, **options).open()
    if root is not None:
        raise ValueError(f"root: expected None, because synthetic scenes are generated, got {str(root)!r}")
    return Synthetic(split, **options)
