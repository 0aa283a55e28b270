"""Implements PSPNet's head. Its bottleneck convolves the pooled pyramid without upsampling it."""

from collections.abc import Sequence

from torch import Tensor, nn

import apc_kernels
from apcnet.models.context import ContextMaps, cosines, split_scales
from apcnet.models.layers import Classifier, ConvNormReLU, RegionReduction, parameter, promoted


class PSPHead(nn.Module):
    """Predicts classes from the features and their average over grids of several sizes (PSPNet).

    The 3×3 bottleneck takes the features and, for every scale, the grid upsampled to their size. A convolution of an
    upsampled grid is linear in the few regions of the grid, so `pyramid_conv` computes it from these.

    Args:
        in_channels: Number of channels of the features, `features[index]`.
        num_classes: Number of classes.
        channels: Number of channels of each scale and of the bottleneck.
        scales: Grid sizes of the pyramid; the published model uses (1, 2, 3, 6).
        dropout: Probability that the classifier drops a channel.
        align_corners: How grids and logits are resized, as in `torch.nn.functional.interpolate`.
        index: Position of the head's input in the backbone's list of maps.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
        index: int = 3,
    ):
        super().__init__()
        self.index, self.align_corners, self.scales = index, align_corners, tuple(scales)
        self.regions = RegionReduction(in_channels, channels, self.scales)
        self.bottleneck = PyramidBottleneck(in_channels, len(self.scales) * channels, channels)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.bottleneck(features[self.index], self.regions, self.align_corners))

    def context_maps(self, features: Sequence[Tensor]) -> ContextMaps:
        """Computes the pooled regions, and how similar every position is to each."""
        return pooled_maps(features[self.index], self.regions, self.align_corners)


def pooled_maps(features: Tensor, reduction: RegionReduction, align_corners: bool) -> ContextMaps:
    """Computes the context maps of a head with a pooling pyramid, from the map that it pools."""
    size, scales = (features.shape[2], features.shape[3]), reduction.scales
    regions = split_scales(promoted(features, reduction(features)).mT, scales)
    return ContextMaps(size, align_corners, scales, similarities=cosines(features, scales), regions=regions)


class PyramidBottleneck(ConvNormReLU):
    """Applies a 3×3 bottleneck to a map and its reduced regions, as if these were upsampled and concatenated to it.

    Args:
        features: Number of channels of the map.
        pyramid: Number of channels of the regions, all scales together.
        channels: Number of channels of the result.
    """

    def __init__(self, features: int, pyramid: int, channels: int):
        super().__init__(features + pyramid, channels, kernel_size=3)
        self.features = features

    def forward(self, x: Tensor, regions: RegionReduction, align_corners: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        product = apc_kernels.pyramid_conv(
            regions(x),
            parameter(self.conv, "weight"),
            x.shape[2:],
            regions.scales,
            features=x,
            align_corners=align_corners,
        )
        return self.activate(product)
