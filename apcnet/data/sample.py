"""Defines a sample, an image with its mask, and what every data set offers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

IGNORE = 255  # the label of pixels that neither training nor evaluation counts
# ImageNet's mean and standard deviation of red, green and blue, 0–255: the default normalisation of images.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Sample(NamedTuple):
    """Holds an image, its mask and its name: `image, mask, name = data[0]`."""

    image: Tensor  # (3, H, W) uint8, RGB; or the levels of other images, (C, H, W) float32
    mask: Tensor  # (H, W) uint8: the index of a class, or IGNORE
    name: str


class Dataset(Protocol):
    """Describes what `apcnet.data.open` returns, and what training and evaluation take: samples by index, and names."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def palette(self) -> Sequence[tuple[int, int, int]]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


class DamagedError(ValueError):
    """Reports a part of a shard that never arrived whole: the file, the place, and what is wrong."""


class SampleError(ValueError):
    """Reports a sample that cannot be loaded: its name, its position in the stream, and the reason."""
