"""Tests that names, shapes and the config text of a checkpoint give the config that it was trained with."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apcnet.interop.mmseg.identify import UNREAD, config_of, read_config
from apcnet.interop.mmseg.names import in_place
from apcnet.models import build

MODELS = Path(__file__).resolve().parents[4] / "shared" / "parity"
WIDTHS = {"width": 8, "auxiliary_channels": 32}
D8 = {"strides": [1, 2, 1, 1], "dilations": [1, 1, 2, 4], "contract_dilation": True}
TEXT = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(type='ResNetV1c', depth=50, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True),
    decode_head=dict(type='PSPHead', pool_scales=(1, 2, 4), align_corners=True, dropout_ratio=0.25,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.75)),
    auxiliary_head=dict(type='FCNHead', align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=-0.5)))
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
data = dict(train=dict(pipeline=make_pipeline(), root='x'), samples_per_gpu=2)
work_dir = os.path.join('a', 'b')
"""


def shapes_of(name, **options):
    """Returns mmsegmentation's weights of a model, without values."""
    with torch.device("meta"):
        return in_place(build(name, num_classes=7, **options))


def test_every_real_model_of_the_parity_cases_is_identified():
    if not MODELS.is_dir():
        pytest.skip("needs ../shared/parity")
    for file in sorted(MODELS.glob("model_*.safetensors")):
        with safe_open(file, "pt") as case:
            expected = json.loads(case.metadata()["case"])["model"]
            state = {name[6:]: case.get_tensor(name) for name in case.keys() if name.startswith("state/")}  # noqa: SIM118
        config = config_of(state, align_corners=False, output_stride=32 if "fpn" in file.name else 8)
        for part in ("backbone", "neck", "decode_head", "auxiliary_head"):
            assert (part in config) == (part in expected)
            told = {"norm_eval", "style", "dropout_ratio", "loss_decode"}  # which shapes do not tell
            for name in expected.get(part, {}).keys() - told:
                assert config[part][name] == expected[part][name], (file.name, part, name)


@pytest.mark.parametrize(
    ("model", "backbone", "expected"),
    [
        ("apcnet", "resnet50", {"type": "APCHead", "pool_scales": [1, 2, 3, 6], "fusion": True, "in_index": 3}),
        ("apcnet", "resnet101", {"type": "APCHead", "in_channels": 256, "channels": 512}),
        ("pspnet", "resnet18", {"type": "PSPHead", "pool_scales": [1, 2, 3, 6], "in_channels": 64}),
        ("encnet", "resnet34", {"type": "EncHead", "in_channels": [16, 32, 64], "num_codes": 32, "use_se_loss": True}),
        ("fcn", "resnet50", {"type": "FCNHead", "num_convs": 2, "concat_input": True, "in_channels": 256}),
        ("semantic_fpn", "resnet50", {"type": "FPNHead", "feature_strides": [4, 8, 16, 32], "channels": 128}),
        ("upernet", "resnet18", {"type": "UPerHead", "in_channels": [8, 16, 32, 64], "in_index": [0, 1, 2, 3]}),
    ],
)
def test_models_and_depths(model, backbone, expected):
    widths = {"width": 8} if model == "semantic_fpn" else WIDTHS
    config = config_of(shapes_of(model, backbone=backbone, **widths), align_corners=True, output_stride=16)
    assert config["decode_head"].items() >= {**expected, "num_classes": 7, "align_corners": True}.items()
    assert config["backbone"].items() >= {"depth": int(backbone[6:]), "base_channels": 8, "stem_channels": 64}.items()
    assert config["backbone"]["strides"] == [1, 2, 2, 1] and config["backbone"]["dilations"] == [1, 1, 1, 2]
    assert ("neck" in config) == (model == "semantic_fpn") != ("auxiliary_head" in config)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("apcnet", {"scales": (1, 4, 8), "fusion": False}, {"pool_scales": [1, 4, 8], "fusion": False}),
        ("encnet", {"lateral": True, "presence": False, "codes": 9}, {"add_lateral": True, "use_se_loss": False}),
        ("encnet", {"codes": 9, "channels": 24}, {"num_codes": 9, "channels": 24, "add_lateral": False}),
        ("fcn", {"concat": False, "convs": 3}, {"concat_input": False, "num_convs": 3}),
    ],
)
def test_options_of_heads(model, options, expected):
    config = config_of(shapes_of(model, **WIDTHS, **options), align_corners=False, output_stride=8)
    assert config["decode_head"].items() >= expected.items()
    assert config["auxiliary_head"].items() >= {"channels": 32, "in_index": 2, "concat_input": False}.items()


