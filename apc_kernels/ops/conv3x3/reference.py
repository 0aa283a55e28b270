"""Computes conv3x3 in plain PyTorch: one convolution of the concatenated maps, which nothing keeps after the call."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from apc_kernels.ops.autograd import under_transforms


def conv3x3(maps: Sequence[Tensor], weight: Tensor, dilation: int = 1) -> Tensor:
    if len(maps) == 1:
        return F.conv2d(maps[0], weight, padding=dilation, dilation=dilation)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *maps))
    transformed = torch.compiler.is_exporting() or under_transforms() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    if not differentiated or transformed:
        return F.conv2d(torch.cat(list(maps), 1), weight, padding=dilation, dilation=dilation)
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, *maps = (t if t.dtype == torch.float64 else t.to(dtype) for t in (weight, *maps))
    return _JoinedConvolution.apply(weight, dilation, *maps)  # pyright: ignore[reportReturnType]


class _JoinedConvolution(torch.autograd.Function):
    """Convolves maps as if they were concatenated, and saves the maps alone: backward concatenates them again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dilation: int, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *maps)
        ctx.dilation = dilation
        return F.conv2d(torch.cat(maps, 1), weight, padding=dilation, dilation=dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        of_weight, _, *of_maps = ctx.needs_input_grad
        around = [ctx.dilation, ctx.dilation]
        options = (None, [1, 1], around, around, False, [0, 0], 1, [any(of_maps), of_weight, False])
        grad_joined, grad_weight, _ = torch.ops.aten.convolution_backward(grad, torch.cat(maps, 1), weight, *options)
        if not any(of_maps):
            return grad_weight, None, *(None for _ in maps)
        grads = grad_joined.split([x.shape[1] for x in maps], 1)
        return grad_weight, None, *(g if wanted else None for g, wanted in zip(grads, of_maps, strict=True))
