"""Implements the FCN head, a few 3×3 convolutions. It is a model's own head, or the auxiliary head of another model."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from apcnet.models.layers import Classifier, ConvNormReLU


class FCNHead(nn.Module):
    """Predicts classes from one map of features by a few convolutions (FCN).

    Args:
        in_channels: Number of channels of the features, `features[index]`.
        num_classes: Number of classes.
        channels: Number of channels of the convolutions.
        convs: Number of convolutions.
        concat: Add a convolution that takes the features and the result of the others.
        kernel_size: Kernel size of all convolutions but the classifier.
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
