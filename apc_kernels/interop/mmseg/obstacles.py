"""Finds the reasons why a method of an mmsegmentation model cannot be replaced; accelerate() and every call use it.

A caller takes only the first reason that a generator yields, so later checks may rely on earlier ones. Importing this
file imports mmsegmentation.
"""

from collections.abc import Iterator

import torch
from mmcv.cnn import ConvModule
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from mmseg.models.decode_heads import APCHead, EncHead, FCNHead, PSPHead, UPerHead
from mmseg.models.decode_heads.apc_head import ACM
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.enc_head import EncModule
from mmseg.models.decode_heads.psp_head import PPM
from mmseg.models.losses.cross_entropy_loss import CrossEntropyLoss, cross_entropy
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import Encoding
from torch import nn

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)  # mmengine replaces SyncBN by the last one
MAX_POOL_SCALE = 32  # adaptive_context allows no more


def of_module(module: nn.Module) -> dict[str, str | None]:
    """Maps each method that the fused class of a module would replace to the first obstacle, or to None."""
    if isinstance(module, (EncModule, Encoding)):
        methods = {"forward": iter(())}
    elif isinstance(module, EncoderDecoder):
        methods = {"predict": of_labels(module)}
    else:
        methods = {"loss_by_feat": of_loss(module)}
        if isinstance(module, APCHead):
            methods["forward"] = of_context(module)
        elif isinstance(module, PSPHead):
            methods["_forward_feature"] = of_pyramid(module)
        elif isinstance(module, UPerHead):
            methods["psp_forward"] = of_pyramid(module)
            methods["_forward_feature"] = of_concatenation(module.fpn_bottleneck, "fpn_bottleneck")
        elif isinstance(module, FCNHead) and module.concat_input:
            methods["_forward_feature"] = of_concatenation(module.conv_cat, "conv_cat")
    return {
        name: f"{name} is overridden on the instance" if name in vars(module) else next(reasons, None)
        for name, reasons in methods.items()
    }


def criterion_of(head: BaseDecodeHead) -> nn.Module | None:
    """Returns the head's loss, or None if it has several."""
    if not isinstance(head.loss_decode, nn.ModuleList):
        return head.loss_decode
    return head.loss_decode[0] if len(head.loss_decode) == 1 else None


def group_of(norm: nn.Module) -> str:
    """Returns the process group over which a norm takes statistics in its present mode; "" for this process alone."""
    if not (norm.training and isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized()):
        return ""
    group = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


def of_loss(head: BaseDecodeHead) -> Iterator[str]:
    """Yields the obstacles to a fused loss."""
    criterion = criterion_of(head)
    if criterion is None:
        yield f"there are {len(head.loss_decode)} losses, not one"
        return
    yield from _altered(criterion, "loss_decode", CrossEntropyLoss)
    if criterion.cls_criterion is not cross_entropy:
        yield "loss_decode is not a softmax cross entropy"
    if criterion.class_weight is not None:
        yield "loss_decode has class weights"
    if criterion.reduction != "mean":
        yield f"loss_decode's reduction is {criterion.reduction}, not mean"
    if head.sampler is not None:
        yield "a sampler chooses pixels by their logits"
    if not isinstance(head.ignore_index, int):
        yield f"ignore_index is {head.ignore_index}"


def of_context(head: APCHead) -> Iterator[str]:
    """Yields the obstacles to a fused adaptive context."""
    yield from of_concatenation(head.bottleneck, "bottleneck")
    for i, acm in enumerate(head.acm_modules):
        name = f"acm_modules.{i}"
        yield from _altered(acm, name, ACM)
        for part in ("input_redu_conv", "global_info", "residual_conv"):
            yield from _unusual(getattr(acm, part), f"{name}.{part}")
        yield from _altered(acm.gla, f"{name}.gla", nn.Conv2d)
        # The fused operation does not call these as modules.
        norms = {part: getattr(acm, part).norm for part in ("global_info", "residual_conv")}
        for part, norm in norms.items():
            yield from _hooked(norm, f"{name}.{part}.norm")
            yield from _hooked(getattr(acm, part).activate, f"{name}.{part}.activate")
            if norm.training and norm.running_mean.dtype in (torch.bfloat16, torch.float16):
                yield f"{name}.{part} trains with running statistics in low precision"
        guide, residual = norms.values()
        if guide.training != residual.training or group_of(guide) != group_of(residual):
            yield f"{name}: its two inner norms differ in training mode or in process group"
        if not (isinstance(acm.pool_scale, int) and acm.pool_scale <= MAX_POOL_SCALE):
            yield f"{name} pools to {acm.pool_scale}, not to an integer up to {MAX_POOL_SCALE}"


