"""mmsegmentation's photometric distortion: brightness, contrast, saturation and hue, each cut to 8 bits as there.

Saturation and hue pass through OpenCV's 8-bit HSV, whose hue counts steps of two degrees: apc_kernels.augment.
"""

from collections.abc import Sequence

from torch import Tensor

import apc_kernels

UNIT = 1 << 30  # draws are integers below it
DRAWS = 9  # that distortion takes
BRIGHTNESS, HUE = 32, 18  # turned up or down by as much
FACTORS = 0.5, 1.5  # of contrast and of saturation


def brightness(image: Tensor, delta: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with delta added to every level."""
    return apc_kernels.augment(image, steps=[("brightness", delta)])


def contrast(image: Tensor, factor: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every level multiplied by the factor."""
    return apc_kernels.augment(image, steps=[("contrast", factor)])


def saturation(image: Tensor, factor: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every pixel's saturation multiplied by the factor."""
    return apc_kernels.augment(image, steps=[("saturation", factor)])


def hue(image: Tensor, delta: int) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every pixel's hue turned by delta steps of two degrees."""
    return apc_kernels.augment(image, steps=[("hue", delta)])


def distortion(draws: Sequence[int]) -> list[tuple[str, float]]:
    """mmsegmentation's steps, each of the four with probability ½, contrast before or after the colours.

    The draws, DRAWS integers below UNIT, decide: whether brightness, by how much; contrast early or late, whether,
    by how much; whether saturation, by how much; whether hue, by how much.
    """
    chance = [2 * draw >= UNIT for draw in draws]
    share = [draw / UNIT for draw in draws]
    low, high = FACTORS
    brighter = [("brightness", BRIGHTNESS * (2 * share[1] - 1))] if chance[0] else []
    contrasted = [("contrast", low + (high - low) * share[4])] if chance[3] else []
    saturated = [("saturation", low + (high - low) * share[6])] if chance[5] else []
    turned = [("hue", 2 * HUE * draws[8] // UNIT - HUE)] if chance[7] else []  # never by +HUE, as numpy's randint
    if chance[2]:
        return brighter + contrasted + saturated + turned
    return brighter + saturated + turned + contrasted
