"""Semantic FPN: a feature pyramid neck, and a head that brings its levels to a quarter of the size and adds them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.models.layers import Classifier, ConvNormReLU


class FPN(nn.Module):
    """Feature pyramid: every map takes what the coarser ones know, top down.

    Args:
        in_channels: of the backbone's maps.
        norm: batch norm and ReLU behind every convolution (sssegmentation's); otherwise a bias (mmsegmentation's).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, norm: bool = False):
        super().__init__()
        block = ConvNormReLU if norm else _conv
        self.laterals = nn.ModuleList(block(c, channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(block(channels, channels, 3) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
        return [output(x) for output, x in zip(self.outputs, maps, strict=True)]


class FPNHead(nn.Module):
    """Semantic FPN's head: each level is convolved and doubled in size until it has the first level's, then added.

    Args:
        in_channels: of features[i] for i in index.
        strides: of these maps to the image.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 128,
        strides: Sequence[int] = (4, 8, 16, 32),
        dropout: float = 0.1,
        align_corners: bool = False,
        index: Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        self.index, self.align_corners = tuple(index), align_corners
        self.levels = nn.ModuleList()
        for width, stride in zip(in_channels, strides, strict=True):
            doublings = (stride // strides[0]).bit_length() - 1
            if stride != strides[0] << doublings:
                raise ValueError(f"strides: expected the first one times powers of two, got {tuple(strides)}")
            widths = [width, *[channels] * max(doublings, 1)]
            convs = (ConvNormReLU(a, b, 3) for a, b in pairwise(widths))
            self.levels.append(nn.ModuleList(convs))
        self.doubled = [stride != strides[0] for stride in strides]
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        total = None
        for i, convs, doubled in zip(self.index, self.levels, self.doubled, strict=True):
            x = features[i]
            for conv in convs:
                x = conv(x)
                if doubled:
                    x = self._resized(x, (2 * x.shape[2], 2 * x.shape[3]))
            total = x if total is None else total + self._resized(x, total.shape[2:])
        return self.classifier(total)

    def _resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if not torch.compiler.is_compiling() and tuple(x.shape[2:]) == tuple(size):
            return x
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=self.align_corners)


def _conv(in_channels: int, channels: int, kernel_size: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
