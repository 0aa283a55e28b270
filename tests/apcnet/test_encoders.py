"""Tests encoders of timm and torchvision under every head: maps, training, weights, files and export."""

import importlib
import itertools
import json
import sys

import pytest
import real_packages
import torch
from torch import nn

import apcnet
from apcnet import cli
from apcnet.config import Optimisation
from apcnet.export import export
from apcnet.interop import mmseg
from apcnet.interop.backbones import adapted
from apcnet.models import build, windows
from apcnet.models.timm_encoder import TimmEncoder
from apcnet.training.optimizer import optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet"]
PYRAMIDS = ("semantic_fpn", "upernet")
ENCODERS = {  # families: strides for heads that read one map, and for those that read a pyramid
    "resnet18d": ([4, 8, 16, 32],) * 2,
    "convnext_atto": ([4, 8, 16, 32],) * 2,
    "mobilenetv4_conv_small": ([4, 8, 16, 32],) * 2,
    "efficientnet_b0": ([4, 8, 16, 32],) * 2,
    "swin_tiny_patch4_window7_224": ([4, 8, 16, 32],) * 2,  # maps of NHWC
    "vit_tiny_patch16_224": ([16] * 4, [4, 8, 16, 32]),  # maps of one stride
    "vit_small_patch16_dinov3": ([16] * 4, [4, 8, 16, 32]),
}
FAMILIES = [name for name in ENCODERS if name not in ("efficientnet_b0", "vit_tiny_patch16_224")]
EXPORTED = [*itertools.product(FAMILIES, [head for head in HEADS if head != "fcn"])]
EXPORTED += [("efficientnet_b0", "encnet"), ("resnet18d", "fcn")]
LEAST = {"channels": 8}  # other options as the heads have them


@pytest.fixture(scope="module")
def timm():
    return real_packages.imported("timm")


@pytest.fixture(scope="module")
def torchvision():
    return real_packages.imported("torchvision")


