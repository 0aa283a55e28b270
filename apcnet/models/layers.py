"""What the heads are made of: convolution + batch norm + ReLU, the reduction of pooled regions, the classifier."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apc_kernels


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU; or `convolutions` of them, whose results lie one after the other.

    With `grouped` each of these has its own share of the input, otherwise all have all of it.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int = 1, *, convolutions: int = 1, grouped: bool = False
    ):
        super().__init__()
        groups = convolutions if grouped else 1
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        fan_out = channels // convolutions * kernel_size**2
        nn.init.normal_(self.conv.weight, std=(2 / fan_out) ** 0.5)

    def forward(self, *maps: Tensor) -> Tensor:
        """Of one map, or of several as if they were concatenated along their channels, which takes a copy of all."""
        weight = self.conv.weight
        if self.conv.kernel_size == (3, 3):
            return self.activate(apc_kernels.conv3x3(maps, weight))
        if len(maps) == 1:
            return self.activate(self.conv(maps[0]))
        parts = zip(maps, weight.split([x.shape[1] for x in maps], dim=1), strict=True)
        return self.activate(sum(F.conv2d(x, part) for x, part in parts))

    def activate(self, product: Tensor) -> Tensor:
        check_values(self.norm, product)
        return F.relu(self.norm(product), inplace=True)


def check_values(norm: nn.Module, x: Tensor) -> None:
    """PyTorch's error where a batch norm in training has one value per channel to normalise, explained."""
    if norm.training and x.shape[0] == 1 and x.shape[2] * x.shape[3] == 1 and not group_of(norm):
        raise ValueError(
            f"images: a batch norm in training needs more than one value per channel, and here is one, of one image "
            f"({tuple(x.shape)}): take two images or more, or model.eval(), or evaluate just the batch norms"
        )


def group_of(norm: nn.Module) -> str:
    """The name of the process group that a batch norm takes its statistics over; "" for this process alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not torch.distributed.is_initialized():
        return ""
    group = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


class RegionReduction(nn.Module):
    """Adaptive average pooling at every scale (pyramid_pool), then a 1×1 convolution, batch norm and ReLU for each.

    Without `norm` a convolution with bias alone, as the paper has it.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int], *, norm: bool = True):
        super().__init__()
        self.scales = tuple(scales)
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"scales: expected at least one scale, each of 1 or more, got {self.scales}")
        reduction = ConvNormReLU if norm else nn.Conv2d
        self.reductions = nn.ModuleList(reduction(in_channels, channels, kernel_size=1) for _ in self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, h, w) -> regions (B, channels, J)"""
        pooled = apc_kernels.pyramid_pool(x, self.scales).split([s * s for s in self.scales], dim=2)
        reduced = [reduce(p.unsqueeze(3)) for reduce, p in zip(self.reductions, pooled, strict=True)]
        return torch.cat(reduced, dim=2).squeeze(3)


class Classifier(nn.Module):
    """Dropout of whole channels, then a 1×1 convolution to the classes."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dropout(x))


def batch_norm(norm: nn.Module, x: Tensor) -> apc_kernels.BatchNorm:
    """A batch norm as adaptive_context_norm takes it, which moves the running statistics where they are."""
    if norm.training and x.dtype != torch.float64 and norm.running_mean.dtype != torch.float32:
        raise ValueError(
            f"model: expected batch norms in float32 in training, got {norm.running_mean.dtype}: train a float32 model "
            "under torch.autocast"
        )
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return apc_kernels.BatchNorm(*(beside(x, tensor) for tensor in tensors), norm.momentum, norm.eps)


def layout_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def beside(x: Tensor, tensor: Tensor) -> Tensor:
    """A small tensor in the precision that the operations of apc_kernels take beside the map x: float32 at least."""
    return tensor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
