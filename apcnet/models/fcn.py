"""The FCN head, alone a model's head and beside another one its auxiliary head: a few 3×3 convolutions."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from apcnet.models.layers import Classifier, ConvNormReLU


class FCNHead(nn.Module):
    """Convolutions of one map of features.

    Args:
        in_channels: of the features, features[index].
        convs: how many convolutions there are.
        concat: one more convolution, of the features and of what the others made of them.
        kernel_size: of all of these.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        convs: int = 2,
        concat: bool = True,
        kernel_size: int = 3,
        dropout: float = 0.1,
        align_corners: bool = False,
        index: int = 3,
    ):
        super().__init__()
        self.index, self.align_corners = index, align_corners
        widths = [in_channels, *[channels] * convs]
        self.convs = nn.Sequential(*(ConvNormReLU(a, b, kernel_size) for a, b in pairwise(widths)))
        self.concat = ConvNormReLU(in_channels + widths[-1], channels, kernel_size) if concat else None
        self.classifier = Classifier(channels if concat else widths[-1], num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        features = features[self.index]
        x = self.convs(features)
        return self.classifier(x if self.concat is None else self.concat(features, x))
