"""Takes data sets of users' own: objects with `len(data)`, `data[i]` and `data.classes`."""

from collections.abc import Sequence
from typing import Any

from apcnet.data.augment import check_sample
from apcnet.data.classes import check_classes
from apcnet.data.files import Files
from apcnet.data.sample import IGNORE, Dataset, Sample
from apcnet.data.synthetic import Synthetic


class OwnData:
    """Gives a user's data set the names and the palette that it may lack, and checks its samples."""

    def __init__(self, data: Any, argument: str):
        for needed in ("__len__", "__getitem__", "classes"):
            if not hasattr(data, needed):
                raise TypeError(
                    f"{argument}: expected a data set with len(data), data[i] and data.classes, got "
                    f"{type(data).__name__} without {needed}"
                )
        self.data = data
        self.classes, self.palette = check_classes(data.classes, getattr(data, "palette", None), argument)
        self.names: Sequence[str] = tuple(map(str, getattr(data, "names", range(len(data)))))
        if not len(data):
            raise ValueError(f"{argument}: expected at least one sample, got none")
        if len(self.names) != len(data):
            raise ValueError(f"{argument}: expected {len(data)} names, one for each sample, got {len(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        given = self.data[index]
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise TypeError(f"expected image, mask and perhaps a name, got {type(given).__name__}")
        sample = Sample(given[0], given[1], self.names[index])
        check_sample(sample)
        wrong = sample.mask[(sample.mask >= len(self.classes)) & (sample.mask != IGNORE)]
        if len(wrong):
            raise ValueError(f"expected labels of 0 to {len(self.classes) - 1} and {IGNORE}, got {wrong[0]}")
        return sample


def own_data(data: Any, argument: str) -> Dataset:
    """Returns a data set as training and evaluation take it; those of `apcnet.data.open` stay as they are."""
    return data if isinstance(data, (Files, Synthetic, OwnData)) else OwnData(data, argument)
