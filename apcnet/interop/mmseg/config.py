"""Builds models from mmsegmentation's config dicts, and refuses by name any option that they do not support."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apcnet.choices import check_choice
from apcnet.interop.mmseg.names import in_place
from apcnet.models import Segmentor
from apcnet.models.build import HEADS, build_filled
from apcnet.models.resnet import STAGES
from apcnet.models.weights import assign

MODELS = {"APCHead": "apcnet", "PSPHead": "pspnet", "EncHead": "encnet", "FPNHead": "semantic_fpn", "FCNHead": "fcn"}
MODELS |= {"UPerHead": "upernet"}
SHARED = {"channels": "channels", "dropout_ratio": "dropout", "align_corners": "align_corners"}
OPTIONS = {  # of the heads: mmsegmentation's names and ours; the defaults agree
    "APCHead": {"pool_scales": "scales", "fusion": "fusion"},
    "PSPHead": {"pool_scales": "scales"},
    "EncHead": {"num_codes": "codes", "use_se_loss": "presence", "add_lateral": "lateral"},
    "FPNHead": {"feature_strides": "strides"},
    "UPerHead": {"pool_scales": "scales"},
    "FCNHead": {"num_convs": "convs", "concat_input": "concat", "kernel_size": "kernel_size"},
}
FIXED = {  # options that must have one of these values where they are given
    "act_cfg": (None, {"type": "ReLU"}, {"type": "ReLU", "inplace": True}, {"type": "ReLU", "inplace": False}),
    "input_transform": (None, "multiple_select"),
    "dilation": (1,),
    "style": ("pytorch",),
    "num_stages": (4,),
    "in_channels": (3,),
    "out_indices": ((0, 1, 2, 3),),
    "deep_stem": (True,),
    "start_level": (0,),
    "end_level": (-1,),
    "upsample_cfg": ({"mode": "nearest"},),
    **dict.fromkeys(("conv_cfg", "dcn", "plugins", "multi_grid"), (None,)),
    **dict.fromkeys(("avg_down", "add_extra_convs", "relu_before_extra_convs", "no_norm_on_lateral"), (False,)),
}
TRAINING_OPTIONS = {"init_cfg", "pretrained", "loss_decode", "loss_se_decode", "sampler", "ignore_index"}
TRAINING_OPTIONS |= {"norm_eval", "frozen_stages", "with_cp", "zero_init_residual", "train_cfg", "test_cfg"}
TRAINING_OPTIONS |= {"threshold"}


def load_head(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Builds the head of an mmsegmentation config and loads its weights.

    Args:
        config: Plain dict of a decode head: type "APCHead", "PSPHead", "EncHead", "FPNHead", "FCNHead" or "UPerHead",
            in_channels, num_classes and the head's options.
        state_dict: Weights by the names that mmsegmentation's head has.

    Returns:
        A module that takes the backbone's list of maps, selects config["in_index"] and returns the logits; for an
        EncHead with its SE branch (logits, se_logits).

    Raises:
        ValueError: An option has no counterpart here, or a weight is missing, unexpected or of another shape.

    Example:
        >>> head = load_head(cfg.model.decode_head.to_dict(), mmseg_model.decode_head.state_dict())
        >>> logits = head(mmseg_model.extract_feat(images))
    """
    kind = _type(config, "config", MODELS)
    for name in ("in_channels", "num_classes"):
        if name not in config:
            raise ValueError(f"config.{name}: expected the {name} of the {kind}, got none")
    head = HEADS[MODELS[kind]](
        config["in_channels"],
        config["num_classes"],
        index=config.get("in_index", -1),
        **_head_options(config, "config"),
    )
    assign(in_place(head), state_dict, "state_dict")
    return head


def load_model(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Segmentor:
    """Builds the model of an mmsegmentation config and loads its weights.

    The model keeps the weights of the losses, and whether their mean is over all pixels or the valid ones. Other
    training options (class weights, frozen stages) are ignored.

    Args:
        config: Plain dict of an EncoderDecoder with a ResNetV1c backbone, `cfg.model` of a config file.
        state_dict: Weights by the names that mmsegmentation's model has.

    Returns:
        A `Segmentor` in training mode, which computes what mmsegmentation's model computes.

    Raises:
        ValueError: An option has no counterpart here, or a weight is missing, unexpected or of another shape.

    Example:
        >>> model = load_model(cfg.model.to_dict(), torch.load("iter_80000.pth")["state_dict"]).eval()
        >>> model.save("model.safetensors")
    """
    _type(config, "config", ("EncoderDecoder",))
    allowed = ("backbone", "neck", "decode_head", "auxiliary_head", "data_preprocessor")
    _check_rest(config, "config", allowed)
    head, auxiliary, neck = _part(config, "decode_head"), config.get("auxiliary_head"), config.get("neck")
    backbone, options = _backbone(_part(config, "backbone"))
    name = MODELS[_type(head, "config.decode_head", MODELS)]
    options |= _head_options(head, "config.decode_head")
    options.pop("strides", None)  # build takes them from the backbone
    index = {"encnet": (1, 2, 3), "semantic_fpn": (0, 1, 2, 3), "upernet": (0, 1, 2, 3)}.get(name, 3)
    _check_index(head, "config.decode_head", index)
    options |= _neck(neck) if name == "semantic_fpn" else {}
    if neck is not None and name != "semantic_fpn":
        raise ValueError(f"config.neck: expected None with decode_head {head['type']}, got {neck['type']}")
    options |= _auxiliary(auxiliary, options)
    if head.get("loss_decode", {}).get("avg_non_ignore", False):
        options["reduction"] = "mean"
    if name == "encnet" and "loss_se_decode" in head:
        options["presence_weight"] = head["loss_se_decode"].get("loss_weight", 1.0)
    architecture = {"model": name, "backbone": backbone, "num_classes": head["num_classes"], **options}
    model = build_filled(architecture, state_dict, "state_dict", in_place)
    model.mean, model.std = _normalisation(config.get("data_preprocessor") or {}, model)
    return model


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"config.{name}: expected a dict, got {type(part).__name__}")
    return part


