"""APCNet's head: adaptive context modules of all scales side by side, each of them a slice of every tensor here."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import apc_kernels
from apcnet.models.layers import Classifier, ConvNormReLU, RegionReduction, batch_norm, beside, check_values, group_of

# The stages of an adaptive context module, for each scale s of the pyramid, C channels:
#   regions   pool to s×s, reduce                              (B, C, s²)
#   x         reduce the map                                   (B, C, h, w)
#   g         reduce x's mean over the map: the global guide   (B, C)
#   A         σ(affinity(x + g))                               (B, h·w, s²)
#   z         residual(A·regions) + x                          (B, C, h, w)
#   fusion(z)


class APCHead(nn.Module):
    """Adaptive Pyramid Context head: the features beside what each of their positions gathers from the pooled regions.

    Args:
        in_channels: of the features, features[index].
        scales: of the pyramid, (1, 2, 3, 6) as published.
        fusion: a convolution behind every module.
        guide: let the affinities see the map's mean (the paper's global-guided local affinity).
        plain: the module as the paper writes it: no batch norm and ReLU on regions and guide, no residual convolution
            and no fusion. The other form is the official implementation's.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        scales: Sequence[int] = (1, 2, 3, 6),
        fusion: bool = True,
        guide: bool = True,
        plain: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        index: int = 3,
    ):
        super().__init__()
        self.index, self.align_corners, self.scales = index, align_corners, tuple(scales)
        count, rows = len(self.scales), sum(s * s for s in self.scales)
        stacked = count * channels
        self.regions = RegionReduction(in_channels, channels, self.scales, norm=not plain)
        self.reduction = ConvNormReLU(in_channels, stacked, convolutions=count)
        # Its rows of all scales, each of which sees the channels of its own scale.
        self.affinity = nn.Conv2d(channels, rows, kernel_size=1)
        # In the official form these two hold parameters; adaptive_context_norm computes what they would.
        side_by_side = {"convolutions": count, "grouped": True}
        self.guide = self.residual = self.fusion = None
        if guide and plain:
            self.guide = nn.Conv2d(stacked, stacked, kernel_size=1, groups=count)
        elif guide:
            self.guide = ConvNormReLU(stacked, stacked, **side_by_side)
        if not plain:
            self.residual = ConvNormReLU(stacked, stacked, **side_by_side)
            # One by one: a grouped convolution takes twice the time of separate ones.
            self.fusion = nn.ModuleList(ConvNormReLU(channels, channels) for _ in self.scales) if fusion else None
        self.bottleneck = ConvNormReLU(in_channels + stacked, channels, kernel_size=3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        features = features[self.index]
        regions = self.regions(features).mT
        context = [self.context(self.reduction(features), regions)]
        if self.fusion is not None:
            maps = context[0].chunk(len(self.scales), dim=1)
            context = [fusion(z) for fusion, z in zip(self.fusion, maps, strict=True)]
        return self.classifier(self.bottleneck(features, *context))

    def context(self, x: Tensor, regions: Tensor) -> Tensor:
        """x (B, S·C, h, w), regions (B, J, C) -> (B, S·C, h, w)"""
        regions, weight = beside(x, regions), beside(x, self.affinity.weight.flatten(1))
        if self.residual is None:
            return apc_kernels.adaptive_context(x, regions, weight, self._guided(x), self.scales, residual=True)
        training, guided = self.residual.norm.training, {}
        if self.guide is not None:
            check_values(self.guide.norm, x[:, :, :1, :1])
            guided["guide"] = beside(x, self.guide.conv.weight.flatten(1))
            guided["guide_norm"] = batch_norm(self.guide.norm, x)
        z = apc_kernels.adaptive_context_norm(
            x,
            regions,
            weight,
            beside(x, self.affinity.bias),
            self.scales,
            beside(x, self.residual.conv.weight.flatten(1)),
            batch_norm(self.residual.norm, x),
            **guided,
            training=training,
            group=group_of(self.residual.norm),
        )
        if training:
            for block in (self.residual, self.guide):
                if block is not None:
                    block.norm.num_batches_tracked.add_(1)
        return z

    def _guided(self, x: Tensor) -> Tensor:
        """The affinities' bias: (J,), or (B, J) with what the affinities' weights make of the guide."""
        weight, bias = self.affinity.weight.flatten(1), self.affinity.bias
        if self.guide is None:
            return beside(x, bias)
        guides = self.guide(x.mean((2, 3), keepdim=True)).flatten(1).chunk(len(self.scales), dim=1)
        weights = weight.split([s * s for s in self.scales])
        return beside(x, torch.cat([g @ w.mT for g, w in zip(guides, weights, strict=True)], dim=1) + bias)