def images(*size, batch=2, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def created(model, encoder, **options):
    torch.manual_seed(0)
    auxiliary = {} if model == "semantic_fpn" else {"auxiliary_channels": 8}
    return apcnet.create(model, f"timm:{encoder}", 5, **LEAST, **auxiliary, **options)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_head_on_every_encoder(timm, tmp_path, encoder, head):
    """Tests a forward pass, a training step, and that a saved model computes the same."""
    model = created(head, encoder)
    strides = ENCODERS[encoder][head in PYRAMIDS]
    assert model.backbone.strides == strides
    x, target = images(64, 96), torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(1))
    model.eval()
    before = model(x)
    last = strides[0] if head in PYRAMIDS else strides[-1]
    assert before.shape == (2, 5, 64 // last, 96 // last)

    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    sum(model(x, target).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    after = model.eval()(x)
    assert after.isfinite().all() and not torch.equal(before, after)
    model.save(tmp_path / "model.safetensors")
    loaded = apcnet.load(tmp_path / "model.safetensors")
    assert loaded.architecture == json.loads(json.dumps(model.architecture))
    assert torch.equal(loaded(x), after)


@pytest.mark.parametrize("encoder", [name for name, (strides, _) in ENCODERS.items() if strides[0] == 4])
def test_the_maps_are_timms_own(timm, encoder):
    backbone = TimmEncoder(encoder).eval()
    size = {} if "swin" not in encoder else {"dynamic_img_size": True}
    theirs = timm.create_model(encoder, features_only=True, **size).eval()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    nhwc = getattr(theirs, "output_fmt", "NCHW") == "NHWC"
    with torch.no_grad():
        maps, expected = backbone(images(64, 96)), theirs(images(64, 96))[-4:]
    for x, y, channels in zip(maps, expected, backbone.channels, strict=True):
        assert torch.equal(x, y.permute(0, 3, 1, 2) if nhwc else y) and x.shape[1] == channels
        assert not nhwc or x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_transformer_of_one_stride_gives_its_last_map_normalised(timm, encoder):
    backbone = TimmEncoder(encoder).eval()
    size = {"dynamic_img_size": True}
    theirs = timm.create_model(encoder, num_classes=0, **size).eval()
    theirs.load_state_dict({k.removeprefix("model."): v for k, v in backbone.body.state_dict().items()})
    with torch.no_grad():
        maps = backbone(images(64, 96))
        tokens = theirs.forward_features(images(64, 96))[:, theirs.num_prefix_tokens :]
    torch.testing.assert_close(maps[3], tokens.mT.unflatten(2, (4, 6)))
    assert all(x is maps[3] for x in maps)


def test_a_pyramid_is_made_of_one_map(timm):
    backbone = TimmEncoder("vit_tiny_patch16_224", True).eval()
    assert backbone.channels == [48, 96, 192, 192] and backbone.strides == [4, 8, 16, 32]
    with torch.no_grad():
        maps, last = backbone(images(64, 96)), backbone.body(images(64, 96))[0]
    assert [x.shape[2:] for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert torch.equal(maps[2], last)
    torch.testing.assert_close(maps[3], nn.functional.max_pool2d(last, 2))
    fourteen = TimmEncoder("vit_small_patch14_dinov2", True)
    assert fourteen.strides == [3.5, 7, 14, 28]
    assert build("semantic_fpn", "timm:vit_small_patch14_dinov2", 3)(images(28, 42)).logits.shape == (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("encoder", "pyramid", "multiple"),
    [
        ("resnet18d", False, 1),
        ("swin_tiny_patch4_window7_224", False, 32),
        ("hrnet_w18_small", False, 32),
        ("vit_tiny_patch16_224", True, 16),
        ("vit_small_patch14_dinov2", True, 14),
    ],
)
def test_images_of_any_size(timm, encoder, pyramid, multiple):
    """Tests that a map of stride s has ⌈size/s⌉ positions; encoders that need whole patches see zeros at the ends."""
    backbone = TimmEncoder(encoder, pyramid).eval()
    assert backbone.multiple == multiple and backbone.image_size is None
    x = images(65, 75)
    with torch.no_grad():
        maps = backbone(x)
        padded = backbone(nn.functional.pad(x, (0, -75 % multiple, 0, -65 % multiple)))
    for given, whole, stride in zip(maps, padded, backbone.strides, strict=True):
        height, width = (-int(-n // stride) for n in (65, 75))
        assert torch.equal(given, whole[:, :, :height, :width]) and given.shape[2:] == (height, width)


def test_encoders_of_one_image_size(timm):
    backbone = TimmEncoder("coat_lite_tiny")
    assert backbone.image_size == (224, 224)
    with pytest.raises(
        ValueError, match=r"images: expected 224×224 pixels, the one size for timm:coat_lite_tiny, got 64×96"
    ):
        backbone(images(64, 96))
    assert backbone(images(224, 224, batch=1))[3].shape == (1, 320, 7, 7)
    model = created("fcn", "coat_lite_tiny", image_size=(64, 96)).eval()
    assert model(images(64, 96)).shape == (2, 5, 2, 3)
    with pytest.raises(ValueError, match="image_size: expected none for timm:resnet18d"):
        created("fcn", "resnet18d", image_size=(64, 96))


def test_output_stride(timm):
    model = created("pspnet", "resnet18d", output_stride=8)
    assert model.backbone.strides == [4, 8, 8, 8]
    assert model.eval()(images(64, 96)).shape == (2, 5, 8, 12)
    assert created("semantic_fpn", "resnet18d", output_stride=8)(images(64, 96)).logits.shape == (2, 5, 16, 24)
    with pytest.raises(ValueError, match=r"output_stride: expected 32, as timm:swin_tiny.* does not take 8, got 8"):
        created("pspnet", "swin_tiny_patch4_window7_224", output_stride=8)


def test_normalisation_is_the_encoders(timm):
    assert created("fcn", "resnet18d").mean == apcnet.create("fcn", "tiny").mean == (123.675, 116.28, 103.53)
    assert created("fcn", "vit_tiny_patch16_224").std == (127.5,) * 3
    assert created("fcn", "resnet18d", in_channels=4).mean == (123.675, 116.28, 103.53, 123.675)
    assert apcnet.create("fcn", "tiny", in_channels=1).mean == pytest.approx((114.495,))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_than_three_take_the_rgb_weights_as_in_timm(timm, tmp_path, channels):
    weight = torch.randn(8, 3, 3, 3)
    torch.testing.assert_close(adapted(weight, channels), timm.models.adapt_input_conv(channels, weight))
    torch.manual_seed(0)
    trained, classifier = build("fcn", "resnet18", 3, width=8, stem_width=8), timm.create_model("resnet18d")
    torch.save(trained.backbone.state_dict(), tmp_path / "ours.pth")
    torch.save(classifier.state_dict(), tmp_path / "timm.pth")
    options = {"width": 8, "stem_width": 8, "in_channels": channels}
    ours = apcnet.create("fcn", "resnet18", 3, tmp_path / "ours.pth", **options)
    theirs = apcnet.create("fcn", "timm:resnet18d", 3, tmp_path / "timm.pth", in_channels=channels)
    for model, stem in ((ours, trained.backbone.stem[0]), (theirs, classifier.conv1[0])):
        loaded = next(p for p in model.backbone.parameters() if p.dim() == 4)
        torch.testing.assert_close(loaded, timm.models.adapt_input_conv(channels, stem.weight))
        assert model.eval()(images(64, 96, channels=channels)).isfinite().all()
        with pytest.raises(ValueError, match=rf"floating-point images \(B, {channels}, H, W\), got \(2, 3, 64, 96\)"):
            model(images(64, 96))


@pytest.mark.parametrize("encoder", ["convnext_atto", "vit_tiny_patch16_224"])
def test_weights_of_an_encoder(timm, tmp_path, monkeypatch, encoder):
    """Tests timm's own weights, and files of timm's classifier, of the encoder, and of a whole model."""
    classifier, model = timm.create_model(encoder), created("fcn", encoder)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    from_classifier = created("fcn", encoder, backbone_weights=tmp_path / "classifier.pth").backbone
    expected = [t for name, t in classifier.state_dict().items() if not name.startswith(("head.", "fc_norm"))]
    loaded = from_classifier.body.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))

    model.backbone.load_state_dict(from_classifier.state_dict())
    torch.save(model.backbone.body.state_dict(), tmp_path / "body.pth")
    model.save(tmp_path / "model.safetensors")
    download = timm.create_model

    def from_the_classifier(*arguments, pretrained=False, **options):
        assert pretrained or "pretrained_cfg_overlay" not in options
        overlay = {"pretrained_cfg_overlay": {"state_dict": classifier.state_dict()}} if pretrained else {}
        return download(*arguments, pretrained=pretrained, **overlay, **options)

    with monkeypatch.context() as patched:
        patched.setattr(timm, "create_model", from_the_classifier)
        sources = ["timm", f"timm:{encoder}"]
        downloaded = [created("fcn", encoder, backbone_weights=source).backbone for source in sources]
    files = [created("fcn", encoder, backbone_weights=tmp_path / f).backbone for f in ("body.pth", "model.safetensors")]
    for backbone in (*downloaded, *files):
        both = zip(backbone.state_dict().values(), from_classifier.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in both)
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=rf"backbone_weights: expected weights of timm:{encoder}, got others; missing: "
    ):
        created("fcn", encoder, backbone_weights=tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="expected a file or one of timm, timm:NAME, got nothing"):
        created("fcn", encoder, backbone_weights="nothing")


@pytest.mark.parametrize("encoder", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_layer_decay_and_exemptions_are_timms(timm, encoder):
    """Tests that each parameter of the encoder has the factor and the weight decay that timm gives it."""
    model, theirs = created("upernet", encoder), timm.create_model(encoder)
    settings = Optimisation(optimizer="adamw", layer_decay=0.7, weight_decay=0.05, head_lr=3.0)
    exempt = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else ()
    groups = importlib.import_module("timm.optim").param_groups_layer_decay(theirs, 0.05, exempt, layer_decay=0.7)
    expected = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    order = [expected[id(p)] for name, p in theirs.named_parameters() if not name.startswith(("head.", "norm."))]
    given = {
        id(p): (g["factor"], g["weight_decay"]) for g in optimizer(model, settings).param_groups for p in g["params"]
    }
    body = [given[id(p)] for name, p in model.backbone.body.named_parameters() if not name.startswith("model.norm.")]
    assert [factor for factor, _ in body] == pytest.approx([factor for factor, _ in order])
    assert [decay for _, decay in body] == [decay for _, decay in order]
    assert len({factor for factor, _ in body}) > 5
    assert {given[id(p)] for p in model.head.parameters()} == {(3.0, 0.05), (3.0, 0.0)}
    if model.backbone.pyramid is not None:
        assert {given[id(p)][0] for p in model.backbone.pyramid.parameters()} == {1.0}


def test_names_that_are_no_encoder(timm):
    with pytest.raises(ValueError, match=r"backbone: timm: .*did you mean 'resnet50'"):
        build("fcn", "timm:resnet5O")
    with pytest.raises(ValueError, match=r"option of fcn on timm:resnet18d: .*did you mean 'convs'"):
        build("fcn", "timm:resnet18d", convz=8)
    with pytest.raises(ValueError, match="model: expected parts that mmsegmentation's models here have"):
        mmseg.state_dict(created("fcn", "resnet18d"))


def test_without_timm_its_models_name_the_package(tmp_path, monkeypatch, capsys):
    """Tests `create` and, with a file of such a model, `load` and the commands."""
    model = apcnet.create("fcn", "tiny", 5)
    model.architecture = model.architecture | {"backbone": "timm:resnet18d"}
    model.save(tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "timm", None)
    expected = r"backbone: timm:NAME needs the package timm.*pip install 'apc_kernels\[timm\]'"
    with pytest.raises(ModuleNotFoundError, match=expected):
        apcnet.create("apcnet", "timm:resnet18d")
    with pytest.raises(ModuleNotFoundError, match=expected):
        apcnet.load(tmp_path / "model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path / "model.safetensors"), str(tmp_path / "model.onnx")])
    assert stopped.value.code == cli.BAD_INPUT and "needs the package timm" in capsys.readouterr().err


def test_an_older_timm_is_named(timm, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.24")
    with pytest.raises(ModuleNotFoundError, match=r"timm:NAME needs timm 1\.0\.31 or newer, found 1\.0\.24; upgrade"):
        apcnet.create("apcnet", "timm:resnet18d")


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_resnet(torchvision, tmp_path, monkeypatch, depth):
    """Tests that maps are torchvision's, dilated or not, with weights of a file or of torchvision."""
    torch.manual_seed(0)
    dilated = depth >= 50  # torchvision dilates bottlenecks only
    theirs = getattr(torchvision.models, f"resnet{depth}")(
        replace_stride_with_dilation=(False, dilated, dilated)
    ).eval()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    weights = type("Weights", (), {"get_state_dict": staticmethod(lambda check_hash: theirs.state_dict())})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: type("", (), {"DEFAULT": weights}))
    options = {"output_stride": 8 if dilated else 32}
    models = [
        apcnet.create("fcn", f"resnet{depth}", 3, tmp_path / "resnet.pth", stem="7x7", **options),
        apcnet.create("fcn", f"tv:resnet{depth}", 3, f"tv:resnet{depth}", **options),
    ]
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images(64, 96)))))
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(theirs, layer)(x)
        for model in models:
            given = model.eval().backbone(images(64, 96))[int(layer[-1]) - 1]
            torch.testing.assert_close(given, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"stem deep, got .* with the stem 7x7; add stem='7x7' \(--stem 7x7\)"):
        apcnet.create("fcn", f"resnet{depth}", 3, tmp_path / "resnet.pth")


