"""Implements ResNetV1c: a ResNet with a stem of three 3×3 convolutions, dilated to keep 1/8 of the image's size.

Layers and parameters have ResNetV1c's usual names (layer3.0.conv2.weight). A bottleneck's 3×3 convolution holds its
stride; the first block of a dilated stage has half the stage's dilation. With a stem of one 7×7 convolution it is
torchvision's ResNet, dilated or not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apc_kernels
from apcnet.choices import check_choice

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CHANNELS_LAST = 64  # from so many channels of the first map on, maps on a CPU are channels_last: every layer is faster
STAGES = {8: ((1, 2, 1, 1), (1, 1, 2, 4)), 16: ((1, 2, 2, 1), (1, 1, 1, 2)), 32: ((1, 2, 2, 2), (1, 1, 1, 1))}


class ResNetV1c(nn.Module):
    """Computes the feature maps of a ResNet's four stages from images.

    Args:
        depth: Number of layers: 18, 34, 50 or 101.
        output_stride: Stride of the last map, in pixels of the image: 8, 16 or 32.
        width: Number of channels of the first stage's 3×3 convolutions; 64 in the published models.
        stem_width: Number of channels of the stem's result.
        stem: "deep", three 3×3 convolutions, or "7x7", one convolution as in torchvision.
        in_channels: Number of channels of the images.

    Attributes:
        channels: Numbers of channels of the four maps.
        strides: Strides of the four maps, in pixels of the image.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        output_stride: int = 8,
        width: int = 64,
        stem_width: int = 64,
        stem: str = "deep",
        in_channels: int = 3,
    ):
        super().__init__()
        check_choice(stem, "stem", ("deep", "7x7"))
        if output_stride not in STAGES:
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
        block = BasicBlock if depth < 50 else Bottleneck
        half, self.in_channels = stem_width // 2, in_channels
        layers = (
            (*_conv_norm(in_channels, half, 3, stride=2), nn.ReLU(inplace=True),
             *_conv_norm(half, half, 3), nn.ReLU(inplace=True),
             *_conv_norm(half, stem_width, 3), nn.ReLU(inplace=True))
            if stem == "deep"
            else (*_conv_norm(in_channels, stem_width, 7, stride=2), nn.ReLU(inplace=True))
        )  # fmt: skip
        self.stem = nn.Sequential(*layers)
        channels, total = stem_width, 4
        self.channels, self.strides = [], []
        for stage, (blocks, stride, dilation) in enumerate(zip(BLOCKS[depth], *STAGES[output_stride], strict=True)):
            first = block(channels, width << stage, stride, max(dilation // 2, 1))
            channels, total = (width << stage) * block.expansion, total * stride
            rest = [block(channels, width << stage, 1, dilation) for _ in range(1, blocks)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            self.channels.append(channels)
            self.strides.append(total)
        initialise(self)
        for module in self.modules():  # every block starts as the identity
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.device.type == "cpu" and self.channels[0] >= CHANNELS_LAST and not torch.compiler.is_exporting():
            images = images.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(self.stem(images), kernel_size=3, stride=2, padding=1)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class BasicBlock(nn.Module):
    """Adds two 3×3 convolutions to the input, which takes a 1×1 convolution first if the shapes differ."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(in_channels, width, 3, stride=stride, dilation=dilation)
        self.conv2, self.bn2 = _conv_norm(width, width, 3)
        self.downsample = _downsample(in_channels, width, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(convolve(self.conv1, x)), inplace=True)
        y = self.bn2(convolve(self.conv2, y))
        y += shortcut(self.downsample, x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """Adds a 3×3 convolution between two 1×1 ones to the input, as BasicBlock does."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(in_channels, width, 1)
        self.conv2, self.bn2 = _conv_norm(width, width, 3, stride=stride, dilation=dilation)
        self.conv3, self.bn3 = _conv_norm(width, width * self.expansion, 1)
        self.downsample = _downsample(in_channels, width * self.expansion, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(convolve(self.conv1, x)), inplace=True)
        y = F.relu(self.bn2(convolve(self.conv2, y)), inplace=True)
        y = self.bn3(convolve(self.conv3, y))
        y += shortcut(self.downsample, x)
        return F.relu(y, inplace=True)


def shortcut(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    """Returns what a block adds to its result: its input, or a convolution and batch norm of it."""
    if downsample is None:
        return x
    conv, norm = downsample
    return norm(convolve(conv, x))


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Applies a convolution of a block, by the operations of apc_kernels where its stride is 1."""
    if conv.stride != (1, 1):
        return conv(x)
    if conv.kernel_size == (1, 1):
        return apc_kernels.conv1x1(x, conv.weight)
    return apc_kernels.conv3x3(x, conv.weight, dilation=conv.dilation[0])


def initialise(backbone: nn.Module) -> None:
    """Initialises a backbone's convolutions for training from scratch."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv_norm(in_channels: int, channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1):
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, dilation, bias=False)
    return conv, nn.BatchNorm2d(channels)


def _downsample(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(*_conv_norm(in_channels, channels, 1, stride=stride))
