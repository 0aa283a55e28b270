"""Implements a small backbone for experiments on a CPU. Its view is so narrow that only a head can add context."""

from torch import Tensor, nn

from apcnet.models.resnet import initialise

STRIDES = {4: (1, 1, 1, 1), 8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}


class Tiny(nn.Module):
    """Computes four feature maps from images; each stage is a convolution, batch norm and ReLU.

    At stride 4 a position sees 19 pixels around it, so a head that looks only at neighbours cannot know the scene.

    Args:
        output_stride: Stride of the last map, in pixels of the image: 4, 8, 16 or 32.
        width: Number of channels of every stage; 64 give 0.17 million parameters, 32 a quarter of that.
        in_channels: Number of channels of the images.

    Attributes:
        channels: Numbers of channels of the four maps.
        strides: Strides of the four maps, in pixels of the image.
    """

    def __init__(self, *, output_stride: int = 4, width: int = 64, in_channels: int = 3):
        super().__init__()
        if output_stride not in STRIDES:
            raise ValueError(f"output_stride: expected 4, 8, 16 or 32, got {output_stride}")
        self.stem = nn.Sequential(*_layer(in_channels, width // 2, 2), *_layer(width // 2, width, 2))
        self.stages = nn.ModuleList(nn.Sequential(*_layer(width, width, stride)) for stride in STRIDES[output_stride])
        self.in_channels, self.channels, self.strides, total = in_channels, [width] * 4, [], 4
        for stride in STRIDES[output_stride]:
            total *= stride
            self.strides.append(total)
        initialise(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, features = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _layer(in_channels: int, channels: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
