"""Which of mmsegmentation's parameters lie where in ours.

Names differ, and what is one tensor here may be several there: those of all scales lie one after the other.
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

ROOMS = {"backbone": "backbone", "neck": "neck", "head": "decode_head", "auxiliary": "auxiliary_head"}
EVERYWHERE = [(r"\bnorm\b", "bn"), (r"^classifier\.conv", "conv_seg")]
RULES = {  # a * stands for every scale in turn
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
    FCNHead: [(r"^concat", "conv_cat")],
    FPN: [
        (r"^(laterals|outputs)\.(\d+)\.(weight|bias)$", r"\1.\2.conv.\3"),
        (r"^laterals", "lateral_convs"),
        (r"^outputs", "fpn_convs"),
    ],
    FPNHead: [  # every second one upsamples
        (r"^levels\.(\d+)\.(\d+)", lambda m: f"scale_heads.{m[1]}.{2 * int(m[2])}")
    ],
}


def in_place(module: nn.Module) -> dict[str, Tensor]:
    """A model's or a head's parameters and buffers by mmsegmentation's names: views of them, to be read or written."""
    if isinstance(module, Segmentor):
        parts = {theirs: getattr(module, ours) for ours, theirs in ROOMS.items()}
        return {
            f"{room}.{name}": tensor
            for room, part in parts.items()
            if part is not None
            for name, tensor in in_place(part).items()
        }
    tensors = {}
    for ours, tensor in module.state_dict().items():
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
        return (tensor,) * len(scales)  # one count of batches for all
    return tensor.split([s * s for s in scales]) if squares else tensor.chunk(len(scales))


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's (or a head's) state dict with mmsegmentation's names and shapes, a copy."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in in_place(model).items()
    }
