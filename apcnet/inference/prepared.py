"""Prepares a copy of a model for inference on a CPU: batch norms folded, every convolution one pass over its result.

Bias, ReLU and the addition of a residual block happen where a convolution writes its result; weights are laid out, and
those of 3×3 convolutions transformed, once. Maps between convolutions are channels_last. What is not known here stays
as it is: encoders of timm keep their modules, with batch norms and ReLUs folded where these follow a convolution.
"""

import copy

import torch
from torch import Tensor, nn

import apc_kernels
from apc_kernels import FusedConv2d, library
from apcnet.inference.folding import ConvReLU, fold_encoder, folded, folded_tensors, has_statistics
from apcnet.models.apc import APCHead
from apcnet.models.layers import ConvNormReLU, RegionReduction
from apcnet.models.psp import PyramidBottleneck
from apcnet.models.resnet import BasicBlock, Bottleneck
from apcnet.models.segmentor import Segmentor
from apcnet.models.timm_encoder import TimmEncoder


def prepare(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that runs faster on a CPU, in evaluation mode, for inference only.

    Labels are those of the model but for ties within rounding: logits differ by about 2e-6 of the largest. The copy
    holds weights of its own, those of 3×3 convolutions in four times their size, and follows no later change of the
    model. It can be neither trained, exported nor saved. A model that cannot gain is returned as it is: one on another
    device, in another dtype than float32 and float64, with hooks on its modules, or without the CPU library.

    Args:
        model: A model of `apcnet.create` or `apcnet.load`.

    Example:
        >>> fast = apcnet.inference.prepare(apcnet.load("best.safetensors"))
        >>> labels = apcnet.inference.labels(fast, images)
    """
    if not _can_gain(model):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    prepared = _replaced(copy.deepcopy(model, shared).eval())  # convolutions make weights of their own
    for module in prepared.modules():
        if isinstance(module, FusedConv2d):
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if id(tensor) in shared:
                    copied = tensor.detach().clone()
                    tensors[name] = nn.Parameter(copied, False) if tensors is module._parameters else copied
    prepared.architecture = None  # its weights have other names and shapes
    return prepared


def _can_gain(model: nn.Module) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    on_cpu = all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    return isinstance(model, Segmentor) and on_cpu and not hooked and library.cpu().loaded


def _replaced(module: nn.Module) -> nn.Module:
    """Returns what stands in for a module; children of this package's modules are replaced in place."""
    kind = type(module)
    if kind in (ConvNormReLU, PyramidBottleneck) and not has_statistics(module.norm):
        return module
    if kind is ConvNormReLU:
        return ConvReLU(folded(module.conv, module.norm))
    if kind is PyramidBottleneck:
        return PreparedPyramidBottleneck(module)
    if kind in (Bottleneck, BasicBlock) and all(map(has_statistics, _norms(module))):
        return Residual(module)
    if kind is TimmEncoder:
        fold_encoder(module.body)
    if kind is nn.Sequential:
        return _sequence(list(module))
    if kind is nn.Conv2d:
        return folded(module)
    if kind is nn.ModuleList or kind.__module__.startswith("apcnet.models."):
        for name, child in module.named_children():
            if not (
                isinstance(module, APCHead) and name in ("guide", "residual", "affinity")
            ):  # they hold weights only
                setattr(module, name, _replaced(child))
    return module


def _norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Residual(nn.Module):
    """Applies a block's convolutions; the last one adds the shortcut, and writes over it."""

    def __init__(self, block: Bottleneck | BasicBlock):
        super().__init__()
        names = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        *first, self.last = (folded(getattr(block, conv), getattr(block, norm)) for conv, norm in names)
        self.first = nn.ModuleList(first)
        self.shortcut = None if block.downsample is None else folded(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.first:
            y = conv(y, relu=True)
        # x is written over as well: within a stage nothing else reads it, and a stage's first block has a shortcut.
        return self.last(y, x if self.shortcut is None else self.shortcut(x), relu=True, overwrite=True)


class PreparedPyramidBottleneck(nn.Module):
    """Convolves a map, and adds the convolution of its reduced regions, a bias and ReLU where the result is written."""

    def __init__(self, bottleneck: PyramidBottleneck):
        super().__init__()
        weight, bias = folded_tensors(bottleneck.conv, bottleneck.norm)
        self.conv = FusedConv2d(weight[:, : bottleneck.features], bias, padding=1)
        self.pyramid_weight = nn.Parameter(weight[:, bottleneck.features :].clone(), requires_grad=False)

    def forward(self, x: Tensor, regions: RegionReduction, align_corners: bool) -> Tensor:
        options = {"align_corners": align_corners, "memory_format": torch.channels_last}
        product = apc_kernels.pyramid_conv(regions(x), self.pyramid_weight, x.shape[2:], regions.scales, **options)
        return self.conv(x, product, relu=True, overwrite=True)


def _sequence(modules: list[nn.Module]) -> nn.Module:
    """Merges convolutions with the batch norms and ReLUs that follow them."""
    merged: list[nn.Module] = []
    while modules:
        module = modules.pop(0)
        if type(module) is not nn.Conv2d:
            merged.append(_replaced(module))
            continue
        norm = None
        if modules and isinstance(modules[0], nn.BatchNorm2d) and has_statistics(modules[0]):
            norm = modules.pop(0)
        merged.append(folded(module, norm))
        if modules and type(modules[0]) is nn.ReLU:
            merged[-1] = ConvReLU(merged[-1])
            modules.pop(0)
    return nn.Sequential(*merged)