def _head_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = SHARED | OPTIONS[config["type"]]
    _check_rest(config, where, {*names, "in_channels", "in_index", "num_classes"})
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _backbone(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    where = "config.backbone"
    _type(config, where, ("ResNetV1c",))
    _check_rest(config, where, {"depth", "strides", "dilations", "contract_dilation", "base_channels", "stem_channels"})
    stages = tuple(config.get("strides", (1, 2, 2, 2))), tuple(config.get("dilations", (1, 1, 1, 1)))
    strides = [stride for stride, known in STAGES.items() if known == stages]
    if not strides:
        known = " or ".join(map(str, STAGES.values()))
        raise ValueError(f"{where}.strides, dilations: expected {known}, got {stages}")
    if max(stages[1]) > 1 and not config.get("contract_dilation", False):
        raise ValueError(f"{where}.contract_dilation: expected True with dilations {stages[1]}, got False")
    widths = {"width": config.get("base_channels", 64), "stem_width": config.get("stem_channels", 64)}
    options = {name: width for name, width in widths.items() if width != 64}
    return f"resnet{config['depth']}", {"output_stride": strides[0], **options}


def _neck(config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        raise ValueError("config.neck: expected an FPN with decode_head FPNHead, got None")
    _type(config, "config.neck", ("FPN",))
    _check_rest({**config, "in_channels": 3}, "config.neck", {"out_channels", "num_outs"})
    if bool(config.get("norm_cfg")) != bool(config.get("act_cfg")):
        raise ValueError("config.neck: expected norm_cfg and act_cfg or neither, got one of them")
    norm = {"neck_norm": True} if config.get("norm_cfg") else {}
    return {"neck_channels": config["out_channels"], **norm}


def _auxiliary(config: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    if config is None:
        return {"auxiliary_channels": 0}
    where = "config.auxiliary_head"
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: expected one head, got a list of {len(config)}")
    _type(config, where, ("FCNHead",))
    given = _head_options(config, where)
    _check_index(config, where, 2)
    expected = {"convs": 1, "concat": False, "kernel_size": 3}
    expected |= {name: options[name] for name in ("dropout", "align_corners") if name in options}
    for name, value in expected.items():
        if given.get(name, value) != value:
            raise ValueError(f"{where}: expected {name} {value}, got {given[name]}")
    weight = config.get("loss_decode", {}).get("loss_weight", 1.0)
    return {"auxiliary_channels": config["channels"], "auxiliary_weight": weight}


def _normalisation(config: Mapping[str, Any], model: Segmentor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config and not config.get("bgr_to_rgb", False):
        raise ValueError("config.data_preprocessor.bgr_to_rgb: expected True, got False: these models take RGB images")
    return tuple(config.get("mean") or model.mean), tuple(config.get("std") or model.std)


def _type(config: Mapping[str, Any], where: str, known) -> str:
    check_choice(config.get("type", ""), f"{where}.type", known)
    norm = config.get("norm_cfg") or {"type": "BN"}
    check_choice(norm["type"], f"{where}.norm_cfg.type", ("BN", "SyncBN"))
    for name, value in {"eps": 1e-5, "momentum": 0.1}.items():
        if norm.get(name, value) != value:
            raise ValueError(f"{where}.norm_cfg.{name}: expected {value}, got {norm[name]}")
    return config["type"]


def _check_index(config: Mapping[str, Any], where: str, expected: int | tuple[int, ...]) -> None:
    given = config.get("in_index", -1)
    given = given % 4 if isinstance(given, int) else tuple(given)
    if given != expected:
        raise ValueError(f"{where}.in_index: expected {expected}, got {config.get('in_index', -1)}")


def _check_rest(config: Mapping[str, Any], where: str, used) -> None:
    """Checks that every unused option concerns training only, or has a value that the models here support."""
    for name, value in config.items():
        if name in used or name in TRAINING_OPTIONS or name in ("type", "norm_cfg"):
            continue
        if name == "out_channels" and value in (None, config.get("num_classes")):
            continue
        check_choice(name, where, sorted({*used, *FIXED, *TRAINING_OPTIONS}))
        if _frozen(value) not in [_frozen(allowed) for allowed in FIXED[name]]:
            raise ValueError(f"{where}.{name}: expected {' or '.join(map(str, FIXED[name]))}, got {value}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