def of_pyramid(head: PSPHead | UPerHead) -> Iterator[str]:
    """Yields the obstacles to a fused pyramid pooling and bottleneck."""
    yield from of_concatenation(head.bottleneck, "bottleneck")
    conv, ppm = head.bottleneck.conv, head.psp_modules
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding != tuple(k // 2 for k in conv.kernel_size):
        yield "bottleneck is not a convolution that keeps the size"
    yield from _altered(ppm, "psp_modules", PPM)
    for i, (branch, scale) in enumerate(zip(ppm, ppm.pool_scales, strict=True)):
        yield from _altered(branch, f"psp_modules.{i}", nn.Sequential)
        yield from _altered(branch[0], f"psp_modules.{i}.0", nn.AdaptiveAvgPool2d)
        if len(branch) != 2 or not isinstance(scale, int) or branch[0].output_size != scale:
            yield f"psp_modules.{i} is not one pooling to an integer and one convolution"


def of_labels(model: EncoderDecoder) -> Iterator[str]:
    """Yields the obstacles to predicting labels without logits."""
    head = model.decode_head
    if (
        type(head).predict not in (BaseDecodeHead.predict, EncHead.predict)
        or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat
    ):
        yield f"{_type(head)} overrides predict or predict_by_feat"
    if model.out_channels == 1:
        yield "out_channels is 1: labels come from a threshold"
    for owner, names in (
        (head, ("predict", "predict_by_feat")),
        (model, ("encode_decode", "inference", "whole_inference", "slide_inference", "postprocess_result")),
    ):
        for name in names:
            if name in vars(owner):
                yield f"{name} is overridden on the instance"


def of_concatenation(module: ConvModule, name: str) -> Iterator[str]:
    """Yields the obstacles to splitting a convolution of concatenated maps."""
    yield from _unusual(module, name)
    if module.conv.groups != 1:
        yield f"{name}'s convolution has groups"


def _unusual(module: ConvModule, name: str) -> Iterator[str]:
    """Yields the reasons why a ConvModule is not a plain convolution, batch norm and ReLU."""
    yield from _altered(module, name, ConvModule)
    yield from _altered(module.conv, f"{name}.conv", nn.Conv2d)
    if not module.with_norm or type(module.norm) not in NORMS:
        yield f"{name} has no batch norm" if not module.with_norm else f"{name}'s norm is a {_type(module.norm)}"
    elif not module.norm.affine or module.norm.running_mean is None:
        yield f"{name}'s norm has no parameters, or no running statistics"
    if not module.with_activation or type(module.activate) is not nn.ReLU:
        yield f"{name} does not end in a ReLU"
    if module.order != ("conv", "norm", "act"):
        yield f"{name} is in the order {', '.join(module.order)}"
    if module.conv.bias is not None or module.conv.padding_mode != "zeros" or module.with_explicit_padding:
        yield f"{name}'s convolution has a bias, or does not pad with zeros"
    if getattr(module, "efficient_conv_bn_eval_forward", None) is not None:
        yield f"{name} is set to efficient_conv_bn_eval"


def _altered(module: nn.Module, name: str, expected: type) -> Iterator[str]:
    if type(module) is not expected:
        yield f"{name} is a {_type(module)}, not a plain {expected.__name__}"
    yield from _hooked(module, name)


def _hooked(module: nn.Module, name: str) -> Iterator[str]:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        yield f"{name} has hooks"
    if "forward" in vars(module):
        yield f"{name}.forward is overridden on the instance"


def _type(module: nn.Module) -> str:
    return type(module).__name__