def test_a_neck_with_batch_norm():
    config = config_of(shapes_of("semantic_fpn", width=8, neck_norm=True), align_corners=False, output_stride=32)
    assert config["neck"]["norm_cfg"] == {"type": "BN", "requires_grad": True}
    config = config_of(shapes_of("semantic_fpn", width=8), align_corners=False, output_stride=32)
    assert config["neck"] == {
        "type": "FPN",
        "in_channels": [32, 64, 128, 256],
        "out_channels": 256,
        "num_outs": 4,
        "norm_cfg": None,
    }


def test_the_config_text_says_what_shapes_do_not():
    state = shapes_of("pspnet", scales=(1, 2, 4), **WIDTHS)
    config = config_of(state, TEXT)
    head, auxiliary = config["decode_head"], config["auxiliary_head"]
    assert head["pool_scales"] == [1, 2, 4] and head["align_corners"] is auxiliary["align_corners"] is True
    assert head["dropout_ratio"] == 0.25 and head["num_classes"] == 7 and head["norm_cfg"]["type"] == "BN"
    assert (head["loss_decode"]["loss_weight"], auxiliary["loss_decode"]["loss_weight"]) == (0.75, -0.5)
    assert config["backbone"].items() >= D8.items() and "pretrained" not in config["backbone"]
    assert config["data_preprocessor"] == {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0], "bgr_to_rgb": True}
    assert config_of(state, TEXT, align_corners=True, output_stride=8) == config
    newer = TEXT.replace("img_norm_cfg = dict", "data_preprocessor = dict").replace("to_rgb", "bgr_to_rgb")
    assert config_of(state, newer) == config


def test_a_backbone_whose_strides_the_text_leaves_out_has_mmsegmentations():
    text = re.sub("dilations=.*contract_dilation=True", "", TEXT)
    config = config_of(shapes_of("pspnet", scales=(1, 2, 4), **WIDTHS), text)
    assert (config["backbone"]["strides"], config["backbone"]["dilations"]) == ([1, 2, 2, 2], [1, 1, 1, 1])


def test_what_nobody_says_is_asked_for():
    state = shapes_of("apcnet", **WIDTHS)
    with pytest.raises(ValueError, match="align_corners: expected True or False, got none"):
        config_of(state)
    with pytest.warns(UserWarning, match="output_stride: assumed 8"):
        config = config_of(state, align_corners=False)
    assert config["backbone"].items() >= D8.items()
    with pytest.raises(ValueError, match="output_stride: expected 8, 16 or 32, got 4"):
        config_of(state, align_corners=False, output_stride=4)
    with pytest.raises(ValueError, match="decode_head has 3 pool scales"):
        config_of(shapes_of("pspnet", scales=(1, 2, 4), **WIDTHS), align_corners=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"align_corners": False},
            "align_corners: expected True, as decode_head.align_corners in the checkpoint's config, got False",
        ),
        ({"output_stride": 16}, "output_stride: expected .*, as in the checkpoint's config, got 16"),
    ],
)
def test_flags_may_not_contradict_the_text(change, message):
    with pytest.raises(ValueError, match=message):
        config_of(shapes_of("pspnet", scales=(1, 2, 4), **WIDTHS), TEXT, **change)


def test_the_text_may_not_contradict_the_weights():
    with pytest.raises(ValueError, match="holds the weights of APCHead, its config says PSPHead"):
        config_of(shapes_of("apcnet", **WIDTHS), TEXT)


