"""Computes conv3x3 in plain PyTorch: convolves each map with its part of the weight, and adds the results."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def conv3x3(maps: Sequence[Tensor], weight: Tensor, dilation: int = 1) -> Tensor:
    weights = weight.split([x.shape[1] for x in maps], dim=1)
    products = [F.conv2d(x, w, padding=dilation, dilation=dilation) for x, w in zip(maps, weights, strict=True)]
    return sum(products[1:], start=products[0])
