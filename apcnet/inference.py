"""Logits, labels and confusion matrices of images: whole, by a sliding window, and at several scales with flips.

A model is anything that, called with normalised images (B, 3, H, W), returns logits (B, K, h, w) at a resolution of its
own, and has `align_corners`, which says how those are resized. The rules are mmsegmentation's: logits are resized to
the network's input, and from there to the original image. Only the first of the two is ever formed, of one image at a
time; the last is fused with what is made of it.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc_kernels import upsample_argmax, upsample_confusion, upsample_softmax

Model = Callable[[Tensor], Tensor]


def whole_logits(model: Model, images: Tensor) -> Tensor:
    """Logits (B, K, H, W) at the size of the images, in float32 (float64 for float64 logits); differentiable."""
    return _resized(model, _head_logits(model, images), images.shape[2:])


def slide_logits(
    model: Model, images: Tensor, crop_size: Sequence[int], stride: Sequence[int], *, windows_at_once: int = 1
) -> Tensor:
    """Logits (B, K, H, W) at the size of the images: the mean of those of all windows over a pixel; differentiable.

    Args:
        crop_size, stride: (h, w) of a window, and from one to the next. The last row and column of windows are moved
            back inside; an image smaller than a window is one window, without padding.
        windows_at_once: how many of a row go through the model at once. Images go one by one.
    """
    _check_images(images)
    logits = None
    for i, image in enumerate(images.split(1)):
        for top, rows in slide_bands(model, image, crop_size, stride, windows_at_once=windows_at_once):
            if logits is None:
                logits = rows.new_empty(images.shape[0], rows.shape[1], *images.shape[2:])
            logits[i, :, top : top + rows.shape[2]] = rows[0]
    return logits


def slide_bands(
    model: Model, image: Tensor, crop_size: Sequence[int], stride: Sequence[int], *, windows_at_once: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """The rows of slide_logits from top to bottom, as soon as no window adds to them: pairs of a first row and logits.

    Of an image of any size only one band exists, as high as a window: what is yielded is a part of it, overwritten
    when the next is asked for. The image is (1, 3, H, W).
    """
    _check_images(image)
    if image.shape[0] != 1:
        raise ValueError(f"image: expected one at a time, (1, 3, H, W), got {tuple(image.shape)}")
    crop, stride = _checked_window(crop_size, stride)
    windows_at_once = _positive(windows_at_once, "windows_at_once")
    (tops, height, row_hits), (lefts, width, column_hits) = (
        _places(size, window, step) for size, window, step in zip(image.shape[2:], crop, stride, strict=True)
    )
    band = None
    for top, following in zip(tops, [*tops[1:], image.shape[2]], strict=True):
        for start in range(0, len(lefts), windows_at_once):
            some = lefts[start : start + windows_at_once]
            crops = [image[:, :, top : top + height, left : left + width] for left in some]
            logits = whole_logits(model, torch.cat(crops))
            if band is None:
                band = logits.new_zeros(1, logits.shape[1], height, image.shape[3])
            for left, window in zip(some, logits.split(1), strict=True):
                band[:, :, :, left : left + width] += window
        finished = following - top
        hits = row_hits[top:following, None] * column_hits
        yield top, band[:, :, :finished].div_(hits.to(band))
        _move_up(band, finished)


def labels(
    model: Model,
    images: Tensor,
    size: Sequence[int] | None = None,
    *,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    windows_at_once: int = 1,
    single_resize: bool = False,
) -> Tensor:
    """The class of every pixel, (B, H, W) at `size`: uint8 for up to 256 classes, wider beyond, as upsample_argmax.

    Args:
        size: (H, W) of the original images; that of `images` if not given. Then the only resize is fused with the
            argmax, and of a sliding window only one band of logits exists (slide_bands).
        crop_size, stride, windows_at_once: as in slide_logits; without them images go through the model as a whole.
        single_resize: from the model's own resolution straight to `size`: faster, and less memory, but about 0.2 % of
            the labels are not those of mmsegmentation's two resizes.
    """
    _check_images(images)
    size = tuple(images.shape[2:]) if size is None else _pair(size, "size")
    window = _window(crop_size, stride, windows_at_once, single_resize)
    with torch.no_grad():
        if window and size == tuple(images.shape[2:]):
            return torch.cat([_labels_by_bands(model, image, window) for image in images.split(1)])
        last = _last_logits(model, images, images.shape[2:] if single_resize else size, window)
        return torch.cat([upsample_argmax(logits, size, align_corners=_align_corners(model)) for logits in last])


def confusion(
    model: Model,
    images: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    windows_at_once: int = 1,
    single_resize: bool = False,
) -> Tensor:
    """The confusion matrix of the labels, at the size of a target, with that target: they are never formed.

    Args:
        target: (B, H, W), the true labels of the original images, uint8, int16, int32 or int64.
        ignore_index: of pixels that are not counted.
        crop_size, stride, windows_at_once, single_resize: as in labels.

    Returns:
        (K, K) int64, rows: target, columns: prediction, of all images together.
    """
    _check_images(images)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if target.dim() != 3 or target.shape[0] != images.shape[0]:
        raise ValueError(f"target: expected ({images.shape[0]}, H, W), as many as images, got {tuple(target.shape)}")
    size, window = tuple(target.shape[1:]), _window(crop_size, stride, windows_at_once, single_resize)
    counting = {"ignore_index": ignore_index, "align_corners": _align_corners(model)}
    with torch.no_grad():
        if window and size == tuple(images.shape[2:]):
            return sum(
                upsample_confusion(rows, mask[:, top : top + rows.shape[2]], **counting)
                for image, mask in zip(images.split(1), target.split(1), strict=True)
                for top, rows in slide_bands(model, image, **window)
            )
        last = _last_logits(model, images, images.shape[2:] if single_resize else size, window)
        return sum(
            upsample_confusion(logits, mask, **counting) for logits, mask in zip(last, target.split(1), strict=True)
        )


def multi_scale_probabilities(
    model: Model,
    views: Iterable[Tensor],
    size: Sequence[int],
    *,
    flip: bool = True,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    windows_at_once: int = 1,
) -> Tensor:
    """The mean of the class probabilities of all views of some images and their mirror images, (B, K, H, W).

    Args:
        views: the same images (B, 3, h, w) at each scale (apcnet.data.augment.view_sizes), one after the other: an
            iterator need not hold more than one.
        size: (H, W) of the result, the original images'.
        flip: whether each view counts a second time, mirrored.
        crop_size, stride, windows_at_once: as in slide_logits.

    Returns:
        float32 (float64 for float64 logits). Beside it only the logits of one image at the size of its view exist.
    """
    size, window = _pair(size, "size"), _window(crop_size, stride, windows_at_once)
    total, passes = None, 0
    with torch.no_grad():
        for view in views:
            _check_images(view)
            if total is not None and view.shape[0] != total.shape[0]:
                raise ValueError(f"views: expected {total.shape[0]} images, as in the first, got {tuple(view.shape)}")
            for mirrored in (False, True) if flip else (False,):
                images = view.flip(3) if mirrored else view
                for i, logits in enumerate(_last_logits(model, images, size, window)):
                    if total is None:
                        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
                        total = logits.new_zeros(view.shape[0], logits.shape[1], *size, dtype=dtype)
                    corners = _align_corners(model)
                    upsample_softmax(logits, size, flip=mirrored, align_corners=corners, out=total[i : i + 1])
                passes += 1
        if total is None:
            raise ValueError("views: expected at least one")
        return total.div_(passes)


def multi_scale_labels(
    model: Model,
    views: Iterable[Tensor],
    size: Sequence[int],
    *,
    flip: bool = True,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    windows_at_once: int = 1,
) -> Tensor:
    """The most probable class of every pixel, (B, H, W), by multi_scale_probabilities."""
    sliding = {"crop_size": crop_size, "stride": stride, "windows_at_once": windows_at_once}
    return _argmax(multi_scale_probabilities(model, views, size, flip=flip, **sliding))


@contextmanager
def in_evaluation(model: nn.Module, precision: str = "float32") -> Iterator[None]:
    """The model in evaluation mode, with products in a precision (autocast); afterwards each of its parts is in its
    own mode again, which need not be that of all."""
    training = [part for part in model.modules() if part.training]
    device, low = next(model.parameters()).device.type, precision != "float32"
    model.eval()
    try:
        with torch.autocast(device, getattr(torch, precision) if low else None, enabled=low):
            yield
    finally:
        for part in training:
            part.training = True


def _labels_by_bands(model: Model, image: Tensor, window: dict) -> Tensor:
    return torch.cat([_argmax(rows) for _, rows in slide_bands(model, image, **window)], 1)


def _last_logits(model: Model, images: Tensor, size: Sequence[int], window: dict) -> Iterator[Tensor]:
    """Of each image the logits (1, K, h, w) that only one resize, to `size`, is left to be done with."""
    if window:
        for image in images.split(1):
            yield slide_logits(model, image, **window)
        return
    for logits in _head_logits(model, images).split(1):
        yield logits if tuple(size) == tuple(images.shape[2:]) else _resized(model, logits, images.shape[2:])


def _head_logits(model: Model, images: Tensor) -> Tensor:
    _check_images(images)
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model: expected a model in evaluation, got one in training: call model.eval() first")
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[0] != images.shape[0]:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits ({images.shape[0]}, K, h, w) from it, got {given}")
    return logits


def _resized(model: Model, logits: Tensor, size: Sequence[int]) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=_align_corners(model))


def _argmax(scores: Tensor) -> Tensor:
    """Labels in the narrowest dtype; of equal scores the first."""
    return upsample_argmax(scores, scores.shape[2:])


def _align_corners(model: Model) -> bool:
    try:
        return model.align_corners
    except AttributeError:
        raise TypeError(f"model: expected an attribute align_corners (bool), {type(model).__name__} has none") from None


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


def _window(
    crop_size: Sequence[int] | None, stride: Sequence[int] | None, windows_at_once: int, single_resize: bool = False
) -> dict:
    """The arguments of a sliding window; none where there is none."""
    if (crop_size is None) != (stride is None):
        raise ValueError(f"crop_size, stride: expected both or neither, got {crop_size} and {stride}")
    if crop_size is None:
        return {}
    if single_resize:
        raise ValueError("single_resize: a sliding window is put together at the size of the images; leave out one")
    crop_size, stride = _checked_window(crop_size, stride)
    return {"crop_size": crop_size, "stride": stride, "windows_at_once": _positive(windows_at_once, "windows_at_once")}


def _checked_window(crop_size: Sequence[int], stride: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    crop_size, stride = _pair(crop_size, "crop_size"), _pair(stride, "stride")
    if stride[0] > crop_size[0] or stride[1] > crop_size[1]:
        raise ValueError(f"stride: {stride} leaves gaps between windows of {crop_size}; expected at most their size")
    return crop_size, stride


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images: expected (B, 3, H, W), none of them 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected normalised images in floating point, got {str(images.dtype)[6:]}")


def _pair(given: Sequence[int], name: str) -> tuple[int, int]:
    try:
        height, width = map(operator.index, given)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected two integers (h, w), got {given!r}") from None
    return _positive(height, name), _positive(width, name)


def _positive(given: int, name: str) -> int:
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"{name}: expected a positive integer, got {given!r}")
    return given
