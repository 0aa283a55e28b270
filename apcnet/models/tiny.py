"""A backbone to try things out with on a CPU; it sees so little at once that context is the head's work."""

from torch import Tensor, nn

from apcnet.models.resnet import initialise

STRIDES = {4: (1, 1, 1, 1), 8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}


class Tiny(nn.Module):
    """Images to the maps of its four stages, each a convolution, batch norm and ReLU. At stride 4 a position sees
    19 pixels around it, so that a head which looks no further than its neighbours cannot know what is in the picture.

    Args:
        output_stride: of the last stage to the image: 4, 8, 16 or 32.
        width: channels of every stage; 64 make 0.17 million parameters, 32 a quarter of it.

    `channels` and `strides` are those of the four maps, as in ResNetV1c.
    """

    def __init__(self, *, output_stride: int = 4, width: int = 64):
        super().__init__()
        if output_stride not in STRIDES:
            raise ValueError(f"output_stride: expected 4, 8, 16 or 32, got {output_stride}")
        self.stem = nn.Sequential(*_layer(3, width // 2, 2), *_layer(width // 2, width, 2))
        self.stages = nn.ModuleList(nn.Sequential(*_layer(width, width, stride)) for stride in STRIDES[output_stride])
        self.channels, self.strides, total = [width] * 4, [], 4
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
