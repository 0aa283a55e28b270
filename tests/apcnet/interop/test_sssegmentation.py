"""Tests that sssegmentation's weights compute the same here as there."""

import re

import parity
import pytest
import torch

import apcnet
from apcnet.interop import mmseg, sssegmentation
from apcnet.interop.convert import convert
from apcnet.interop.mmseg.identify import config_of
from apcnet.models import build

SMALL = {"backbone": "resnet18", "num_classes": 5, "width": 8}
MODELS = {  # with what differs from mmsegmentation's
    "APCNet": ("apcnet", {"channels": 16, "auxiliary_channels": 20}),
    "PSPNet": ("pspnet", {"channels": 16, "auxiliary_channels": 20, "align_corners": True}),
    "ENCNet": ("encnet", {"channels": 16, "codes": 6, "auxiliary_channels": 20}),
    "FCN": ("fcn", {"channels": 16, "concat": False, "auxiliary_channels": 20}),
    "SemanticFPN": ("semantic_fpn", {"channels": 12, "neck_channels": 16, "neck_norm": True}),
}
HEADS = {
    "APCNet": {"in_channels": 64, "pool_scales": (1, 2, 3, 6)},
    "PSPNet": {"in_channels": 64, "pool_scales": (1, 2, 3, 6)},
    "ENCNet": {"in_channels_list": [32, 64], "num_codes": 6, "extra": {"use_se_loss": True, "add_lateral": False}},
    "FCN": {"in_channels": 64},
    "SemanticFPN": {
        "in_channels_list": [8, 16, 32, 64],
        "upsample_cfg": {"mode": "nearest"},
        "feature_stride_list": [4, 8, 16, 32],
        "scale_head_channels": 12,
    },
}

# mmsegmentation's names to sssegmentation's, whose models were written down from instances of them.
PLACES = [
    (r"^backbone\.", "backbone_net."),
    (r"^auxiliary_head\.convs\.0\.conv\.", "auxiliary_decoder.0."),
    (r"^auxiliary_head\.convs\.0\.bn\.", "auxiliary_decoder.1."),
    (r"^auxiliary_head\.conv_seg\.", "auxiliary_decoder.4."),
    (r"^neck\.(\w+\.\d)\.conv\.", r"fpn_neck.\1.0."),
    (r"^neck\.(\w+\.\d)\.bn\.", r"fpn_neck.\1.1."),
    (r"^decode_head\.(acm_modules\.\d\.\w+|scale_heads\.\d\.\d|enc_module\.encoding_project)\.conv\.", r"\1.0."),
    (r"^decode_head\.(acm_modules\.\d\.\w+|scale_heads\.\d\.\d|enc_module\.encoding_project)\.bn\.", r"\1.1."),
    (r"^decode_head\.psp_modules\.(\d)\.1\.conv\.", r"ppm_net.branches.\1.1."),
    (r"^decode_head\.psp_modules\.(\d)\.1\.bn\.", r"ppm_net.branches.\1.2."),
    (r"^decode_head\.(acm_modules|enc_module|se_layer)\.", r"\1."),
]
OF_KIND = {
    "APCNet": [("bottleneck.conv", "decoder.0"), ("bottleneck.bn", "decoder.1"), ("conv_seg", "decoder.4")],
    "PSPNet": [("bottleneck.conv", "ppm_net.bottleneck.0"), ("bottleneck.bn", "ppm_net.bottleneck.1")],
    "ENCNet": [("bottleneck.conv", "bottleneck.0"), ("bottleneck.bn", "bottleneck.1")],
    "FCN": [
        ("convs.0.conv", "decoder.0"),
        ("convs.0.bn", "decoder.1"),
        ("convs.1.conv", "decoder.3"),
        ("convs.1.bn", "decoder.4"),
        ("conv_seg", "decoder.7"),
    ],
    "SemanticFPN": [],
}


