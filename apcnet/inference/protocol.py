"""Computes labels, confusion matrices and probabilities under a test protocol, at the size of the original images.

A protocol (apcnet.config.Protocol) defines the scales, the window and the flips of a test. The rules are
mmsegmentation's: logits are resized to the network's input, and from there to the original image. Memory holds only the
first result, for one image at a time; the second resize is fused with the operation that consumes it. `images` are
normalised, (B, 3, h, w), at the network's scale; for several ratios, an iterable yields the same images at each ratio.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc_kernels import upsample_argmax, upsample_confusion, upsample_cross_entropy, upsample_softmax
from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.confusion import ConfusionMatrix
from apcnet.data.augment import checked_pair
from apcnet.inference.logits import Model, align_corners, check_images, head_logits, resized, slide_bands, slide_logits

WHOLE = Protocol()
BAND = 1 << 24  # probabilities at a time, classes × rows × columns, of which only those of the labels are kept: 64 MiB
Images = Tensor | Iterable[Tensor]
Keep = Callable[[int, int, Tensor], object]  # image, first row, probabilities (K, rows, W)


def labels(model: Model, images: Images, protocol: Protocol = WHOLE, *, size: Sequence[int] | None = None) -> Tensor:
    """Predicts the class of every pixel.

    Args:
        model: A callable that maps images to logits (B, K, h, w) and has `align_corners`.
        images: Normalised images, (B, 3, h, w), or an iterable of one such batch per ratio of the protocol.
        protocol: Scales, windows and flips. A sliding window over images of the result's size keeps one band of logits;
            single_resize needs the least memory, but about 0.2 % of its labels differ from mmsegmentation's.
        size: Height and width of the original images; by default those of `images`.

    Returns:
        Labels (B, H, W): uint8 for up to 256 classes, a wider type beyond, as `upsample_argmax` returns. Those of a
        model with one logit are 0, and 1 where the sigmoid is above 0.5.

    Example:
        >>> classes = labels(model, images, size=(1024, 2048))
    """
    size = _size(images, size)
    with torch.no_grad():
        if getattr(model, "gives_labels", False):
            return _given_labels(model, images, protocol, size)
        parts = [
            upsample_argmax(scores, (rows.stop - rows.start, size[1]), align_corners=align_corners(model))
            for _, rows, scores in _scores_to_resize(model, images, protocol, size)
        ]
        return _joined(parts, size)


def confusion(
    model: Model, images: Images, target: Tensor, protocol: Protocol = WHOLE, *, ignore_index: int = 255
) -> Tensor:
    """Computes the confusion matrix of predicted and true labels without storing the predictions.

    Args:
        model: A callable that maps images to logits (B, K, h, w) and has `align_corners`.
        images: Normalised images, as in `labels`.
        target: True labels (B, H, W) at the size of the original images: uint8, int16, int32 or int64.
        protocol: Scales, windows and flips.
        ignore_index: Target label of the pixels that are not counted.

    Returns:
        Counts (K, K) of all images, int64; rows are targets, columns predictions.

    Example:
        >>> counts = confusion(model, images, target)
    """
    return assess(model, images, target, protocol, ignore_index=ignore_index).counts


class Seen(NamedTuple):
    """Holds what `assess` finds out about images: their counts, and what else was asked for.

    Attributes:
        counts: Confusion matrix (K, K) of all images, int64; rows are targets, columns predictions.
        labels: Predicted labels (B, H, W), as `labels` returns.
        confidence: Probability (B, H, W) of the predicted label of every pixel.
        loss: Sum of the cross entropy over all labelled pixels.
    """

    counts: Tensor
    labels: Tensor | None
    confidence: Tensor | None
    loss: float | None


def assess(
    model: Model,
    images: Images,
    target: Tensor,
    protocol: Protocol = WHOLE,
    *,
    labels: bool = False,
    confidence: bool = False,
    loss: bool = False,
    ignore_index: int = 255,
) -> Seen:
    """Computes the confusion matrix, and on request labels, confidence and loss, in one pass of the network.

    Args:
        model: A callable that maps images to logits (B, K, h, w) and has `align_corners`.
        images: Normalised images, as in `labels`.
        target: True labels (B, H, W) at the size of the original images: uint8, int16, int32 or int64.
        protocol: Scales, windows and flips.
        labels: Also return the predicted labels.
        confidence: Also return the labels, and the probability of each.
        loss: Also return the loss. Where a protocol averages, it is that of the averaged probabilities.
        ignore_index: Target label of the pixels that are not counted.

    Example:
        >>> seen = assess(model, images, target, loss=True)
        >>> seen.counts, seen.loss
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    batch = images.shape[0] if isinstance(images, Tensor) else None
    if target.dim() != 3 or batch not in (None, target.shape[0]):
        raise ValueError(f"target: expected ({batch or 'B'}, H, W), one for each image, got {tuple(target.shape)}")
    corners, total, size = align_corners(model), 0.0, (target.shape[1], target.shape[2])
    counts: list[Tensor] = []
    labelled: list[Tensor] = []
    sure: list[Tensor] = []
    with torch.no_grad():
        if getattr(model, "gives_labels", False):
            if confidence or loss:
                raise model.no_logits()
            given = _given_labels(model, images, protocol, size)
            matrix = ConfusionMatrix(max(model.num_classes, 2), ignore_index, given.device)
            return Seen(matrix.update(given, target).matrix, given if labels else None, None, None)
        for which, rows, scores in _scores_to_resize(model, images, protocol, size):
            true = target[which, rows]
            counts.append(upsample_confusion(scores, true, ignore_index=ignore_index, align_corners=corners))
            if labels or confidence:
                found = upsample_argmax(scores, true.shape[1:], align_corners=corners)
                labelled.append(found)
                if confidence:
                    sure.append(winning(scores, found, corners, protocol.averages))
            if loss:
                total += _loss(scores, true, ignore_index, corners, protocol.averages)
        return Seen(
            torch.stack(counts).sum(0),
            _joined(labelled, size) if labelled else None,
            _joined(sure, size) if sure else None,
            total if loss else None,
        )