def test_a_run_trains_evaluates_and_predicts(timm, tmp_path, capsys):
    """Tests the commands with an encoder of timm."""
    common = ["--size", "64", "64", "--crop", "64", "64", "--scale", "64", "64", "--device", "cpu"]
    command = ["train", "--backbone", "timm:resnet18d", "--width", "None", "--steps", "2", "--batch-size", "2"]
    with pytest.raises(SystemExit):
        cli.main([*command, "--out", str(tmp_path / "run"), *common])
    assert "backbone_weights: expected pretrained weights for timm:resnet18d" in capsys.readouterr().err
    cli.main([*command, "--from-scratch", "--workers", "0", "--out", str(tmp_path / "run"), *common])
    assert apcnet.load(tmp_path / "run" / "final.safetensors").architecture["backbone"] == "timm:resnet18d"


@pytest.mark.parametrize("encoder", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_the_windows_of_exported_models_are_timms(timm, encoder):
    body = TimmEncoder(encoder).eval().body
    for size in ((64, 96), (224, 256), (288, 320)):
        with torch.no_grad():
            expected = body(images(*size, batch=1))
            with windows.exportable():
                given = body(images(*size, batch=1))
        for a, b in zip(given, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_an_encoder_that_is_exported_for_one_size(timm, tmp_path):
    model = created("fcn", "coat_lite_tiny", image_size=(64, 96)).eval()
    with pytest.raises(ValueError, match=r"dynamic: expected False for timm:coat_lite_tiny, which.*--no-dynamic"):
        export(model, tmp_path / "model.pt2", size=(64, 96))
    differences = export(model, tmp_path / "model.pt2", size=(64, 96), dynamic=False)
    assert list(differences) == [(64, 96)] and max(differences.values()) <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
@pytest.mark.parametrize(("encoder", "head"), EXPORTED)
def test_an_onnx_file_takes_another_size(timm, tmp_path, encoder, head):
    size = (128, 160) if "swin" not in encoder else (320, 256)
    differences = export(created(head, encoder).eval(), tmp_path / "model.onnx", size=size)
    other = (size[0] * 3 // 4 + 1, size[1] * 5 // 4 + 1)
    assert list(differences) == [size, other] and max(differences.values()) <= 1e-4