def theirs(kind, model):
    """Returns a model's weights by sssegmentation's names."""
    head = [(rf"^decode_head\.{re.escape(a)}\.", f"{b}.") for a, b in [*OF_KIND[kind], ("conv_seg", "decoder.1")]]
    state = {}
    for name, tensor in mmseg.state_dict(model).items():
        for pattern, replacement in [*head, *PLACES]:
            name, found = re.subn(pattern, replacement, name)
            if found:
                break
        state[name] = tensor
    return state


def small(kind):
    torch.manual_seed(0)
    name, options = MODELS[kind]
    model = build(name, **SMALL, **options).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.05)
    return model


def loaded(state, **told):
    """Loads weights as convert does."""
    weights = sssegmentation.rename(state)
    return mmseg.load_model(config_of(weights, sssegmentation.CONFIG, **told), weights)


def segmentor(kind):
    """Returns a config without a real backbone."""
    selected = {"ENCNet": (2, 3), "SemanticFPN": (0, 1, 2, 3)}.get(kind, (2, 3))
    return {
        "type": kind,
        "num_classes": 5,
        "align_corners": kind == "PSPNet",
        "norm_cfg": {"type": "SyncBatchNorm"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": {"selected_indices": selected},
        "head": {"feats_channels": 16, "dropout": 0.1, **HEADS[kind]},
    }


def test_semantic_fpn_as_they_compute_it():
    case = parity.load("ssseg_semantic_fpn")
    module = sssegmentation.load_head(case.about["segmentor"], case.under("state/"))
    for mode, of_output, of_gradient in (("eval", 1e-5, 1e-4), ("train", 2e-4, 1e-3)):
        module.train(mode == "train")
        inputs = [tensor.requires_grad_() for tensor in case.listed("input.")]
        output = module(inputs)
        assert parity.distance(output, case.tensors[f"{mode}.output.0"]) < of_output
        gradients = torch.autograd.grad((output * case.tensors["cotangent.0"]).sum(), inputs)
        for gradient, expected in zip(gradients, case.listed(f"{mode}.grad.input."), strict=True):
            assert parity.distance(gradient, expected) < of_gradient


@pytest.mark.parametrize("kind", MODELS)
def test_models_and_heads(kind):
    model = small(kind)
    images = torch.randn(2, 3, 48, 48)
    state = theirs(kind, model)
    assert not any(name.startswith(("decode_head", "neck", "auxiliary_head")) for name in state)
    align_corners = kind == "PSPNet"
    given = loaded(state, align_corners=align_corners, output_stride=32 if "FPN" in kind else 8)
    head = sssegmentation.load_head(segmentor(kind), state)
    assert given.align_corners is align_corners
    with torch.no_grad():
        features = model.backbone(images)
        assert torch.equal(given.eval()(images), model(images))
        assert torch.equal(head.eval()(features), model(images))
        assert head.train()(features).shape == model(images).shape
        if model.auxiliary is not None:
            assert torch.equal(given.auxiliary(features), model.auxiliary(features))


def test_a_checkpoint_is_converted(tmp_path):
    model = small("FCN")
    torch.save({"cur_epoch": 3, "cur_iter": 9, "model": theirs("FCN", model)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="align_corners: expected True or False, got none"):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors", align_corners=False, output_stride=8)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(apcnet.load(tmp_path / "a.safetensors")(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "SemanticFpn"}, "config.type: .* got 'SemanticFpn'; did you mean 'SemanticFPN'"),
        ({"norm_cfg": {"type": "GroupNorm"}}, r"config\.norm_cfg\.type: .* got 'GroupNorm'"),
        ({"act_cfg": {"type": "GELU"}}, r"config\.act_cfg\.type: .* got 'GELU'"),
        ({"num_classes": 6}, r"conv_seg\.weight: expected \(6, 12, 1, 1\), got \(5, 12, 1, 1\)"),
    ],
)
def test_a_config_of_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sssegmentation.load_head({**segmentor("SemanticFPN"), **change}, theirs("SemanticFPN", small("SemanticFPN")))


def test_another_architecture_is_named():
    state = theirs("APCNet", small("APCNet"))
    state = {name.replace("acm_modules", "aspp_net"): tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"expected names that start with backbone, decode_head .* aspp_net"):
        loaded(state, align_corners=False, output_stride=8)
