"""What mmsegmentation model a state dict belongs to: its config, from the names and shapes of the weights.

Shapes tell the depth, every width, the head and its options. They do not tell strides and dilations, align_corners and
PSPNet's pool scales: those come from the config text that mmsegmentation saves beside the weights, or from the caller.
"""

import ast
import math
import re
import warnings
from collections.abc import Mapping

from torch import Tensor

from apcnet.models.resnet import BLOCKS, STAGES
from apcnet.models.weights import listed

HEADS = {  # the first of its parts is what no other head has
    "APCHead": ("acm_modules", "bottleneck", "conv_seg"),
    "PSPHead": ("psp_modules", "bottleneck", "conv_seg"),
    "EncHead": ("enc_module", "bottleneck", "conv_seg", "se_layer", "lateral_convs", "fusion"),
    "FPNHead": ("scale_heads", "conv_seg"),
    "FCNHead": ("convs", "conv_cat", "conv_seg"),
}
FIRST = {  # the convolution that shows how many channels a head takes, and how many it works with
    "APCHead": "acm_modules.0.input_redu_conv.conv.weight",
    "PSPHead": "psp_modules.0.1.conv.weight",
    "EncHead": "bottleneck.conv.weight",
    "FPNHead": "scale_heads.0.0.conv.weight",
    "FCNHead": "convs.0.conv.weight",
}
ROOMS = ("backbone", "neck", "decode_head", "auxiliary_head")
NORM = {"type": "BN", "requires_grad": True}
UNREAD = ...  # what a config text says in more than literals


def config_of(
    state_dict: Mapping[str, Tensor],
    config_text: str | None = None,
    *,
    align_corners: bool | None = None,
    output_stride: int | None = None,
) -> dict:
    """mmsegmentation's `model` dict for a state dict.

    Args:
        state_dict: by mmsegmentation's names.
        config_text: the Python source of a config, which is read and not run.
        align_corners: of the heads, where there is no config text.
        output_stride: 8, 16 or 32, where there is no config text; without either the published models' (8, and 32 for
            Semantic FPN), with a warning.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    rooms = {name.partition(".")[0] for name in shapes}
    if not {"backbone", "decode_head"} <= rooms <= set(ROOMS):
        raise ValueError(
            "state_dict: expected names that start with backbone, decode_head and maybe neck and auxiliary_head, got "
            f"{listed(sorted(rooms)) or 'none'}"
        )
    text = read_config(config_text) if config_text else {}
    said = {room: _section(_section(text, "model"), room) for room in ROOMS}
    parts = {room: inside(shapes, room) for room in rooms}

    backbone, config = _backbone(parts["backbone"]), {"type": "EncoderDecoder"}
    expansion = 4 if backbone["depth"] >= 50 else 1
    widths = [backbone["base_channels"] * expansion << stage for stage in range(4)]
    heads = [room for room in ("decode_head", "auxiliary_head") if room in rooms]
    config |= {room: _head(parts[room], room, said[room], widths) for room in heads}
    for room in heads:
        told = said[room].get("align_corners")
        config[room]["align_corners"] = _agreed(align_corners, told, f"{room}.align_corners")
    if "neck" in rooms:
        config["neck"] = {**said["neck"], **_neck(parts["neck"])}
    stages = _stages(said["backbone"], output_stride, 32 if "neck" in rooms else 8)
    config["backbone"] = {**said["backbone"], **backbone, **stages}
    if normalisation := _normalisation(text):
        config["data_preprocessor"] = normalisation
    return config


# Names and shapes


def inside(tensors, room):
    """What is in one of the rooms, by the names that it has there."""
    return {name.removeprefix(f"{room}."): tensor for name, tensor in tensors.items() if name.startswith(f"{room}.")}


def _count(shapes, stem):
    """How many members 0, 1, … there are of what `stem` names."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"{stem}\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"state_dict: expected all of {stem} from 0 on, got {sorted(numbers)}")
    return len(numbers)


def _shape(shapes, room, name):
    if name not in shapes:
        raise ValueError(f"state_dict: {room}.{name} is missing")
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


def _head(shapes, room, said, widths):
    kind = _kind(shapes, room, said)
    inferred = {"APCHead": _apc, "PSPHead": _psp, "EncHead": _enc, "FPNHead": _fpn, "FCNHead": _fcn}[kind]
    options = inferred(shapes, room, said)
    channels, taken = _shape(shapes, room, FIRST[kind])[:2]
    head = {"type": kind, "num_classes": _shape(shapes, room, "conv_seg.weight")[0], "norm_cfg": NORM}
    head |= {"channels": channels, "in_channels": taken, **options}
    if kind == "EncHead":  # without lateral convolutions only the last of its maps is used
        head |= {"in_index": [1, 2, 3], "in_channels": [*widths[1:3], taken]}
    elif kind == "FPNHead":
        head["in_index"] = list(range(len(head["in_channels"])))
    elif taken in widths:
        head["in_index"] = widths.index(taken)
    else:
        raise ValueError(f"state_dict: {room} takes {taken} channels, the backbone's maps have {widths}")
    loss = {"type": "CrossEntropyLoss", "loss_weight": 0.4 if room == "auxiliary_head" else 1.0}
    return {"dropout_ratio": 0.1, "loss_decode": loss, **said, **head}


