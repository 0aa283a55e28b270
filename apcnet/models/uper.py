"""Implements UPerNet's head: PSPNet's pyramid pooling on the last map, and a feature pyramid over all maps."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.models.context import ContextMaps
from apcnet.models.layers import Classifier, ConvNormReLU, RegionReduction
from apcnet.models.psp import PyramidBottleneck, pooled_maps


class UPerHead(nn.Module):
    """Predicts classes from all maps of a backbone, each added to the coarser ones (UPerNet).

    The 3×3 convolution of all levels takes them as they are, without their concatenation.

    Args:
        in_channels: Numbers of channels of the maps `features[i] for i in index`, the finest first.
        num_classes: Number of classes.
        channels: Number of channels of each scale, of each level and of the head's result.
        scales: Grid sizes of the pyramid; the published model uses (1, 2, 3, 6).
        dropout: Probability that the classifier drops a channel.
        align_corners: How grids, levels and logits are resized, as in `torch.nn.functional.interpolate`.
        index: Positions of the head's inputs in the backbone's list of maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
        index: Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        self.index, self.align_corners, self.scales = tuple(index), align_corners, tuple(scales)
        *others, last = in_channels
        self.regions = RegionReduction(last, channels, self.scales)
        self.bottleneck = PyramidBottleneck(last, len(self.scales) * channels, channels)
        self.laterals = nn.ModuleList(ConvNormReLU(c, channels) for c in others)
        self.outputs = nn.ModuleList(ConvNormReLU(channels, channels, kernel_size=3) for _ in others)
        self.fusion = ConvNormReLU(len(in_channels) * channels, channels, kernel_size=3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *others, last = (features[i] for i in self.index)
        level = self.bottleneck(last, self.regions, self.align_corners)
        levels = [level]
        stages = list(zip(others, self.laterals, self.outputs, strict=True))
        for x, lateral, output in reversed(stages):
            level = lateral(x) + self._resized(level, x)
            levels.insert(0, output(level))
        finest, *coarser = levels
        return self.classifier(self.fusion(finest, *(self._resized(level, finest) for level in coarser)))

    def context_maps(self, features: Sequence[Tensor]) -> ContextMaps:
        """Computes the regions pooled from the last map, and how similar its positions are to each."""
        return pooled_maps(features[self.index[-1]], self.regions, self.align_corners)

    def _resized(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=self.align_corners)
