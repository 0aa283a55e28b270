"""What a test protocol makes of logits: labels, a confusion matrix, or probabilities, at the original images' size.

A protocol (apcnet.config.Protocol) says how a model is tested: at which scales, by which window, mirrored or not. All
that follows from it does so here. The rules are mmsegmentation's: logits are resized to the network's input, and from
there to the original image. Only the first of the two is ever formed, of one image at a time; the last is fused with
what is made of it. `images` are normalised, (B, 3, h, w), at the scale that the network sees them at; where a protocol
has several ratios, an iterable with the same images at each of them, one after the other.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from apc_kernels import upsample_argmax, upsample_confusion, upsample_softmax
from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.data.augment import checked_pair
from apcnet.inference.logits import Model, align_corners, check_images, head_logits, resized, slide_bands, slide_logits

WHOLE = Protocol()
Images = Tensor | Iterable[Tensor]


def labels(model: Model, images: Images, protocol: Protocol = WHOLE, *, size: Sequence[int] | None = None) -> Tensor:
    """The class of every pixel, (B, H, W): uint8 for up to 256 classes, wider beyond, as upsample_argmax.

    Args:
        protocol: how the model is tested. Of a sliding window over images of the result's size only one band of logits
            exists; single_resize needs the least memory, but about 0.2 % of its labels are not mmsegmentation's.
        size: (H, W) of the original images; that of `images` if not given.
    """
    size = _size(images, size)
    with torch.no_grad():
        parts = [
            upsample_argmax(scores, (rows.stop - rows.start, size[1]), align_corners=align_corners(model))
            for _, rows, scores in _last_scores(model, images, protocol, size)
        ]
        if len(parts) == 1:  # always so while a model is exported, whose sizes are symbols
            return parts[0]
        return torch.cat([part.flatten(0, 1) for part in parts]).view(-1, *size)


def confusion(
    model: Model, images: Images, target: Tensor, protocol: Protocol = WHOLE, *, ignore_index: int = 255
) -> Tensor:
    """The confusion matrix of the labels with the true ones, which lie at the size of the original images.

    Args:
        target: (B, H, W), the true labels, uint8, int16, int32 or int64.
        protocol: as in labels; these are never formed.
        ignore_index: of pixels that are not counted.

    Returns:
        (K, K) int64, rows: target, columns: prediction, of all images together.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if target.dim() != 3 or (isinstance(images, Tensor) and target.shape[0] != images.shape[0]):
        raise ValueError(f"target: expected ({len(images)}, H, W), as many as images, got {tuple(target.shape)}")
    counting = {"ignore_index": ignore_index, "align_corners": align_corners(model)}
    with torch.no_grad():
        return sum(
            upsample_confusion(scores, target[which, rows], **counting)
            for which, rows, scores in _last_scores(model, images, protocol, tuple(target.shape[1:]))
        )


def probabilities(
    model: Model, images: Images, protocol: Protocol = WHOLE, *, size: Sequence[int] | None = None
) -> Tensor:
    """The mean of the class probabilities over the protocol's ratios and mirror images, (B, K, H, W) at `size`.

    float32 (float64 for float64 logits). Beside it only the logits of one image at the size of its view exist, and of
    the views no more than one if an iterator gives them.
    """
    size, total = _size(images, size), None
    with torch.no_grad():
        for view in _views(images, protocol):
            if total is not None and view.shape[0] != total.shape[0]:
                raise ValueError(f"images: expected {total.shape[0]}, as in the first view, got {tuple(view.shape)}")
            for mirrored in (False, True) if protocol.flip else (False,):
                for which, logits in _last_logits(model, view.flip(3) if mirrored else view, protocol, size):
                    if total is None:
                        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
                        total = logits.new_zeros(view.shape[0], logits.shape[1], *size, dtype=dtype)
                    corners = align_corners(model)
                    upsample_softmax(logits, size, flip=mirrored, align_corners=corners, out=total[which])
        return total.div_(len(protocol.ratios) * (1 + protocol.flip))


@contextmanager
def in_evaluation(model: nn.Module, precision: Precision = "float32") -> Iterator[None]:
    """The model in evaluation mode, with products in a precision (autocast); afterwards each of its parts is in its
    own mode again, which need not be that of all.
    """
    check_choice(precision, "precision", get_args(Precision))
    training = [part for part in model.modules() if part.training]
    device, low = next(model.parameters()).device.type, precision != "float32"
    model.eval()
    try:
        with torch.autocast(device, getattr(torch, precision) if low else None, enabled=low):
            yield
    finally:
        for part in training:
            part.training = True


def _last_scores(
    model: Model, images: Images, protocol: Protocol, size: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """From the first image's top to the last one's bottom: which images and rows of the result, and the scores that
    have to be resized to these, if at all, for their largest to be the label.
    """
    if protocol.averages:
        scores = probabilities(model, images, protocol, size=size)
        yield slice(0, scores.shape[0]), slice(0, size[0]), scores
        return
    (view,) = list(_views(images, protocol))  # of more than one the count is an error
    if protocol.window and size == tuple(view.shape[2:]):
        for i, image in enumerate(view.split(1)):
            for top, rows in slide_bands(model, image, protocol):
                yield slice(i, i + 1), slice(top, top + rows.shape[2]), rows
        return
    for which, logits in _last_logits(model, view, protocol, size):
        yield which, slice(0, size[0]), logits


def _last_logits(
    model: Model, view: Tensor, protocol: Protocol, size: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """Which images, and their logits that only one resize, to `size`, is left to be done with.

    Logits of the size of the view are those of one image at a time.
    """
    if protocol.window:
        for i, image in enumerate(view.split(1)):
            yield slice(i, i + 1), slide_logits(model, image, protocol.window, protocol.stride)
        return
    logits = head_logits(model, view)
    if protocol.single_resize or size == tuple(view.shape[2:]):
        yield slice(0, logits.shape[0]), logits
        return
    for i, image in enumerate(logits.split(1)):
        yield slice(i, i + 1), resized(model, image, view.shape[2:])


def _views(images: Images, protocol: Protocol) -> Iterator[Tensor]:
    """The images at each of the protocol's ratios."""
    count = 0
    for view in [images] if isinstance(images, Tensor) else images:
        check_images(view)
        yield view
        count += 1
    if count != len(protocol.ratios):
        raise ValueError(f"images: expected them at each of the ratios {protocol.ratios}, got {count} views")


def _size(images: Images, size: Sequence[int] | None) -> tuple[int, int]:
    if size is not None:
        return checked_pair(size, "size")
    if not isinstance(images, Tensor):
        given = type(images).__name__
        raise TypeError(f"images: expected a tensor, got {given}; several views need a size, (H, W) of the originals")
    check_images(images)
    return tuple(images.shape[2:])
