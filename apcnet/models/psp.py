"""PSPNet's head: the features beside their pooled pyramid, upsampled; here convolved without being upsampled."""

from collections.abc import Sequence

from torch import Tensor, nn

import apc_kernels
from apcnet.models.layers import Classifier, ConvNormReLU, RegionReduction, layout_of


class PSPHead(nn.Module):
    """Pyramid pooling head.

    The 3×3 bottleneck takes the features and, of every scale, a map of a few regions enlarged to their size. A
    convolution of such a map is linear in the regions: pyramid_conv acts on them alone.

    Args:
        in_channels: of the features, features[index].
        scales: of the pyramid, (1, 2, 3, 6) as published.
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
        self.bottleneck = ConvNormReLU(in_channels + len(self.scales) * channels, channels, kernel_size=3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        features = features[self.index]
        regions = self.regions(features)
        channels, width = features.shape[1], self.bottleneck.conv.in_channels
        weight, pyramid_weight = self.bottleneck.conv.weight.split([channels, width - channels], dim=1)
        product = apc_kernels.conv3x3(features, weight)
        product = product + apc_kernels.pyramid_conv(
            regions,
            pyramid_weight,
            features.shape[2:],
            self.scales,
            align_corners=self.align_corners,
            memory_format=layout_of(product),
        )
        return self.classifier(self.bottleneck.activate(product))
