"""Computes logits at the size of the input images, from whole images or as the mean over sliding windows.

A model is anything that, called with normalised images (B, 3, H, W), returns logits (B, K, h, w) at a resolution of its
own, and has `align_corners`, which says how those are resized. The rules are mmsegmentation's.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.config import Protocol

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


def slide_logits(model: Model, images: Tensor, crop_size: Sequence[int], stride: Sequence[int]) -> Tensor:
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
    protocol = Protocol(window=crop_size, stride=stride)
    logits = None
    for i, image in enumerate(images.split(1)):
        for top, rows in slide_bands(model, image, protocol):
            if logits is None:
                logits = rows.new_empty(images.shape[0], rows.shape[1], *images.shape[2:])
            logits[i, :, top : top + rows.shape[2]] = rows[0]
    return logits


def slide_bands(model: Model, image: Tensor, protocol: Protocol) -> Iterator[tuple[int, Tensor]]:
    """Yields rows of slide_logits from top to bottom, once no window adds to them: pairs of a first row and logits.

    For an image (1, 3, H, W) of any height, memory holds one band as high as a window. The yielded logits are a part of
    that band, and the next iteration overwrites them.
    """
    places = map(_places, image.shape[2:], protocol.window, protocol.stride)
    (tops, height, row_hits), (lefts, width, column_hits) = places
    band = None
    for top, following in zip(tops, [*tops[1:], image.shape[2]], strict=True):
        for left in lefts:
            window = whole_logits(model, image[:, :, top : top + height, left : left + width])
            if band is None:
                band = window.new_zeros(1, window.shape[1], height, image.shape[3])
            band[:, :, :, left : left + width] += window
        finished = following - top
        hits = row_hits[top:following, None] * column_hits
        yield top, band[:, :, :finished].div_(hits.to(band))
        _move_up(band, finished)


def head_logits(model: Model, images: Tensor) -> Tensor:
    """Returns the model's logits at its own resolution, after checking images and logits."""
    check_images(images)
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model: expected a model in evaluation, got one in training: call model.eval() first")
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[0] != images.shape[0]:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits ({images.shape[0]}, K, h, w) from it, got {given}")
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
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images: expected (B, 3, H, W), none of them 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected normalised images in floating point, got {str(images.dtype)[6:]}")


def _places(size: int, window: int, step: int) -> tuple[list[int], int, Tensor]:
    """Returns the starts of windows along an axis, their length, and the number that covers each position."""
    window = min(window, size)
    count = -(-(size - window) // step) + 1
    starts = [min(i * step, size - window) for i in range(count)]
    hits = torch.zeros(size)
    for start in starts:
        hits[start : start + window] += 1
    return starts, window, hits


def _move_up(band: Tensor, rows: int) -> None:
    """Drops the first rows of a band in place and appends zeros; copies pieces of `rows` rows, which do not overlap."""
    kept = band.shape[2] - rows
    for top in range(0, kept, rows):
        bottom = min(top + rows, kept)
        band[:, :, top:bottom] = band[:, :, top + rows : bottom + rows]
    band[:, :, kept:] = 0