def confidence(
    model: Model,
    images: Images,
    protocol: Protocol = WHOLE,
    *,
    size: Sequence[int] | None = None,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """Predicts the class of every pixel, and the probability that the model gives it.

    Args:
        model: A callable that maps images to logits (B, K, h, w), or to probabilities if it has a true attribute
            `gives_probabilities`, and has `align_corners`.
        images: Normalised images, as in `labels`.
        protocol: Scales, windows and flips.
        size: Height and width of the original images; by default those of `images`.
        keep: Called with the probabilities of all classes, a few rows at a time: the number of the image, its first
            row, and (K, rows, W), which the next call may overwrite. Memory never holds those of a whole image.

    Returns:
        Labels (B, H, W), as `labels` returns, and probabilities (B, H, W).

    Example:
        >>> classes, sure = confidence(model, images)
    """
    size, corners = _size(images, size), align_corners(model)
    averaged = protocol.averages or getattr(model, "gives_probabilities", False)
    found: list[Tensor] = []
    sure: list[Tensor] = []
    with torch.no_grad():
        for which, rows, scores in _scores_to_resize(model, images, protocol, size):
            found.append(upsample_argmax(scores, (rows.stop - rows.start, size[1]), align_corners=corners))
            sure.append(winning(scores, found[-1], corners, averaged, keep and _moved(keep, which.start, rows.start)))
    return _joined(found, size), _joined(sure, size)


def probabilities(
    model: Model, images: Images, protocol: Protocol = WHOLE, *, size: Sequence[int] | None = None
) -> Tensor:
    """Computes class probabilities (B, K, H, W), averaged over the protocol's ratios and flips.

    A model with one logit has two classes; the probability of the second is the sigmoid.

    Besides the result, memory holds the logits of one image at the size of its view, and one view at a time if `images`
    is an iterator.

    Args:
        model: A callable that maps images to logits (B, K, h, w) and has `align_corners`.
        images: Normalised images, as in `labels`.
        protocol: Scales, windows and flips.
        size: Height and width of the original images; by default those of `images`.

    Returns:
        Probabilities in float32, or float64 if the model returns float64.

    Example:
        >>> mean = probabilities(model, images, Protocol(flip=True))
    """
    size = _size(images, size)
    total: Tensor | None = None
    with torch.no_grad():
        for view in _views(images, protocol):
            if total is not None and view.shape[0] != total.shape[0]:
                raise ValueError(
                    f"images: expected {total.shape[0]} in each view, as in the first, got {tuple(view.shape)}"
                )
            for mirrored in (False, True) if protocol.flip else (False,):
                for which, logits in _logits_to_resize(model, view.flip(3) if mirrored else view, protocol, size):
                    if total is None:
                        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
                        shape = view.shape[0], logits.shape[1], *size
                        total = torch.zeros(shape, dtype=dtype, device=logits.device)
                    corners = align_corners(model)
                    upsample_softmax(logits, size, flip=mirrored, align_corners=corners, out=total[which])
        assert total is not None  # _views checks that every ratio has a view
        return total.div_(len(protocol.ratios) * (1 + protocol.flip))


@contextmanager
def in_evaluation(model: nn.Module, precision: Precision = "float32") -> Iterator[None]:
    """Puts a model in evaluation mode and a precision (autocast), and restores the mode of each module afterwards."""
    check_choice(precision, "precision", get_args(Precision))
    training = [module for module in model.modules() if module.training]
    device, low = next(model.parameters()).device.type, precision != "float32"
    model.eval()
    try:
        with torch.autocast(device, getattr(torch, precision) if low else None, enabled=low):
            yield
    finally:
        for module in training:
            module.training = True


def _given_labels(model: Model, images: Images, protocol: Protocol, size: tuple[int, int]) -> Tensor:
    """Returns the labels of a model that gives labels (apcnet.exported): of whole images at their own size alone."""
    (view, *others) = _views(images, protocol)
    if others or protocol.window or protocol.averages or tuple(view.shape[2:]) != size:
        raise model.no_logits()
    return model.labels(view)


def _joined(parts: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Joins what `_scores_to_resize` yielded in turn to maps (B, H, W)."""
    if len(parts) == 1:  # always so while a model is exported, whose sizes are symbols
        return parts[0]
    return torch.cat([part.flatten(0, 1) for part in parts]).view(-1, *size)


def winning(scores: Tensor, labels: Tensor, corners: bool, are_probabilities: bool, keep: Keep | None = None) -> Tensor:
    """Returns the probability (B, H, W) of each pixel's label, from scores that are still to be resized to its size.

    The scores are resized along their columns first, and then a few rows at a time along their rows, so that memory
    never holds the scores of all classes at the size of the result. `keep` sees the probabilities of all classes.
    """
    height, width = labels.shape[1:]
    tall = _resized_columns(scores, height, corners)
    rows = max(1, BAND // (scores.shape[1] * width))
    found = torch.empty(labels.shape, dtype=tall.dtype, device=labels.device)
    for image, (part, label) in enumerate(zip(tall.split(1), labels.split(1), strict=True)):
        for top in range(0, height, rows):
            band = part[:, :, top : top + rows]
            if are_probabilities:
                band = F.interpolate(band, (band.shape[2], width), mode="bilinear", align_corners=corners)
            else:
                band = upsample_softmax(band, (band.shape[2], width), align_corners=corners)
            if keep is not None:
                keep(image, top, band[0])
            found[image, top : top + rows] = band[0].gather(0, label[:, top : top + rows].long())[0]
    return found


def _moved(keep: Keep, image: int, row: int) -> Keep:
    """Returns a function that calls `keep` with numbers of images and rows from these on."""
    return lambda i, top, band: keep(image + i, row + top, band)


def _resized_columns(scores: Tensor, height: int, corners: bool) -> Tensor:
    """Resizes scores (B, K, h, w) to (B, K, height, w), in float32 or float64."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.shape[2] == height:
        return scores
    return F.interpolate(scores, (height, scores.shape[3]), mode="bilinear", align_corners=corners)


def _loss(scores: Tensor, target: Tensor, ignored: int, corners: bool, are_probabilities: bool) -> float:
    """Returns the sum of the cross entropy over the labelled pixels."""
    if not are_probabilities:
        options = {"ignore_index": ignored, "reduction": "sum", "align_corners": corners}
        return upsample_cross_entropy(scores, target, **options).item()
    labelled = target != ignored
    true = torch.where(labelled, target, 0).long()
    found = winning(scores, true, corners, True).double().clamp_min(torch.finfo(torch.float32).tiny)
    return -found.log()[labelled].sum().item()


def _scores_to_resize(
    model: Model, images: Images, protocol: Protocol, size: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields images and rows of the result, from first to last, with the scores whose argmax, resized, is the label."""
    if protocol.averages:
        scores = probabilities(model, images, protocol, size=size)
        yield slice(0, scores.shape[0]), slice(0, size[0]), scores
        return
    (view,) = list(_views(images, protocol))  # several views raise an error
    if protocol.window and protocol.stride and size == tuple(view.shape[2:]):
        for i, image in enumerate(view.split(1)):
            for top, rows in slide_bands(model, image, protocol.window, protocol.stride):
                yield slice(i, i + 1), slice(top, top + rows.shape[2]), of_classes(rows)
        return
    for which, logits in _logits_to_resize(model, view, protocol, size):
        yield which, slice(0, size[0]), logits


def _logits_to_resize(
    model: Model, view: Tensor, protocol: Protocol, size: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """Yields images with their logits before the last resize, to `size`.

    Logits at the size of the view are yielded one image at a time.
    """
    if protocol.window and protocol.stride:
        for i, image in enumerate(view.split(1)):
            yield slice(i, i + 1), of_classes(slide_logits(model, image, protocol.window, protocol.stride))
        return
    if protocol.single_resize and size != tuple(view.shape[2:]) and getattr(model, "gives_upsampled", False):
        raise model.no_logits()
    logits = of_classes(head_logits(model, view))
    if protocol.single_resize or size == tuple(view.shape[2:]):
        yield slice(0, logits.shape[0]), logits
        return
    for i, image in enumerate(logits.split(1)):
        yield slice(i, i + 1), resized(model, image, view.shape[2:])


def of_classes(logits: Tensor) -> Tensor:
    """Returns logits of classes: a single logit z becomes those of two, (0, z), whose softmax is its sigmoid."""
    return F.pad(logits, (0, 0, 0, 0, 1, 0)) if logits.shape[1] == 1 else logits


def _views(images: Images, protocol: Protocol) -> Iterator[Tensor]:
    """Yields the images at each of the protocol's ratios."""
    count = 0
    for view in [images] if isinstance(images, Tensor) else images:
        check_images(view)
        yield view
        count += 1
    if count != len(protocol.ratios):
        raise ValueError(f"images: expected a view at each of the ratios {protocol.ratios}, got {count} views")


def _size(images: Images, size: Sequence[int] | None) -> tuple[int, int]:
    """Returns the height and width of the result."""
    if size is not None:
        return checked_pair(size, "size")
    if not isinstance(images, Tensor):
        given = type(images).__name__
        raise TypeError(f"images: expected a tensor, got {given}; for several views, pass the images' size (H, W)")
    check_images(images)
    return images.shape[2], images.shape[3]
