"""Implements EncNet's head: an encoding of the whole image weights the channels and predicts the classes present."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apc_kernels
from apcnet.models.context import ContextMaps
from apcnet.models.layers import Classifier, ConvNormReLU, normalized, parameter, promoted


class EncHead(nn.Module):
    """Weights the features by an encoding of residuals to learned codewords, then predicts classes (EncNet).

    Args:
        in_channels: Numbers of channels of the maps `features[i] for i in index`.
        num_classes: Number of classes.
        channels: Number of channels inside the head.
        codes: Number of codewords.
        presence: Also predict which classes are in the image (the SE branch); the head then returns
            (logits, presence logits).
        lateral: Also use the maps before the last one.
        dropout: Probability that the classifier drops a channel.
        align_corners: How the logits are resized, as in `torch.nn.functional.interpolate`.
        index: Positions of the head's inputs in the backbone's list of maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        codes: int = 32,
        presence: bool = True,
        lateral: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        index: Sequence[int] = (1, 2, 3),
    ):
        super().__init__()
        self.index, self.align_corners = tuple(index), align_corners
        *others, last = in_channels
        self.bottleneck = ConvNormReLU(last, channels, kernel_size=3)
        self.laterals = nn.ModuleList(ConvNormReLU(c, channels) for c in others) if lateral else None
        self.fusion = ConvNormReLU(len(in_channels) * channels, channels, kernel_size=3) if lateral else None
        self.project = ConvNormReLU(channels, channels)
        bound = (codes * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codes, channels).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(codes).uniform_(-1, 0))
        self.code_norm = nn.BatchNorm1d(codes)
        self.gate = nn.Linear(channels, channels)
        self.presence = nn.Linear(channels, num_classes) if presence else None
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        x = self._fused(features)
        projected = self.project(x)
        words, scale, norm = parameter(self, "codewords"), parameter(self, "scale"), self.code_norm
        codes = apc_kernels.encode(projected, promoted(x, words), promoted(x, scale))
        encoding = torch.relu_(normalized(norm, codes.to(parameter(norm, "weight").dtype))).mean(dim=1)
        gate = 1 + torch.sigmoid(self.gate(encoding))
        gate = gate.view(*gate.shape, 1, 1).to(x.dtype)
        logits = self.classifier(x * gate)  # both factors are positive: no ReLU needed
        return logits if self.presence is None else (logits, self.presence(encoding))

    def context_maps(self, features: Sequence[Tensor]) -> ContextMaps:
        """Computes the weights by which `apc_kernels.encode` assigns every position to the codewords."""
        x = self.project(self._fused(features))
        words, scale = promoted(x, self.codewords), promoted(x, self.scale)
        center = words.mean(0)  # distances from afar would cancel
        positions = x.to(words.dtype).flatten(2).mT - center
        squares = torch.cdist(positions, (words - center).expand(len(x), -1, -1)).square()  # (B, N, K)
        weights = (scale * squares).softmax(2).mT.unflatten(2, x.shape[2:])
        return ContextMaps((x.shape[2], x.shape[3]), self.align_corners, assignments=weights)

    def _fused(self, features: Sequence[Tensor]) -> Tensor:
        """Computes the head's map from one or several maps of the backbone."""
        *others, last = (features[i] for i in self.index)
        x = self.bottleneck(last)
        if self.laterals is None or self.fusion is None:
            return x
        laterals = [lateral(features) for lateral, features in zip(self.laterals, others, strict=True)]
        resize = {"size": x.shape[2:], "mode": "bilinear", "align_corners": self.align_corners}
        return self.fusion(x, *(F.interpolate(y, **resize) for y in laterals))
