"""Implements APCNet's head. The context modules of all scales run together: each is a slice of every tensor here."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import apc_kernels
from apcnet.models.context import ContextMaps, split_scales
from apcnet.models.layers import (
    Classifier,
    ConvNormReLU,
    RegionReduction,
    batch_norm,
    check_values,
    group_of,
    parameter,
    promoted,
)

# The stages of an adaptive context module, for each scale s of the pyramid, C channels:
#   regions   pool to s×s, reduce                              (B, C, s²)
#   x         reduce the map                                   (B, C, h, w)
#   g         reduce x's mean over the map: the global guide   (B, C)
#   A         σ(affinity(x + g))                               (B, h·w, s²)
#   z         residual(A·regions) + x                          (B, C, h, w)
#   fusion(z)


class APCHead(nn.Module):
    """Predicts classes from the features and from what each position gathers from pooled regions (APCNet).

    Args:
        in_channels: Number of channels of the features, `features[index]`.
        num_classes: Number of classes.
        channels: Number of channels of each context module and of the bottleneck.
        scales: Grid sizes of the pyramid; the published model uses (1, 2, 3, 6).
        fusion: Add a 1×1 convolution after every context module.
        guide: Add the map's mean to the input of the affinities (the paper's global-guided local affinity).
        plain: Build the module as the paper writes it: no batch norm and ReLU on regions and guide, no residual
            convolution, no fusion. By default it is built as in the official implementation.
        dropout: Probability that the classifier drops a channel.
        align_corners: How the logits are resized, as in `torch.nn.functional.interpolate`.
        index: Position of the head's input in the backbone's list of maps.
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
        # One row for each region of each scale. Each scale reads its own channels only.
        self.affinity = nn.Conv2d(channels, rows, kernel_size=1)
        # In the official form, guide and residual only hold parameters: adaptive_context_norm computes them.
        side_by_side = {"convolutions": count, "grouped": True}
        self.guide = self.residual = self.fusion = None
        if guide and plain:
            self.guide = nn.Conv2d(stacked, stacked, kernel_size=1, groups=count)
        elif guide:
            self.guide = ConvNormReLU(stacked, stacked, **side_by_side)
        if not plain:
            self.residual = ConvNormReLU(stacked, stacked, **side_by_side)
            # Separate convolutions take half the time of a grouped one.
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

    def context_maps(self, features: Sequence[Tensor]) -> ContextMaps:
        """Computes the affinities that `context` works with and never stores, for a head in evaluation."""
        features = features[self.index]
        x, regions = self.reduction(features), self.regions(features).mT
        weights = split_scales(promoted(x, self.affinity.weight.flatten(1))[None], self.scales)
        biases = split_scales(self._guided(x).expand(len(x), -1), self.scales)
        parts = x.to(biases[0].dtype).flatten(2).chunk(len(self.scales), dim=1)
        affinities = tuple(
            torch.sigmoid(weight @ part + bias[..., None]).unflatten(2, x.shape[2:])
            for weight, part, bias in zip(weights, parts, biases, strict=True)
        )
        vectors = split_scales(promoted(x, regions), self.scales)
        size = (x.shape[2], x.shape[3])
        return ContextMaps(size, self.align_corners, self.scales, affinities=affinities, regions=vectors)

    def context(self, x: Tensor, regions: Tensor) -> Tensor:
        """Computes the context of all scales: x (B, S·C, h, w), regions (B, J, C) -> (B, S·C, h, w)."""
        affinity, residual, guide = self.affinity, self.residual, self.guide
        regions, weight = promoted(x, regions), _rows(x, affinity)
        if residual is None:
            return apc_kernels.adaptive_context(x, regions, weight, self._guided(x), self.scales, residual=True)
        training, guided = residual.norm.training, {}
        if guide is not None:
            if guide.norm.training and len(x) == 1:
                check_values(guide.norm, x[:, :, :1, :1])
            guided = {"guide": _rows(x, guide.conv), "guide_norm": batch_norm(guide.norm, x)}
        z = apc_kernels.adaptive_context_norm(
            x,
            regions,
            weight,
            promoted(x, parameter(affinity, "bias")),
            self.scales,
            _rows(x, residual.conv),
            batch_norm(residual.norm, x),
            **guided,
            training=training,
            group=group_of(residual.norm),
        )
        if training:
            for block in (residual, guide):
                if block is not None:
                    block.norm.num_batches_tracked.add_(1)
        return z

    def _guided(self, x: Tensor) -> Tensor:
        """Returns the bias of the affinities: (J,), or (B, J) with the guide folded in."""
        weight, bias = self.affinity.weight.flatten(1), self.affinity.bias
        if self.guide is None:
            return promoted(x, bias)
        guides = self.guide(x.mean((2, 3), keepdim=True)).flatten(1).chunk(len(self.scales), dim=1)
        weights = weight.split([s * s for s in self.scales])
        return promoted(x, torch.cat([g @ w.mT for g, w in zip(guides, weights, strict=True)], dim=1) + bias)


def _rows(x: Tensor, conv: nn.Module) -> Tensor:
    """Returns the weight of a 1×1 convolution as a matrix, in the dtype that apc_kernels takes with the map x."""
    return promoted(x, parameter(conv, "weight").flatten(1))
