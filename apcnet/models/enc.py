"""EncNet's head: residuals to learned codewords say which channels matter in an image, and which classes it has."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apc_kernels
from apcnet.models.layers import Classifier, ConvNormReLU, beside


class EncHead(nn.Module):
    """Context encoding head.

    Args:
        in_channels: of features[i] for i in index.
        codes: how many codewords there are.
        presence: also predict which classes are in the image (the SE branch); then (logits, presence logits) come out.
        lateral: let the maps before the last one in, too.
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
        *others, last = (features[i] for i in self.index)
        x = self.bottleneck(last)
        if self.fusion is not None:
            x = self._fused(x, others)
        projected = self.project(x)
        codes = apc_kernels.encode(projected, beside(x, self.codewords), beside(x, self.scale))
        encoding = F.relu(self.code_norm(codes.to(self.code_norm.weight.dtype))).mean(dim=1)
        gate = 1 + torch.sigmoid(self.gate(encoding))
        logits = self.classifier(x * gate[:, :, None, None].to(x.dtype))  # both factors are positive: no ReLU to come
        return logits if self.presence is None else (logits, self.presence(encoding))

    def _fused(self, x: Tensor, others: Sequence[Tensor]) -> Tensor:
        laterals = [lateral(features) for lateral, features in zip(self.laterals, others, strict=True)]
        size, align_corners = x.shape[2:], self.align_corners
        enlarged = (F.interpolate(y, size, mode="bilinear", align_corners=align_corners) for y in laterals)
        return self.fusion(x, *enlarged)
