"""Logits at the size of the images that go in: of images as a whole, or the mean of a sliding window's.

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
    """Logits (B, K, H, W) at the size of the images, in float32 (float64 for float64 logits); differentiable."""
    return resized(model, head_logits(model, images), images.shape[2:])


def slide_logits(model: Model, images: Tensor, crop_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Logits (B, K, H, W) at the size of the images: the mean of those of all windows over a pixel; differentiable.

    Args:
        crop_size, stride: (h, w) of a window, and from one to the next. The last row and column of windows are moved
            back inside; an image smaller than a window is one window, without padding.
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
    """The rows of slide_logits from top to bottom, as soon as no window adds to them: pairs of a first row and logits.

    Of an image (1, 3, H, W) of any size only one band exists, as high as a window: what is yielded is a part of it,
    overwritten when the next is asked for.
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
    """What the model returns of normalised images, at its own resolution, after checking both."""
    check_images(images)
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model: expected a model in evaluation, got one in training: call model.eval() first")
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[0] != images.shape[0]:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits ({images.shape[0]}, K, h, w) from it, got {given}")
    return logits


def resized(model: Model, logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits at another size, as the model resizes them, in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners(model))


def align_corners(model: Model) -> bool:
    """How the model's logits are resized."""
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
    """Along one axis: where windows start, how long they are, and how many of them cover each position."""
    window = min(window, size)
    count = -(-(size - window) // step) + 1
    starts = [min(i * step, size - window) for i in range(count)]
    hits = torch.zeros(size)
    for start in starts:
        hits[start : start + window] += 1
    return starts, window, hits


def _move_up(band: Tensor, rows: int) -> None:
    """Drops the first rows of a band in place and adds empty ones below; pieces as long as the way do not overlap."""
    kept = band.shape[2] - rows
    for top in range(0, kept, rows):
        bottom = min(top + rows, kept)
        band[:, :, top:bottom] = band[:, :, top + rows : bottom + rows]
    band[:, :, kept:] = 0
