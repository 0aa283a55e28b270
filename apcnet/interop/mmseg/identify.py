"""Infers the mmsegmentation config of a state dict from the names and shapes of its weights.

Shapes show the depth, every width, the head and its options. They do not show strides, dilations, align_corners and the
pool scales of PSPNet and UPerNet: those come from the config text that mmsegmentation saves with the weights, or from
the caller.
"""

import ast
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apcnet.models.resnet import BLOCKS, STAGES
from apcnet.models.weights import listed

HEADS = {  # parts of each head; no other head has the first one
    "APCHead": ("acm_modules", "bottleneck", "conv_seg"),
    "PSPHead": ("psp_modules", "bottleneck", "conv_seg"),
    "EncHead": ("enc_module", "bottleneck", "conv_seg", "se_layer", "lateral_convs", "fusion"),
    "FPNHead": ("scale_heads", "conv_seg"),
    "UPerHead": ("fpn_bottleneck", "fpn_convs", "lateral_convs", "psp_modules", "bottleneck", "conv_seg"),
    "FCNHead": ("convs", "conv_cat", "conv_seg"),
}
FIRST = {  # the convolution that shows how many channels a head takes and how many it has inside
    "APCHead": "acm_modules.0.input_redu_conv.conv.weight",
    "PSPHead": "psp_modules.0.1.conv.weight",
    "EncHead": "bottleneck.conv.weight",
    "FPNHead": "scale_heads.0.0.conv.weight",
    "UPerHead": "psp_modules.0.1.conv.weight",
    "FCNHead": "convs.0.conv.weight",
}
PARTS = ("backbone", "neck", "decode_head", "auxiliary_head")
NORM = {"type": "BN", "requires_grad": True}
UNREAD = ...  # a value in a config text that is no literal


