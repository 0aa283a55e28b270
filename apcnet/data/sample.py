"""What every data set gives: an image, its mask and a name to speak of them."""

from typing import NamedTuple

from torch import Tensor

IGNORE = 255  # the label of pixels that neither training nor evaluation counts
# ImageNet's red, green and blue, 0–255: what images are normalised by if nothing else is said.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Sample(NamedTuple):
    image: Tensor  # (3, H, W) uint8, RGB
    mask: Tensor  # (H, W) uint8: the index of a class, or IGNORE
    name: str


class SampleError(ValueError):
    """A sample that cannot be had: which one, where in the stream, and why."""
