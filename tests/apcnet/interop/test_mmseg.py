"""Tests that unsupported options and weights that do not fit are refused by name."""

import copy
from pathlib import Path

import parity
import pytest
import torch

import apcnet
from apcnet.interop import mmseg
from apcnet.models import build

KEYS = parity.ROOT.parent / "shared" / "reference" / "mmseg_keys"
BACKBONE = {
    "type": "ResNetV1c", "depth": 18, "num_stages": 4, "out_indices": (0, 1, 2, 3), "strides": (1, 2, 1, 1),
    "dilations": (1, 1, 2, 4), "contract_dilation": True, "norm_cfg": {"type": "SyncBN", "requires_grad": True},
    "norm_eval": False, "style": "pytorch", "base_channels": 8, "stem_channels": 8,
}  # fmt: skip
HEAD = {
    "type": "APCHead", "in_channels": 64, "in_index": 3, "channels": 8, "pool_scales": (1, 2), "dropout_ratio": 0.1,
    "num_classes": 5, "norm_cfg": {"type": "SyncBN"}, "align_corners": True,
    "loss_decode": {"type": "CrossEntropyLoss"},
}  # fmt: skip
AUXILIARY = {
    "type": "FCNHead", "in_channels": 32, "in_index": 2, "channels": 8, "num_convs": 1, "concat_input": False,
    "dropout_ratio": 0.1, "num_classes": 5, "align_corners": True, "loss_decode": {"loss_weight": 0.3},
}  # fmt: skip
PREPROCESSOR = {"type": "SegDataPreProcessor", "mean": [1.0, 2, 3], "std": [4.0, 5, 6], "bgr_to_rgb": True}
CONFIG = {
    "type": "EncoderDecoder", "data_preprocessor": PREPROCESSOR, "pretrained": "open-mmlab://resnet18_v1c",
    "backbone": BACKBONE, "decode_head": HEAD, "auxiliary_head": AUXILIARY, "test_cfg": {"mode": "whole"},
}  # fmt: skip
OPTIONS = {"width": 8, "stem_width": 8, "channels": 8, "scales": (1, 2), "align_corners": True, "auxiliary_channels": 8}


def model_and_state():
    torch.manual_seed(0)
    model = build("apcnet", "resnet18", 5, **OPTIONS)
    return model, mmseg.state_dict(model)


def test_a_config_becomes_a_model_that_can_be_saved(tmp_path):
    model, state = model_and_state()
    loaded = mmseg.load_model(CONFIG, state)
    assert (loaded.mean, loaded.std, loaded.auxiliary_weight) == ((1, 2, 3), (4, 5, 6), 0.3)
    assert loaded.align_corners and loaded.auxiliary.align_corners
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    loaded.save(tmp_path / "model.safetensors")
    again = apcnet.load(tmp_path / "model.safetensors")
    assert (again.architecture["scales"], again.auxiliary_weight, again.mean) == ([1, 2], 0.3, (1, 2, 3))


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *rooms, name = path.split(".")
    inner = config
    for room in rooms:
        inner = inner[room]
    inner[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("type", "CascadeEncoderDecoder", r"config\.type: expected one of EncoderDecoder, got"),
        ("decode_head.type", "APHead", r"config\.decode_head\.type: .*did you mean 'APCHead'"),
        ("decode_head.type", "DAHead", r"config\.decode_head\.type: expected one of APCHead, PSPHead, EncHead"),
        ("decode_head.norm_cfg", {"type": "GN"}, r"norm_cfg\.type: expected one of BN, SyncBN, got 'GN'"),
        ("decode_head.norm_cfg", {"type": "BN", "eps": 1e-3}, r"norm_cfg\.eps: expected 1e-05, got 0\.001"),
        ("decode_head.act_cfg", {"type": "GELU"}, r"decode_head\.act_cfg: expected .*ReLU.*got .*GELU"),
        ("decode_head.pool_scale", (1, 2), r"decode_head: .*did you mean 'pool_scales'"),
        ("decode_head.in_index", 2, r"decode_head\.in_index: expected 3, got 2"),
        ("decode_head.out_channels", 1, "decode_head: expected one of"),
        ("backbone.type", "ResNet", r"backbone\.type: .*ResNetV1c"),
        ("backbone.depth", 152, "backbone: expected one of .*resnet101.*got 'resnet152'"),
        ("backbone.strides", (1, 2, 2, 2), r"backbone\.strides, dilations: expected"),
        ("backbone.contract_dilation", False, r"contract_dilation: expected True"),
        ("backbone.style", "caffe", r"backbone\.style: expected pytorch, got caffe"),
        ("neck", {"type": "FPN", "out_channels": 8}, r"config\.neck: expected None with decode_head APCHead"),
        ("auxiliary_head.num_convs", 2, r"auxiliary_head: expected convs 1, got 2"),
        ("auxiliary_head.align_corners", False, r"auxiliary_head: expected align_corners True, got False"),
        ("auxiliary_head", [AUXILIARY, AUXILIARY], r"auxiliary_head: expected one head, got a list of 2"),
        ("data_preprocessor.bgr_to_rgb", False, r"bgr_to_rgb: expected True, got False"),
    ],
)
def test_what_our_models_cannot_do_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        mmseg.load_model(changed(path, value), model_and_state()[1])


def test_weights_that_do_not_fit_are_named_as_they_came():
    state = model_and_state()[1]
    del state["decode_head.acm_modules.1.gla.bias"]
    state["decode_head.extra"] = torch.zeros(1)
    state["decode_head.acm_modules.0.input_redu_conv.conv.weight"] = torch.zeros(8, 63, 1, 1)
    with pytest.raises(ValueError, match=r"missing: decode_head\.acm_modules\.1\.gla\.bias; not in the model: "
        r"decode_head\.extra; different shape: decode_head\.acm_modules\.0\.input_redu_conv\.conv\.weight: "
        r"expected \(8, 64, 1, 1\), got \(8, 63, 1, 1\)"):  # fmt: skip
        mmseg.load_model(CONFIG, state)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("apcnet", ("apcnet", "resnet50", 19)), ("apcnet101", ("apcnet", "resnet101", 19)),
        ("apcnet_ade", ("apcnet", "resnet50", 150)), ("encnet", ("encnet", "resnet50", 19)),
        ("fcn", ("fcn", "resnet50", 19)), ("pspnet", ("pspnet", "resnet50", 19)),
        ("sem_fpn", ("semantic_fpn", "resnet50", 19)),
    ],
)  # fmt: skip
def test_names_and_shapes_of_the_published_models(file, arguments):
    path = Path(KEYS / f"keys_{file}.txt")
    if not path.exists():
        pytest.skip("needs ../shared/reference/mmseg_keys")
    with torch.device("meta"):
        ours = mmseg.names.in_place(build(*arguments))
    listed = dict(line.split(" ", 1) for line in path.read_text().splitlines() if line.strip())
    assert {name: str(tuple(tensor.shape)) for name, tensor in ours.items()} == listed