def renamed(state, pattern, replacement):
    return {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"\.psp_modules", ".aspp_modules", r"decode_head holds aspp_modules, bottleneck, conv_seg; supported are APC"),
        (r"decode_head\.bottleneck", "decode_head.lateral_convs.0", "decode_head holds conv_seg, lateral_convs, psp"),
        (r"auxiliary_head\.", "auxiliary_head.0.", "auxiliary_head holds 0; supported are"),
        (r"stem\.0", "conv1", "got a ResNet with a 7×7 stem"),
        (r"^backbone", "encoder", "expected names that start with backbone, decode_head .* got auxiliary_head, decode"),
        (r"layer3\.5", "layer3.6", r"expected layer3\.0, layer3\.1, … without a gap, got numbers \[0, 1, 2, 3, 4, 6\]"),
        (r"layer3\.5", "layer3.4", r"expected a ResNet of depth 18, 34, 50, 101, got stages of \(3, 4, 5, 3\)"),
        (r"downsample\.(\d)", lambda m: f"downsample.{int(m[1]) + 1}", r"averages in its shortcuts \(ResNetV1d\)"),
        (r"conv_seg", "conv", "decode_head holds bottleneck, conv, psp_modules"),
    ],
)
def test_other_architectures_are_named(pattern, replacement, message):
    state = renamed(shapes_of("pspnet", **WIDTHS), pattern, replacement)
    with pytest.raises(ValueError, match=message):
        config_of(state)


def test_a_map_of_another_width_is_named():
    state = shapes_of("apcnet", width=8, auxiliary_channels=32)
    state["auxiliary_head.convs.0.conv.weight"] = torch.empty(32, 100, 3, 3, device="meta")
    with pytest.raises(
        ValueError, match=r"auxiliary_head takes 100 channels, expected one of the backbone's \[32, 64, 128"
    ):
        config_of(state, align_corners=False, output_stride=8)


def test_config_text_is_read_and_never_run(tmp_path):
    mark = tmp_path / "run"
    text = f"""
a = dict(x=1, y=(1, -2.5), z=[None, True, 'é'], w=dict(v={{'k': 'v', 3: 4}}))
b = __import__('pathlib').Path({str(mark)!r}).touch()
c = dict(x=__import__('os').system('touch {mark}'), y=2)
d = [1, open({str(mark)!r}, 'w')]
e = dict(*a, y=1)
f = {{**a, 'y': 1}}
g = 'x'.join(['a'])
h = dict(**a)
import os
"""
    assert read_config(text) == {
        "a": {"x": 1, "y": [1, -2.5], "z": [None, True, "é"], "w": {"v": {"k": "v"}}},
        "c": {"x": UNREAD, "y": 2},
    }
    assert not mark.exists()


def test_what_matters_and_cannot_be_read_is_refused():
    text = TEXT.replace("strides=(1, 2, 1, 1)", "strides=STRIDES")
    with pytest.raises(ValueError, match="expected literals in backbone, got other expressions for strides"):
        config_of(shapes_of("pspnet", scales=(1, 2, 4), **WIDTHS), text)


def test_types_with_their_whole_path():
    text = TEXT.replace("'PSPHead'", "'mmseg.models.decode_heads.psp_head.PSPHead'")
    config = config_of(shapes_of("pspnet", scales=(1, 2, 4), **WIDTHS), text)
    assert config["decode_head"]["type"] == "PSPHead" and config["backbone"]["type"] == "ResNetV1c"


@pytest.mark.parametrize(
    "text", ["model = dict(", "model = \0", "a = " + "(" * 400 + ")" * 400], ids=["cut", "nul", "deep"]
)
def test_a_text_that_cannot_be_read_is_left_out_and_said(text):
    with pytest.warns(UserWarning, match="the config text in the checkpoint is not used: it is not valid Python"):
        assert read_config(text) == {}


def test_the_published_names_are_identified():
    """Tests state dicts of real models, whose names and shapes were recorded from mmsegmentation."""
    folder = MODELS.parent / "reference" / "mmseg_keys"
    if not folder.is_dir():
        pytest.skip("needs ../shared/reference")
    heads = {"apcnet": "APCHead", "encnet": "EncHead", "fcn": "FCNHead", "pspnet": "PSPHead", "sem_fpn": "FPNHead"}
    for file in sorted(folder.glob("keys_*.txt")):
        lines = re.findall(r"^(\S+) \((.*)\)$", file.read_text(), re.MULTILINE)
        state = {name: torch.empty([int(n) for n in re.findall(r"\d+", shape)], device="meta") for name, shape in lines}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_of(state, align_corners=False)
        name = re.match(r"keys_(apcnet|encnet|fcn|pspnet|sem_fpn)", file.name)[1]
        assert config["decode_head"]["type"] == heads[name]
        assert config["decode_head"]["num_classes"] == (150 if "ade" in file.name else 19)
        assert config["backbone"]["depth"] == (101 if "101" in file.name else 50)
