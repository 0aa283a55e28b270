"""Implements Semantic FPN: a feature pyramid neck, and a head that enlarges its levels to the finest and adds them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.models.layers import Classifier, ConvNormReLU


class FPN(nn.Module):
    """Adds every coarser map of a backbone to the next finer one (feature pyramid network).

    Args:
        in_channels: Numbers of channels of the backbone's maps.
        channels: Number of channels of every level of the pyramid.
        norm: Use batch norm and ReLU after every convolution, as sssegmentation does; by default convolutions have a
            bias, as in mmsegmentation.
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
    """Convolves and doubles each level until it has the first level's size, then adds all levels (Semantic FPN).

    Args:
        in_channels: Numbers of channels of the maps `features[i] for i in index`.
        num_classes: Number of classes.
        channels: Number of channels inside the head.
        strides: Strides of these maps, in pixels of the image: the first one times powers of two.
        dropout: Probability that the classifier drops a channel.
        align_corners: How maps and logits are resized, as in `torch.nn.functional.interpolate`.
        index: Positions of the head's inputs in the list of maps.
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
            doublings = int(stride / strides[0]).bit_length() - 1  # strides of patches of 14 pixels are no integers
            if doublings < 0 or stride != strides[0] * 2**doublings:
                raise ValueError(f"strides: expected the first stride times powers of two, got {tuple(strides)}")
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
