"""Computes logits at the size of the input images, from whole images or as the mean over sliding windows.

A model is a callable that maps normalised images (B, 3, H, W) to logits (B, K, h, w) at its own resolution, and has an
attribute `align_corners`, which determines how the logits are resized. The rules are those of mmsegmentation.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.config import Pair, Protocol

Model = Callable[[Tensor], Tensor]


def whole_logits(model: Model, images: Tensor) -> Tensor:
    """Computes logits (B, K, H, W) at the size of the images; differentiable.

    Args:
        model: A callable that maps images to logits (B, K, h, w) and has `align_corners`.
        images: Normalised images, (B, 3, H, W).

    Returns:
        Logits in float32, or float64 if the model returns float64.

    Example:
        >>> logits = whole_logits(model, images)
    """
    return resized(model, head_logits(model, images), images.shape[2:])


def slide_logits(model: Model, images: Tensor, crop_size: Pair, stride: Pair) -> Tensor:
    """Computes logits (B, K, H, W) as the mean over the sliding windows that cover each pixel; differentiable.

    Args:
        model: A callable that maps images to logits (B, K, h, w) and has `align_corners`.
        images: Normalised images, (B, 3, H, W).
        crop_size: Height and width of a window. An image smaller than a window is one window, without padding.
        stride: Vertical and horizontal step between windows. The last windows are moved back inside the image.

    Example:
        >>> logits = slide_logits(model, images, crop_size=(769, 769), stride=(513, 513))
    """
    check_images(images)
    Protocol(window=crop_size, stride=stride)  # checks both
    logits: Tensor | None = None
    for i, image in enumerate(images.split(1)):
        for top, rows in slide_bands(model, image, crop_size, stride):
            if logits is None:
                size = images.shape[0], rows.shape[1], *images.shape[2:]
                logits = torch.empty(size, dtype=rows.dtype, device=rows.device)
            logits[i, :, top : top + rows.shape[2]] = rows[0]
    assert logits is not None  # there is an image, and every image has windows
    return logits


def slide_bands(model: Model, image: Tensor, window: Pair, stride: Pair) -> Iterator[tuple[int, Tensor]]:
    """Yields rows of slide_logits from top to bottom, once no window adds to them, as `score_bands` does."""
    return score_bands(
        lambda rows, columns: whole_logits(model, image[:, :, rows, columns]), image.shape[2:], window, stride
    )


def score_bands(
    scores: Callable[[slice, slice], Tensor], size: Sequence[int], window: Pair, stride: Pair
) -> Iterator[tuple[int, Tensor]]:
    """Yields rows of the mean over sliding windows from top to bottom: pairs of a first row and scores.

    For any height, memory holds one band as high as a window. The yielded scores are a part of that band, and the next
    iteration overwrites them.

    Args:
        scores: Returns the scores (1, K, h, w) of the window with these rows and columns; called row by row.
        size: Height and width of the area that the windows cover.
        window: Height and width of a window.
        stride: Vertical and horizontal step between windows. The last windows are moved back inside the area.
    """
    (tops, height, row_counts), (lefts, width, column_counts) = map(windows_along, size, window, stride)
    band: Tensor | None = None
    for top, following in zip(tops, [*tops[1:], size[0]], strict=True):
        for left in lefts:
            part = scores(slice(top, top + height), slice(left, left + width))
            if band is None:
                band = torch.zeros(1, part.shape[1], height, size[1], dtype=part.dtype, device=part.device)
            band[:, :, :, left : left + width] += part
        assert band is not None  # every row of windows has one
        finished = following - top
        counts = row_counts[top:following, None] * column_counts
        yield top, band[:, :, :finished].div_(counts.to(band))
        _move_up(band, finished)


def head_logits(model: Model, images: Tensor) -> Tensor:
    """Returns the model's logits at its own resolution, after checking images and logits."""
    check_images(images)
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model: expected evaluation mode, got a model in training mode; call model.eval() first")
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[0] != images.shape[0]:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected it to return logits ({images.shape[0]}, K, h, w), got {given}")
    return logits


def resized(model: Model, logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes logits as the model does, in float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners(model))


def align_corners(model: Model) -> bool:
    """Returns the `align_corners` by which the model's logits are resized."""
    try:
        return model.align_corners
    except AttributeError:
        raise TypeError(f"model: expected an attribute align_corners (bool), {type(model).__name__} has none") from None


def check_images(images: Tensor) -> None:
    """Checks that these are normalised images (B, 3, H, W)."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images: expected the shape (B, 3, H, W) without zeros, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected normalised images in floating point, got {str(images.dtype)[6:]}")


def windows_along(size: int, window: int, step: int) -> tuple[list[int], int, Tensor]:
    """Returns the starts of windows along an axis, their length, and the number that covers each position."""
    window = min(window, size)
    count = -(-(size - window) // step) + 1
    starts = [min(i * step, size - window) for i in range(count)]
    counts = torch.zeros(size)
    for start in starts:
        counts[start : start + window] += 1
    return starts, window, counts


def _move_up(band: Tensor, rows: int) -> None:
    """Drops the first rows of a band in place and appends zeros; copies pieces of `rows` rows, which do not overlap."""
    kept = band.shape[2] - rows
    for top in range(0, kept, rows):
        bottom = min(top + rows, kept)
        band[:, :, top:bottom] = band[:, :, top + rows : bottom + rows]
    band[:, :, kept:] = 0
