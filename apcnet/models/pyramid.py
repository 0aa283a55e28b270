"""Implements a small feature pyramid for encoders that have fewer than four maps, as in ViTDet."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

MAPS = 4  # of every backbone
FINEST = 4  # no finer map is made of one with this stride or less


class SimplePyramid(nn.Module):
    """Makes finer maps by transposed convolutions, and coarser ones by max pooling, until there are four.

    Args:
        channels: Numbers of channels of the maps that there are.
        strides: Strides of these maps, in pixels of the image, the smallest first.

    Attributes:
        channels, strides: Those of the four maps.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.channels, self.strides, self.finer = list(channels), list(strides), nn.ModuleList()
        while len(self.strides) < MAPS and self.strides[0] > FINEST:
            stride, width = self.strides[0], self.channels[0]
            self.finer.append(Doubling(width, width // 2, norm=len(self.finer) > 0))
            self.strides.insert(0, stride / 2 if stride % 2 else stride // 2)  # of patches of 14 pixels: 3.5
            self.channels.insert(0, width // 2)
        self.coarser = MAPS - len(self.strides)
        for _ in range(self.coarser):
            self.strides.append(2 * self.strides[-1])
            self.channels.append(self.channels[-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = list(maps)
        for doubling in self.finer:
            maps.insert(0, doubling(maps[0]))
        for _ in range(self.coarser):
            maps.append(F.max_pool2d(maps[-1], 2, ceil_mode=True))
        return maps


class Doubling(nn.Module):
    """Doubles the size of a map by a transposed convolution, which may follow a layer norm and GELU."""

    def __init__(self, in_channels: int, channels: int, *, norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(in_channels) if norm else None
        self.conv = nn.ConvTranspose2d(in_channels, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = F.gelu(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.conv(x)
