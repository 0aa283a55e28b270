"""What is done to images before a network sees them: sizes as mmsegmentation computes them, to the pixel."""

import math
import operator
from collections.abc import Sequence

TEST_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of every published multi-scale result


def keep_ratio_size(size: Sequence[int], scale: Sequence[int] | float) -> tuple[int, int]:
    """The largest (h, w) of a size's proportions whose long and short side fit into those of a scale.

    Args:
        size: (h, w) of the image.
        scale: two bounds, of the long and of the short side in either order; or the factor itself.
    """
    height, width = _pair(size, "size")
    if not isinstance(scale, (int, float)):
        bounds = _pair(scale, "scale")
        scale = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive factor, or two bounds, got {scale}")
    resized = _times((height, width), scale)
    if 0 in resized:
        raise ValueError(f"scale: nothing is left of an image of {(height, width)} at {scale:.3g} of its size")
    return resized


def view_sizes(
    original: Sequence[int],
    ratios: Sequence[float] = TEST_RATIOS,
    test_scale: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """The sizes (h, w) of an image at every scale of a multi-scale test.

    The published results come from mmsegmentation 0.x, which multiplies the test scale that the image is fitted into;
    1.x multiplies the image's own size. On Cityscapes that is the same, on smaller images it is not.

    Args:
        original: (h, w) of the image.
        ratios: of the scales; 1 is the single-scale test.
        test_scale: two bounds, as in keep_ratio_size: 0.x, (2048, 512) for ADE20K say; None: 1.x.
    """
    original = _pair(original, "original")
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise ValueError(f"ratios: expected positive numbers, at least one, got {ratios!r}")
    if test_scale is None:
        return [keep_ratio_size(original, _times(original, ratio)) for ratio in ratios]
    long, short = _pair(test_scale, "test_scale")
    return [keep_ratio_size(original, (int(long * ratio), int(short * ratio))) for ratio in ratios]


def _times(size: Sequence[int], factor: float) -> tuple[int, int]:
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def _pair(given: Sequence[int], name: str) -> tuple[int, int]:
    try:
        first, second = map(operator.index, given)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected two integers, got {given!r}") from None
    if first < 1 or second < 1:
        raise ValueError(f"{name}: expected two positive integers, got {(first, second)}")
    return first, second