def config_of(
    state_dict: Mapping[str, Tensor],
    config_text: str | None = None,
    *,
    align_corners: bool | None = None,
    output_stride: int | None = None,
) -> dict:
    """Returns mmsegmentation's `model` dict for a state dict.

    Args:
        state_dict: Weights by mmsegmentation's names.
        config_text: Python source of a config, which is parsed and not run.
        align_corners: Setting of the heads, if there is no config text.
        output_stride: 8, 16 or 32, if there is no config text. Without both it is the published models' (8, or 32 for
            Semantic FPN and UPerNet), with a warning.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    prefixes = {name.partition(".")[0] for name in shapes}
    if not {"backbone", "decode_head"} <= prefixes <= set(PARTS):
        raise ValueError(
            "state_dict: expected names that start with backbone, decode_head and optionally neck, auxiliary_head, got "
            f"{listed(sorted(prefixes)) or 'none'}"
        )
    text = read_config(config_text) if config_text else {}
    settings = {part: _section(_section(text, "model"), part) for part in PARTS}
    parts = {part: inside(shapes, part) for part in prefixes}

    backbone, config = _backbone(parts["backbone"]), dict[str, Any](type="EncoderDecoder")
    expansion = 4 if backbone["depth"] >= 50 else 1
    widths = [backbone["base_channels"] * expansion << stage for stage in range(4)]
    heads = [part for part in ("decode_head", "auxiliary_head") if part in prefixes]
    config |= {part: _head(parts[part], part, settings[part], widths) for part in heads}
    for part in heads:
        configured = settings[part].get("align_corners")
        config[part]["align_corners"] = _agreed(align_corners, configured, f"{part}.align_corners")
    if "neck" in prefixes:
        config["neck"] = {**settings["neck"], **_neck(parts["neck"])}
    undilated = "neck" in prefixes or config["decode_head"]["type"] == "UPerHead"
    stages = _stages(settings["backbone"], output_stride, 32 if undilated else 8)
    config["backbone"] = {**settings["backbone"], **backbone, **stages}
    if normalisation := _normalisation(text):
        config["data_preprocessor"] = normalisation
    return config


# Names and shapes


def inside(tensors, part):
    """Selects the tensors of one part of a model and removes its prefix from their names."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _count(shapes, stem):
    """Counts the members 0, 1, … of the list `stem`."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"{stem}\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"state_dict: expected {stem}.0, {stem}.1, … without a gap, got numbers {sorted(numbers)}")
    return len(numbers)


def _shape(shapes, part, name):
    if name not in shapes:
        raise ValueError(f"state_dict: {part}.{name} is missing")
    return shapes[name]


def _backbone(shapes):
    if "stem.0.weight" not in shapes:
        kind = "a ResNet with a 7×7 stem (ResNetV1b)" if "conv1.weight" in shapes else listed(sorted(shapes))
        raise ValueError(f"state_dict: expected a ResNetV1c backbone (backbone.stem.0.weight), got {kind}")
    if len(shapes.get("layer1.0.downsample.1.weight", ())) == 4:
        raise ValueError(
            "state_dict: expected a ResNetV1c backbone, got one that averages in its shortcuts (ResNetV1d)"
        )
    blocks = tuple(_count(shapes, f"layer{stage}") for stage in (1, 2, 3, 4))
    wide = "layer1.0.conv3.weight" in shapes
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and wide == (depth >= 50)]
    if not depths:
        kind = "bottlenecks" if wide else "basic blocks"
        known = ", ".join(map(str, BLOCKS))
        raise ValueError(f"state_dict: expected a ResNet of depth {known}, got stages of {blocks} {kind}")
    config = {"type": "ResNetV1c", "depth": depths[0], "num_stages": 4, "out_indices": [0, 1, 2, 3]}
    config |= {"norm_cfg": NORM, "base_channels": _shape(shapes, "backbone", "layer1.0.conv1.weight")[0]}
    stem_channels, in_channels = _shape(shapes, "backbone", "stem.6.weight")[0], shapes["stem.0.weight"][1]
    return config | {"stem_channels": stem_channels, "in_channels": in_channels}


def _neck(shapes):
    count = _count(shapes, "lateral_convs")
    laterals = [_shape(shapes, "neck", f"lateral_convs.{i}.conv.weight") for i in range(count)]
    if not laterals or {name.partition(".")[0] for name in shapes} != {"lateral_convs", "fpn_convs"}:
        raise ValueError(f"state_dict: expected an FPN neck (lateral_convs, fpn_convs), got {listed(sorted(shapes))}")
    norm = NORM if "lateral_convs.0.bn.weight" in shapes else None
    neck = {"type": "FPN", "in_channels": [shape[1] for shape in laterals], "out_channels": laterals[0][0]}
    return neck | {"num_outs": _count(shapes, "fpn_convs"), "norm_cfg": norm}


def _head(shapes, part, settings, widths):
    kind = _kind(shapes, part, settings)
    inferred = {"APCHead": _apc, "PSPHead": _psp, "EncHead": _enc, "FPNHead": _fpn, "UPerHead": _psp, "FCNHead": _fcn}[
        kind
    ]
    options = inferred(shapes, part, settings)
    channels, taken = _shape(shapes, part, FIRST[kind])[:2]
    head = {"type": kind, "num_classes": _shape(shapes, part, "conv_seg.weight")[0], "norm_cfg": NORM}
    head |= {"channels": channels, "in_channels": taken, **options}
    if kind == "EncHead":  # without lateral convolutions only the last of its maps is used
        head |= {"in_index": [1, 2, 3], "in_channels": [*widths[1:3], taken]}
    elif kind == "UPerHead":
        head |= {"in_index": [0, 1, 2, 3], "in_channels": [*widths[:3], taken]}
    elif kind == "FPNHead":
        head["in_index"] = list(range(len(head["in_channels"])))
    elif taken in widths:
        head["in_index"] = widths.index(taken)
    else:
        raise ValueError(f"state_dict: {part} takes {taken} channels, expected one of the backbone's {widths}")
    loss = {"type": "CrossEntropyLoss", "loss_weight": 0.4 if part == "auxiliary_head" else 1.0}
    return {"dropout_ratio": 0.1, "loss_decode": loss, **settings, **head}


def _kind(shapes, part, settings):
    found = {name.partition(".")[0] for name in shapes}
    kinds = [kind for kind, parts in HEADS.items() if parts[0] in found and found <= set(parts)]
    if not kinds:
        known = ", ".join(f"{kind} ({parts[0]}, …)" for kind, parts in HEADS.items())
        called = f" (its config says {settings['type']})" if "type" in settings else ""
        raise ValueError(f"state_dict: {part} holds {listed(sorted(found))}{called}; supported are {known}")
    if settings.get("type", kinds[0]).rpartition(".")[2] != kinds[0]:  # 1.x may write the whole path
        raise ValueError(f"state_dict: {part} holds the weights of {kinds[0]}, its config says {settings['type']}")
    return kinds[0]


def _apc(shapes, part, settings):
    count = _count(shapes, "acm_modules")
    rows = [_shape(shapes, part, f"acm_modules.{i}.gla.weight")[0] for i in range(count)]
    scales = [math.isqrt(count) for count in rows]
    if [scale**2 for scale in scales] != rows:
        raise ValueError(f"state_dict: expected gla.weight of s² rows in each of {part}.acm_modules, got {rows}")
    return {"pool_scales": scales, "fusion": any(".fusion_conv." in name for name in shapes)}


def _psp(shapes, part, settings):
    count = _count(shapes, "psp_modules")
    scales = settings.get("pool_scales", [1, 2, 3, 6])  # mmsegmentation's default
    if len(scales) != count:
        raise ValueError(
            f"state_dict: {part} has {count} pool scales, which the weights do not show; "
            f"expected a config text with {count} pool_scales, got {scales}"
        )
    return {"pool_scales": list(scales)}


def _enc(shapes, part, settings):
    loss_se = settings.get("loss_se_decode", {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.2})
    return {
        "num_codes": _shape(shapes, part, "enc_module.encoding.0.codewords")[0],
        "use_se_loss": "se_layer.weight" in shapes,
        "add_lateral": _count(shapes, "lateral_convs") > 0,
        "loss_se_decode": loss_se,
    }


def _fpn(shapes, part, settings):
    count = _count(shapes, "scale_heads")
    convs = [sum(f"scale_heads.{i}.{2 * j}.conv.weight" in shapes for j in range(count)) for i in range(count)]
    strides = settings.get("feature_strides", [4 << i for i in range(count)])
    if convs != [max(1, int(math.log2(stride / strides[0]))) for stride in strides]:
        raise ValueError(
            f"state_dict: {part}.scale_heads have {convs} convolutions, which do not match strides {strides}"
        )
    in_channels = [_shape(shapes, part, f"scale_heads.{i}.0.conv.weight")[1] for i in range(count)]
    return {"in_channels": in_channels, "feature_strides": list(strides)}


def _fcn(shapes, part, settings):
    return {
        "num_convs": _count(shapes, "convs"),
        "concat_input": "conv_cat.conv.weight" in shapes,
        "kernel_size": _shape(shapes, part, FIRST["FCNHead"])[2],
    }


# Settings that shapes do not show


def _section(text, name):
    settings = text.get(name) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"config text: expected one dict for {name}, got {type(settings).__name__}")
    settings = {key: value for key, value in settings.items() if key not in ("pretrained", "init_cfg")}
    if unread := [key for key, value in settings.items() if value is UNREAD]:
        raise ValueError(f"config text: expected literals in {name}, got other expressions for {listed(unread)}")
    return settings


def _agreed(given, configured, where):
    if configured is None and given is None:
        raise ValueError(
            f"align_corners: expected True or False, got none: the checkpoint does not show {where}, and predictions "
            "depend on it; give True (--align-corners) for models trained on 769×769 crops, False for most others"
        )
    if None not in (configured, given) and configured != given:
        raise ValueError(f"align_corners: expected {configured}, as {where} in the checkpoint's config, got {given}")
    return given if configured is None else configured


def _stages(settings, output_stride, usual):
    """Returns strides and dilations of the backbone."""
    if output_stride is not None and output_stride not in STAGES:
        raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
    known = {stride: {"strides": list(s), "dilations": list(d)} for stride, (s, d) in STAGES.items()}
    if settings:
        stages = {name: settings.get(name, default) for name, default in known[32].items()}  # mmsegmentation's defaults
        if output_stride is not None and stages != known[output_stride]:
            raise ValueError(f"output_stride: expected {stages}, as in the checkpoint's config, got {output_stride}")
        return stages
    if output_stride is None:
        warnings.warn(
            f"output_stride: assumed {usual}, as in the published models: the checkpoint does not show it. If the "
            "model was trained with another one, add --output-stride",
            stacklevel=3,
        )
    return {**known[output_stride or usual], "contract_dilation": True}


def _normalisation(text):
    """Returns mean and std, which 1.x keeps in the model and 0.x in the data pipeline."""
    if norm := _section(text, "img_norm_cfg"):
        return {"mean": norm.get("mean"), "std": norm.get("std"), "bgr_to_rgb": norm.get("to_rgb", True)}
    known = _section(_section(text, "model"), "data_preprocessor") or _section(text, "data_preprocessor")
    return {name: known[name] for name in ("mean", "std", "bgr_to_rgb") if name in known}


# The config text


def read_config(text: str) -> dict:
    """Reads the top-level assignments of a config: literals and dict(name=literal, …), tuples as lists.

    Nothing is evaluated. Other expressions are left out; inside a dict they are UNREAD.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        warnings.warn(f"the config text in the checkpoint is not used: it is not valid Python ({error})", stacklevel=2)
        return {}
    values = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if len(names) == len(statement.targets):
                values |= dict.fromkeys(names, _value(statement.value))
    return {name: value for name, value in values.items() if value is not UNREAD}


def _value(node):
    """Returns the value of a literal in the syntax tree, or UNREAD."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            values = [_value(element) for element in elements]
            return UNREAD if UNREAD in values else values
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = ((_value(key), _value(value)) for key, value in zip(keys, values, strict=True))
            return {name: value for name, value in pairs if isinstance(name, str)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: _value(keyword.value) for keyword in keywords}
    return UNREAD
