"""Implements the parts that the heads share: convolution + batch norm + ReLU, region reduction, classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import apc_kernels


class ConvNormReLU(nn.Module):
    """Applies a convolution without bias, batch norm and ReLU.

    Several convolutions of one shape can share a module; their results are concatenated along the channels.

    Args:
        in_channels: Number of channels of the input.
        channels: Number of channels of the result, all convolutions together.
        kernel_size: 1 or 3; the size of the map is kept.
        convolutions: Number of convolutions that share the module.
        grouped: Give each convolution its own share of the input's channels; by default each takes all of them.
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
        """Takes one map, or several as if they were concatenated along the channels, without that copy."""
        conv = self.conv
        if conv.kernel_size == (3, 3):
            return self.activate(apc_kernels.conv3x3(maps, parameter(conv, "weight")))
        if conv.groups == 1:
            return self.activate(apc_kernels.conv1x1(maps, parameter(conv, "weight")))
        return self.activate(conv(*maps))

    def activate(self, product: Tensor) -> Tensor:
        norm = self.norm
        check_values(norm, product)
        return torch.relu_(normalized(norm, product))


def parameter(module: nn.Module, name: str) -> Tensor:
    """Returns a parameter of a module past the search of its attributes, which takes longer than to use it."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found  # something else computes it: pruning, a parametrization


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a batch norm as calling the module does, past the search of its attributes where it has no hooks."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    training = norm.training
    if hooked or not _is_local(norm) or (training and x.numel() == x.shape[1]):  # the module refuses single values
        return norm(x)
    parameters, buffers = norm._parameters, norm._buffers
    if training:
        buffers["num_batches_tracked"].add_(1)
    affine, running = (parameters["weight"], parameters["bias"]), (buffers["running_mean"], buffers["running_var"])
    return torch.batch_norm(x, *affine, *running, training, norm.momentum, norm.eps, torch.backends.cudnn.enabled)


def check_values(norm: nn.Module, x: Tensor) -> None:
    """Raises an error if a batch norm in training has one value per channel, for which there is no variance."""
    if norm.training and x.shape[0] == 1 and x.shape[2] * x.shape[3] == 1 and not group_of(norm):
        raise ValueError(
            f"images: expected two or more in training, got one: a batch norm over {tuple(x.shape)} has one value per "
            "channel. Use a larger batch, or call model.eval(), or eval() on the batch norms alone"
        )


def group_of(norm: nn.Module) -> str:
    """Returns the name of the process group over which a batch norm takes statistics; "" for this process alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not torch.distributed.is_initialized():
        return ""
    group = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


class RegionReduction(nn.Module):
    """Pools a map to an s×s grid for every scale s, then applies a 1×1 convolution, batch norm and ReLU to each grid.

    With `norm=False` it applies a convolution with bias only, as in APCNet's paper.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int], *, norm: bool = True):
        super().__init__()
        self.scales = tuple(scales)
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"scales: expected at least one scale, each of 1 or more, got {self.scales}")
        reduction = ConvNormReLU if norm else nn.Conv2d
        self.reductions = nn.ModuleList(reduction(in_channels, channels, kernel_size=1) for _ in self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the regions of all scales: x (B, in_channels, h, w) -> (B, channels, J)."""
        pooled, weights, norms, given = apc_kernels.pyramid_pool(x, self.scales), [], [], []
        for reduction in self.reductions:
            if not isinstance(reduction, ConvNormReLU) or not _is_local(norm := reduction._modules["norm"]):
                return self._composed(pooled)
            weights.append(parameter(reduction._modules["conv"], "weight"))
            norms.append(norm)
            given.append(batch_norm(norm, pooled))
        training = norms[0].training
        if training and pooled.shape[0] == 1:
            check_values(norms[0], pooled[:, :, :1, None])
        result = apc_kernels.pyramid_reduce(pooled, weights, given, self.scales, training=training)
        if training:
            torch._foreach_add_([norm._buffers["num_batches_tracked"] for norm in norms], 1)
        return result

    def _composed(self, pooled: Tensor) -> Tensor:
        parts = pooled.split([s * s for s in self.scales], dim=2)
        reduced = [reduce(part.unsqueeze(3)) for reduce, part in zip(self.reductions, parts, strict=True)]
        return torch.cat(reduced, dim=2).squeeze(3)


def _is_local(norm: nn.Module) -> bool:
    """Tells whether a batch norm takes its statistics from this process's batch, or from its running statistics."""
    return (
        type(norm) in (nn.BatchNorm2d, nn.BatchNorm1d)
        and norm.track_running_stats
        and norm.momentum is not None
        and norm._parameters.get("weight") is not None  # else it has none, or something else computes it
        and norm._parameters.get("bias") is not None
        and norm._buffers.get("running_mean") is not None
    )


class Classifier(nn.Module):
    """Drops whole channels in training, then applies a 1×1 convolution to the classes."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout
        return self.conv(dropout(x) if dropout.training and dropout.p > 0 else x)


def batch_norm(norm: nn.Module, x: Tensor) -> apc_kernels.BatchNorm:
    """Returns a batch norm as adaptive_context_norm takes it; the operation updates its running statistics in place."""
    if norm.training and x.dtype != torch.float64 and norm.running_mean.dtype != torch.float32:
        raise ValueError(
            f"model: expected batch norms in float32 in training, got {norm.running_mean.dtype}: keep the model in "
            "float32 and train it under torch.autocast"
        )
    parameters, buffers = norm._parameters, norm._buffers
    try:  # past the search of a module's attributes, which takes longer than to use the tensors
        tensors = parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    except KeyError:  # something else computes a tensor: pruning, a parametrization
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors = [tensor if tensor.dtype == wanted else tensor.to(wanted) for tensor in tensors]
    return apc_kernels.BatchNorm(*tensors, norm.momentum, norm.eps)


def promoted(x: Tensor, tensor: Tensor) -> Tensor:
    """Converts a small tensor to the dtype that apc_kernels takes with the map x: float64 or float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