def _kind(shapes, room, said):
    found = {name.partition(".")[0] for name in shapes}
    kinds = [kind for kind, parts in HEADS.items() if parts[0] in found and found <= set(parts)]
    if not kinds:
        known = ", ".join(f"{kind} ({parts[0]}, …)" for kind, parts in HEADS.items())
        called = f" (its config says {said['type']})" if "type" in said else ""
        raise ValueError(f"state_dict: {room} holds {listed(sorted(found))}{called}; supported are {known}")
    if said.get("type", kinds[0]).rpartition(".")[2] != kinds[0]:  # 1.x may write the whole path
        raise ValueError(f"state_dict: {room} holds the weights of {kinds[0]}, its config says {said['type']}")
    return kinds[0]


def _apc(shapes, room, said):
    count = _count(shapes, "acm_modules")
    rows = [_shape(shapes, room, f"acm_modules.{i}.gla.weight")[0] for i in range(count)]
    scales = [math.isqrt(count) for count in rows]
    if [scale**2 for scale in scales] != rows:
        raise ValueError(f"state_dict: expected gla.weight of s² rows in each of {room}.acm_modules, got {rows}")
    return {"pool_scales": scales, "fusion": any(".fusion_conv." in name for name in shapes)}


def _psp(shapes, room, said):
    count = _count(shapes, "psp_modules")
    scales = said.get("pool_scales", [1, 2, 3, 6])  # mmsegmentation's default
    if len(scales) != count:
        raise ValueError(
            f"state_dict: {room} has {count} pool scales, which they are cannot be seen; "
            f"expected a config text that says so, got {scales}"
        )
    return {"pool_scales": list(scales)}


def _enc(shapes, room, said):
    loss_se = said.get("loss_se_decode", {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.2})
    return {
        "num_codes": _shape(shapes, room, "enc_module.encoding.0.codewords")[0],
        "use_se_loss": "se_layer.weight" in shapes,
        "add_lateral": _count(shapes, "lateral_convs") > 0,
        "loss_se_decode": loss_se,
    }


def _fpn(shapes, room, said):
    count = _count(shapes, "scale_heads")
    convs = [sum(f"scale_heads.{i}.{2 * j}.conv.weight" in shapes for j in range(count)) for i in range(count)]
    strides = said.get("feature_strides", [4 << i for i in range(count)])
    if convs != [max(1, int(math.log2(stride / strides[0]))) for stride in strides]:
        raise ValueError(
            f"state_dict: {room}.scale_heads have {convs} convolutions, which no strides {strides} lead to"
        )
    in_channels = [_shape(shapes, room, f"scale_heads.{i}.0.conv.weight")[1] for i in range(count)]
    return {"in_channels": in_channels, "feature_strides": list(strides)}


def _fcn(shapes, room, said):
    return {
        "num_convs": _count(shapes, "convs"),
        "concat_input": "conv_cat.conv.weight" in shapes,
        "kernel_size": _shape(shapes, room, FIRST["FCNHead"])[2],
    }


# What shapes do not tell


def _section(text, name):
    said = text.get(name) or {}
    if not isinstance(said, dict):
        raise ValueError(f"config text: expected one dict as {name}, got {type(said).__name__}")
    said = {key: value for key, value in said.items() if key not in ("pretrained", "init_cfg")}
    if unread := [key for key, value in said.items() if value is UNREAD]:
        raise ValueError(f"config text: expected literals in {name}, got something else as {listed(unread)}")
    return said


def _agreed(given, said, where):
    if said is None and given is None:
        raise ValueError(
            f"align_corners: neither the weights nor a config text say what {where} was in training, and the "
            "predictions depend on it; give align_corners (True for models trained on 769×769 crops, otherwise mostly "
            "False)"
        )
    if None not in (said, given) and said != given:
        raise ValueError(f"align_corners: expected {said}, which the file's config says of {where}, got {given}")
    return given if said is None else said


def _stages(said, output_stride, usual):
    """Strides and dilations of the backbone."""
    if output_stride is not None and output_stride not in STAGES:
        raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
    known = {stride: {"strides": list(s), "dilations": list(d)} for stride, (s, d) in STAGES.items()}
    if said:
        told = {name: said.get(name, usually) for name, usually in known[32].items()}  # mmsegmentation's defaults
        if output_stride is not None and told != known[output_stride]:
            raise ValueError(f"output_stride: the file's config says {told}, got {output_stride}")
        return told
    if output_stride is None:
        warnings.warn(
            f"output_stride: taken as {usual}, as in the published models; neither the weights nor a config text say "
            "it. If these were trained with another one, give output_stride",
            stacklevel=3,
        )
    return {**known[output_stride or usual], "contract_dilation": True}


def _normalisation(text):
    """Mean and std, which are the model's in 1.x and the data pipeline's in 0.x."""
    if norm := _section(text, "img_norm_cfg"):
        return {"mean": norm.get("mean"), "std": norm.get("std"), "bgr_to_rgb": norm.get("to_rgb", True)}
    known = _section(_section(text, "model"), "data_preprocessor") or _section(text, "data_preprocessor")
    return {name: known[name] for name in ("mean", "std", "bgr_to_rgb") if name in known}


# The config text


def read_config(text: str) -> dict:
    """The top-level assignments of a config: literals and dict(name=literal, …), tuples as lists.

    Nothing is evaluated: what is more than that is left out, inside a dict it is UNREAD.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        warnings.warn(f"the config text in the file cannot be read and is not used: {error}", stacklevel=2)
        return {}
    values = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets):
            values |= dict.fromkeys((target.id for target in statement.targets), _value(statement.value))
    return {name: value for name, value in values.items() if value is not UNREAD}


def _value(node):
    """What a node of the syntax tree says, or UNREAD."""
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
