"""Computes PSPNet's pyramid pooling with the layers of another package: one pooling, and no upsampled grids."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from apc_kernels.ops.pyramid_conv import pyramid_conv
from apc_kernels.ops.pyramid_pool import pyramid_pool


def pooled_grids(x: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Returns AdaptiveAvgPool2d(s)(x), (B, C, s, s), for every scale s."""
    rows = pyramid_pool(x, scales).split([s * s for s in scales], 2)
    return [grid.unflatten(2, (s, s)) for grid, s in zip(rows, scales, strict=True)]


def pyramid_features(
    x: Tensor,
    scales: Sequence[int],
    reductions: Sequence[Callable[[Tensor], Tensor]],
    conv: nn.Conv2d,
    align_corners: bool,
) -> Tensor:
    """Computes a convolution of x and its pooled, reduced and upsampled grids, as if all were concatenated."""
    grids = zip(reductions, pooled_grids(x, scales), strict=True)
    regions = torch.cat([reduce(grid).flatten(2) for reduce, grid in grids], 2)
    return pyramid_conv(regions, conv.weight, x.shape[2:], scales, features=x, align_corners=align_corners)
