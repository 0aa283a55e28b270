"""Loads sssegmentation's weights and configs; translates them to mmsegmentation's names and configs first.

Its five segmentors compute the same as mmsegmentation's, with three differences that shapes show: an FCN head without
concatenation, auxiliary heads of 512 channels, batch norm and ReLU in the feature pyramid neck. Its files hold no
config: the caller gives what shapes do not show. `apcnet convert` takes these files as it takes mmsegmentation's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from apcnet.choices import check_choice
from apcnet.interop.mmseg.config import load_head as load_mmseg_head
from apcnet.interop.mmseg.identify import inside
from apcnet.interop.mmseg.names import in_place
from apcnet.models.fpn import FPN
from apcnet.models.weights import assign

SEGMENTORS = {"APCNet": "APCHead", "PSPNet": "PSPHead", "ENCNet": "EncHead", "FCN": "FCNHead", "SemanticFPN": "FPNHead"}
NORMS = ("BatchNorm2d", "SyncBatchNorm")
# sssegmentation's code fixes this, and shapes do not show it; written as mmsegmentation's config.
CONFIG = "model = dict(neck=dict(act_cfg=dict(type='ReLU')))"

PARTS = {"0": "conv", "1": "bn"}  # parts of a block; 2 is its ReLU
BLOCKS = {
    r"fpn_neck\.(\w+\.\d+)": r"neck.\1",
    r"(acm_modules\.\d+\.\w+)": r"decode_head.\1",
    r"(scale_heads\.\d+\.\d+)": r"decode_head.\1",
    r"(enc_module\.encoding_project)": r"decode_head.\1",
    r"(?:ppm_net\.)?(bottleneck)": r"decode_head.\1",
}
OTHERS = {
    r"backbone_net": "backbone",
    r"ppm_net\.branches\.(\d+)\.1": r"decode_head.psp_modules.\1.1.conv",
    r"ppm_net\.branches\.(\d+)\.2": r"decode_head.psp_modules.\1.1.bn",
    r"(acm_modules\.\d+\.gla|enc_module|se_layer)": r"decode_head.\1",
}
DECODERS = {"decoder": "decode_head", "auxiliary_decoder": "auxiliary_head"}


class PyramidHead(nn.Module):
    """Applies the neck, if there is one, and the head to the backbone's list of maps."""

    def __init__(self, neck: nn.Module | None, head: nn.Module, selected: Sequence[int]):
        super().__init__()
        self.neck, self.head, self.selected = neck, head, tuple(selected)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        features = [features[i] for i in self.selected]
        logits = self.head(features if self.neck is None else self.neck(features))
        return logits[0] if isinstance(logits, tuple) else logits


def load_head(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Builds the neck and head of an sssegmentation segmentor from its config and weights.

    Weights of a backbone and of an auxiliary decoder are ignored.

    Args:
        config: sssegmentation's config of a segmentor: type "APCNet", "PSPNet", "ENCNet", "FCN" or "SemanticFPN",
            num_classes, align_corners and head; a backbone is not needed.
        state_dict: Weights by sssegmentation's names.

    Returns:
        A module that takes the backbone's list of maps, selects config["backbone"]["selected_indices"] (by default all
        four) and returns the logits, in training too.

    Raises:
        ValueError: An option has no counterpart here, or a weight is missing, unexpected or of another shape.
    """
    check_choice(config.get("type", ""), "config.type", SEGMENTORS)
    check_choice(config.get("norm_cfg", {"type": NORMS[0]})["type"], "config.norm_cfg.type", NORMS)
    check_choice(config.get("act_cfg", {"type": "ReLU"})["type"], "config.act_cfg.type", ("ReLU",))
    selected = config.get("backbone", {}).get("selected_indices") or (0, 1, 2, 3)
    weights = rename(state_dict)
    head = load_mmseg_head(_head_config(config, len(selected)), inside(weights, "decode_head"))
    neck = None
    if config["type"] == "SemanticFPN":
        given = config["head"]
        check_choice(
            given.get("upsample_cfg", {}).get("mode", "nearest"), "config.head.upsample_cfg.mode", ("nearest",)
        )
        neck = FPN(given["in_channels_list"], given["feats_channels"], norm=True)
        assign(in_place(neck), inside(weights, "neck"), "state_dict")
    return PyramidHead(neck, head, selected)


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames sssegmentation's tensors to mmsegmentation's names; leaves other names unchanged."""
    lasts = {
        decoder: max((int(n) for name in state_dict for n in re.findall(rf"^{decoder}\.(\d+)\.", name)), default=0)
        for decoder in DECODERS
    }
    renamed = {_renamed(name, lasts): tensor for name, tensor in state_dict.items()}
    if any(name.startswith("acm_modules.") for name in state_dict):
        renamed = {
            re.sub(r"^decode_head\.convs\.0\.", "decode_head.bottleneck.", name): renamed[name] for name in renamed
        }
    return renamed


def _renamed(name, lasts):
    for stem, new in BLOCKS.items():
        if match := re.fullmatch(rf"{stem}\.([01])\.(\w+)", name):
            return f"{match.expand(new)}.{PARTS[match[2]]}.{match[3]}"
    for stem, new in OTHERS.items():
        if match := re.match(rf"{stem}\.", name):
            return f"{match.expand(new)}.{name[match.end() :]}"
    # A decoder is one list: n blocks of convolution, norm and ReLU, then dropout and the classifier.
    match = re.fullmatch(r"(decoder|auxiliary_decoder)\.(\d+)\.(\w+)", name)
    if match is None:
        return name
    number, head = int(match[2]), DECODERS[match[1]]
    if number == lasts[match[1]]:
        return f"{head}.conv_seg.{match[3]}"
    block, part = divmod(number, 3)
    return f"{head}.convs.{block}.{PARTS.get(str(part), part)}.{match[3]}"


def _head_config(config, count):
    """Returns mmsegmentation's config of the head. Most heads take the last of `count` selected maps."""
    given = config["head"]
    head = {"type": SEGMENTORS[config["type"]], "num_classes": config["num_classes"], "in_index": count - 1}
    head |= {"align_corners": config["align_corners"], "dropout_ratio": given["dropout"]}
    head |= {"channels": given["feats_channels"], "in_channels": given.get("in_channels")}
    if config["type"] in ("APCNet", "PSPNet"):
        return head | {"pool_scales": given["pool_scales"]}
    if config["type"] == "FCN":
        return head | {"num_convs": given.get("num_convs", 2), "concat_input": False}
    maps = {"in_channels": given["in_channels_list"], "in_index": list(range(count))}
    if config["type"] == "ENCNet":
        extra = given["extra"]
        return head | maps | {
            "num_codes": given["num_codes"], "use_se_loss": extra["use_se_loss"], "add_lateral": extra["add_lateral"]
        }  # fmt: skip
    levels = [given["feats_channels"]] * count
    scales = {"channels": given["scale_head_channels"], "feature_strides": given["feature_stride_list"]}
    return head | maps | scales | {"in_channels": levels}
