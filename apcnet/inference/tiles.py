"""Predicts labels at the size of an image, whatever its size: a larger one is cut into tiles that overlap.

The network sees an image at its own size, or resized to fit a scale. The scores of tiles are averaged band by band, so
memory grows by no more than the image's pixels.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from apc_kernels import upsample_argmax
from apcnet import inference
from apcnet.config import Protocol
from apcnet.data.augment import view, view_sizes
from apcnet.inference.protocol import Keep, winning
from apcnet.models.segmentor import Segmentor

MAX_PIXELS = 2_200_000  # Cityscapes' 2049×1025 are still one piece: about 1.5 GiB with a ResNet-50 in float32
BAND_SCORES = 1 << 28  # of a band of tiles, classes × rows × columns: 1 GiB, and as much again while they are added up
MIN_TILE_ROWS = 256  # a tile has fewer rows than columns if bands would be larger than that, but at least these


def label_images(
    model: Segmentor,
    images: Sequence[Tensor],
    protocol: Protocol,
    max_pixels: int,
    confidence: bool,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Predicts the labels (B, H, W) of images (C, H, W) of one size, and on request the probability of each.

    Several images go through the network together, at most as many as `images_at_once` says. `keep` gets the
    probabilities of all classes, as in `inference.confidence`.
    """
    size = images[0].shape[1], images[0].shape[2]
    sizes = view_sizes(size, protocol.ratios, protocol.test_scale)
    largest = max(sizes, key=math.prod)
    if protocol.window is None and math.prod(largest) > max_pixels:
        (image,) = images
        return _tiled_labels(model, image, sizes, protocol, max_pixels, confidence, keep)
    views = _views(model, images, sizes)
    if protocol.averages and math.prod(size) > max_pixels:
        averaged = min(size, largest, key=math.prod)
        shares = inference.probabilities(model, views, protocol, size=averaged)
        labels = upsample_argmax(shares, size)
        return labels, winning(shares, labels, False, True, keep) if confidence or keep else None
    if confidence or keep:
        return inference.confidence(model, views, protocol, size=size, keep=keep)
    return inference.labels(model, views, protocol, size=size), None


def images_at_once(size: tuple[int, int], protocol: Protocol, max_pixels: int) -> int:
    """Returns the number of images of a size (H, W) that may go through the network together, at least 1."""
    sizes = [size, *view_sizes(size, protocol.ratios, protocol.test_scale)]
    return max(1, max_pixels // max(map(math.prod, sizes)))


def _tiled_labels(
    model: Segmentor,
    image: Tensor,
    sizes: Sequence[tuple[int, int]],
    protocol: Protocol,
    max_pixels: int,
    confidence: bool,
    keep: Keep | None,
) -> tuple[Tensor, Tensor | None]:
    """Predicts the labels of an image that is too large at these sizes, from tiles that overlap by a third."""
    size = image.shape[1:]
    shrinks = math.prod(size) / max(map(math.prod, sizes))
    width = max(1, math.isqrt(int(max_pixels * shrinks)))
    height = min(width, max(MIN_TILE_ROWS, BAND_SCORES // (model.num_classes * size[1])))
    tiles = Tiles(model, [max(view) / max(size) for view in sizes], protocol, image.dtype)
    levels = image[None].half() if image.dtype == torch.uint8 else image[None]  # float16 holds all 256 levels
    stride = max(1, 2 * height // 3), max(1, 2 * width // 3)
    windows = Protocol(window=(height, width), stride=stride)
    if confidence or keep:
        return inference.confidence(tiles, levels, windows, keep=keep)
    return inference.labels(tiles, levels, windows), None


class Tiles:
    """Acts as a model for inference.labels: maps the levels of a tile to its scores, over all scales.

    A tile is resized by the factors of the whole image.
    """

    def __init__(self, model: Segmentor, factors: Sequence[float], protocol: Protocol, dtype: torch.dtype):
        self.model, self.factors, self.protocol, self.dtype = model, factors, protocol, dtype
        if protocol.single_resize and getattr(model, "gives_upsampled", False):
            raise model.no_logits()
        self.align_corners = model.align_corners
        self.gives_probabilities = protocol.averages

    def __call__(self, levels: Tensor) -> Tensor:
        tile, size = levels[0].to(self.dtype), levels.shape[2:]
        views = _views(self.model, [tile], [[max(1, round(n * factor)) for n in size] for factor in self.factors])
        if self.protocol.averages:
            return inference.probabilities(self.model, views, self.protocol, size=size)
        (view,) = views
        return self.model(view) if self.protocol.single_resize else inference.whole_logits(self.model, view)


def _views(model: Segmentor, images: Sequence[Tensor], sizes: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Yields images (C, H, W) of one size, normalised for the network, at one size after the other: (B, C, h, w)."""
    for size in sizes:
        parameter = next(model.parameters(), torch.empty(0))
        views = [view(image, size, model.mean, model.std) for image in images]
        together = torch.stack(views) if len(views) > 1 else views[0][None]
        yield together.to(parameter)  # its device and dtype
