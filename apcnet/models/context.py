"""Holds what heads gather from elsewhere in an image, as maps to look at: `model.context_maps(images)` returns them.

The heads themselves never store these maps. They are float32, or float64 for a model in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels

Box = tuple[int, int, int, int]  # top, left, bottom, right


class ContextMaps(NamedTuple):
    """Holds how strongly every position of a head's map is tied to the regions of a pyramid, or to codewords.

    Regions are in row-major order, s·s of them at scale s. Every tuple has one tensor for each scale, and is empty for
    heads that have no such maps.

    Attributes:
        size: Height and width (h, w) of the head's map.
        align_corners: How the map lies over the image, as in `torch.nn.functional.interpolate`.
        scales: Grid sizes of the pyramid.
        affinities: APCNet: the affinities σ(x·wᵀ + b) of positions to regions, (B, s·s, h, w), 0 to 1. `b` contains the
            global guide.
        similarities: PSPNet, UPerNet: the cosine of the features at a position and their mean over a region,
            (B, s·s, h, w), 0 to 1. These heads weight regions by place alone: the cosine is a way to look at them.
        regions: The pooled and reduced vectors of the regions, (B, s·s, C).
        assignments: EncNet: the softmax over K codewords by which a position is assigned to them, (B, K, h, w).
    """

    size: tuple[int, int]
    align_corners: bool
    scales: tuple[int, ...] = ()
    affinities: tuple[Tensor, ...] = ()
    similarities: tuple[Tensor, ...] = ()
    regions: tuple[Tensor, ...] = ()
    assignments: Tensor | None = None

    def boxes(self, scale: int) -> list[Box]:
        """Returns the positions that each region of a scale pools, as (top, left, bottom, right), ends excluded.

        Bins are those of adaptive average pooling: region i of s spans floor(i·h/s) to ceil((i+1)·h/s), so that
        neighbours share a row or column where s does not divide h.
        """
        rows, columns = (
            [(i * length // scale, -(-(i + 1) * length // scale)) for i in range(scale)] for length in self.size
        )
        return [(top, left, bottom, right) for top, bottom in rows for left, right in columns]

    def places(self, image_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the row of the map nearest to each row of an image (H, W), and the column nearest to each column."""
        rows, columns = map(self._nearest, image_size, self.size)
        return rows, columns

    def _nearest(self, pixels: int, positions: int) -> Tensor:
        index = torch.arange(pixels)
        if self.align_corners:
            steps = max(pixels - 1, 1)
            return (2 * index * (positions - 1) + steps) // (2 * steps)
        return (2 * index + 1) * positions // (2 * pixels)


def cosines(features: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Computes the cosine of the features at each position and their mean over each region, (B, s·s, h, w) a scale."""
    features = features if features.dtype == torch.float64 else features.float()
    means = F.normalize(apc_kernels.pyramid_pool(features, scales), dim=1).mT  # (B, J, C)
    cosine = means @ F.normalize(features, dim=1).flatten(2)
    return split_scales(cosine.unflatten(2, features.shape[2:]), scales)


def split_scales(regions: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Splits a tensor (B, J, …) into those of the scales, (B, s·s, …)."""
    return regions.split([s * s for s in scales], dim=1)
