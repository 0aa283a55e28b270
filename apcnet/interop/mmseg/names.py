"""Maps the parameters of apcnet's models to mmsegmentation's names.

Names differ, and one tensor here may be several there: here the tensors of all scales are concatenated.
"""

import re

import torch
from torch import Tensor, nn

from apcnet.models import Segmentor
from apcnet.models.apc import APCHead
from apcnet.models.enc import EncHead
from apcnet.models.fcn import FCNHead
from apcnet.models.fpn import FPN, FPNHead
from apcnet.models.psp import PSPHead
from apcnet.models.resnet import ResNetV1c
from apcnet.models.uper import UPerHead

PARTS = {"backbone": "backbone", "neck": "neck", "head": "decode_head", "auxiliary": "auxiliary_head"}
EVERYWHERE = [(r"\bnorm\b", "bn"), (r"^classifier\.conv", "conv_seg")]
RULES = {  # * is replaced by the number of every scale
    ResNetV1c: [],
    APCHead: [
        (r"^regions\.reductions\.(\d+)", r"acm_modules.\1.pooled_redu_conv"),
        (r"^reduction", "acm_modules.*.input_redu_conv"),
        (r"^guide", "acm_modules.*.global_info"),
        (r"^affinity", "acm_modules.*.gla"),
        (r"^residual", "acm_modules.*.residual_conv"),
        (r"^fusion\.(\d+)", r"acm_modules.\1.fusion_conv"),
    ],
    PSPHead: [(r"^regions\.reductions\.(\d+)", r"psp_modules.\1.1")],
    EncHead: [
        (r"^laterals", "lateral_convs"),
        (r"^project", "enc_module.encoding_project"),
        (r"^(codewords|scale)$", r"enc_module.encoding.0.\1"),
        (r"^code_norm", "enc_module.encoding.1"),
        (r"^gate", "enc_module.fc.0"),
        (r"^presence", "se_layer"),
    ],
    UPerHead: [
        (r"^regions\.reductions\.(\d+)", r"psp_modules.\1.1"),
        (r"^laterals", "lateral_convs"),
        (r"^outputs", "fpn_convs"),
        (r"^fusion", "fpn_bottleneck"),
    ],
    FCNHead: [(r"^concat", "conv_cat")],
    FPN: [
        (r"^(laterals|outputs)\.(\d+)\.(weight|bias)$", r"\1.\2.conv.\3"),
        (r"^laterals", "lateral_convs"),
        (r"^outputs", "fpn_convs"),
    ],
    FPNHead: [  # every second module there upsamples
        (r"^levels\.(\d+)\.(\d+)", lambda m: f"scale_heads.{m[1]}.{2 * int(m[2])}")
    ],
}


def in_place(module: nn.Module) -> dict[str, Tensor]:
    """Returns views of a model's or head's parameters and buffers by mmsegmentation's names; write to them to load."""
    if isinstance(module, Segmentor):
        parts = {theirs: getattr(module, ours) for ours, theirs in PARTS.items()}
        return {
            f"{prefix}.{name}": tensor
            for prefix, part in parts.items()
            if part is not None
            for name, tensor in in_place(part).items()
        }
    tensors, own = {}, module.state_dict()
    if type(module) not in RULES or (isinstance(module, ResNetV1c) and "stem.3.weight" not in own):
        raise ValueError(
            f"model: expected parts that mmsegmentation's models here have, such as ResNetV1c, got "
            f"{'a ResNet with the stem 7x7' if isinstance(module, ResNetV1c) else type(module).__name__}"
        )
    for ours, tensor in own.items():
        name = ours
        for pattern, replacement in [*RULES[type(module)], *EVERYWHERE]:
            name = re.sub(pattern, replacement, name)
        if "*" not in name:
            tensors[name] = tensor
            continue
        for i, part in enumerate(_of_scales(tensor, module.scales, squares=ours.startswith("affinity"))):
            tensors[name.replace("*", str(i))] = part
    return tensors


def _of_scales(tensor: Tensor, scales: tuple[int, ...], squares: bool) -> tuple[Tensor, ...]:
    if not tensor.dim():
        return (tensor,) * len(scales)  # all scales share one count of batches
    return tensor.split([s * s for s in scales]) if squares else tensor.chunk(len(scales))


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of a model's or head's weights with mmsegmentation's names and shapes.

    Args:
        model: A model of `apcnet.create` or `apcnet.load`, or one of its heads.

    Example:
        >>> torch.save({"state_dict": state_dict(model)}, "for_mmsegmentation.pth")
    """
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in in_place(model).items()
    }
