"""Tests the models: options, create, save, load, and errors for wrong input."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import apcnet
from apcnet.models import Output, build
from apcnet.models.apc import APCHead
from apcnet.models.segmentor import presence

MODELS = ["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet"]
SMALL = {"backbone": "resnet18", "num_classes": 5, "width": 8, "stem_width": 8, "channels": 8}


def small(name, **options):
    torch.manual_seed(0)
    options = {**SMALL, "auxiliary_channels": 0 if name == "semantic_fpn" else 8, **options}
    return apcnet.create(name, **options)


def images(size=(2, 3, 65, 72)):
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_evaluation_and_training(name):
    model, x = small(name), images()
    model.eval()
    logits = model(x)
    stride = 4 if name in ("semantic_fpn", "upernet") else 8
    assert logits.shape == (2, 5, -(-65 // stride), -(-72 // stride))
    output = model.train()(x)
    assert isinstance(output, Output)
    assert (output.aux is None) == (name == "semantic_fpn")
    assert (output.se is None) == (name != "encnet")
    target = torch.randint(0, 5, (2, 65, 72))
    losses = model(x, target)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    counts = {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {2}  # the two calls in training


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_mmsegmentations_means_and_weights(name):
    model, x = small(name, dropout=0.0), images()
    target = torch.randint(0, 5, (2, 65, 72))
    target[:, :20] = 255
    output = model(x)
    losses = model.losses(x, target)

    def mean_over_all_pixels(logits):
        enlarged = F.interpolate(logits, target.shape[1:], mode="bilinear")
        return F.cross_entropy(enlarged, target, ignore_index=255, reduction="none").mean()

    expected = {"decode.loss_ce": mean_over_all_pixels(output.logits)}
    if output.se is not None:
        there = torch.stack([t.float().histc(5, 0, 4) > 0 for t in target]).float()
        expected["decode.loss_se"] = 0.2 * F.binary_cross_entropy_with_logits(output.se, there)
    if output.aux is not None:
        expected["aux.loss_ce"] = 0.4 * mean_over_all_pixels(output.aux)
    assert list(losses) == list(expected)
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=0)
    valid = model(x, target, reduction="mean")["decode.loss_ce"]
    torch.testing.assert_close(valid * (45 / 65), losses["decode.loss_ce"], rtol=1e-5, atol=0)


def test_presence_counts_classes_and_nothing_else():
    target = torch.tensor([[[0, 2, 2]], [[255, 4, 9]], [[255, 255, 255]]], dtype=torch.uint8)
    expected = [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert presence(target, 5).int().tolist() == expected
    assert presence(target.int() - 1, 5).int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert presence(target, 5, ignore_index=2).int().tolist()[0] == [1, 0, 0, 0, 0]


def context_in_the_papers_words(head, x, pooled_from):
    """Computes the module of each scale separately, with affinities in memory: (B, S·C, h, w)."""
    scales, channels = head.scales, x.shape[1] // len(head.scales)
    maps, first = [], 0
    for i, (s, own) in enumerate(zip(scales, x.split(channels, 1), strict=True)):
        regions = head.regions.reductions[i](F.adaptive_avg_pool2d(pooled_from, s)).flatten(2).mT
        weight = head.affinity.weight[first : first + s * s, :, 0, 0]
        bias, first = head.affinity.bias[first : first + s * s], first + s * s
        seen = own
        if head.guide is not None:
            guide = head.guide.weight.flatten(1).split(channels)[i]
            g = own.mean((2, 3)) @ guide.mT + head.guide.bias.split(channels)[i]
            seen = own + g[:, :, None, None]
        affinities = torch.sigmoid(seen.flatten(2).mT @ weight.mT + bias)
        maps.append((affinities @ regions).mT.unflatten(2, x.shape[2:]) + own)
    return torch.cat(maps, dim=1)


@pytest.mark.parametrize("guide", [True, False])
def test_the_papers_plain_module(guide):
    torch.manual_seed(0)
    head = APCHead(12, 5, channels=6, scales=(1, 2, 3), plain=True, guide=guide, index=0).double()
    features = torch.randn(2, 12, 9, 11, dtype=torch.float64)
    x = head.reduction(features)
    context = head.context(x, head.regions(features).mT)
    torch.testing.assert_close(context, context_in_the_papers_words(head, x, features))


def test_without_guide_the_affinities_see_only_their_own_position():
    torch.manual_seed(0)
    head = APCHead(12, 5, channels=6, scales=(2,), guide=False, fusion=False, index=0).double().eval()
    x, regions = torch.randn(1, 6, 4, 4, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 1
    apart = (head.context(x.relu(), regions) - head.context(changed.relu(), regions)).abs().amax((0, 1))
    assert apart[0, 0] > 0
    assert apart.sum() == apart[0, 0]


@pytest.mark.parametrize("options", [{"scales": (1, 4)}, {"guide": False}, {"fusion": False}, {"plain": True}])
def test_options_of_the_apc_head_train(options):
    model = small("apcnet", **options)
    sum(model(images(), torch.zeros(2, 65, 72, dtype=torch.long)).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_output_stride(backbone, stride):
    model = small("fcn", backbone=backbone, output_stride=stride).eval()
    assert model(images((1, 3, 96, 64))).shape[2:] == (96 // stride, 64 // stride)
    assert model.backbone.strides == {8: [4, 8, 8, 8], 16: [4, 8, 16, 16], 32: [4, 8, 16, 32]}[stride]


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_loaded_with_all_it_knew(name, tmp_path):
    model = small(name).eval()
    model.classes, model.palette = tuple("abcde"), ((0, 0, 0),) * 4 + ((1, 2, 3),)
    model.mean = (1.0, 2.0, 3.0)
    model.save(tmp_path / "model.safetensors")
    loaded = apcnet.load(tmp_path / "model.safetensors")
    assert not loaded.training
    assert (loaded.classes, loaded.palette, loaded.mean, loaded.std) == (
        model.classes, model.palette, model.mean, model.std,
    )  # fmt: skip
    assert torch.equal(loaded(images()), model(images()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # safetensors alone writes for its owner


@pytest.mark.parametrize("name", MODELS)
def test_another_number_of_classes_keeps_everything_but_the_classifiers(name, tmp_path):
    model = small(name)
    model.classes = tuple("abcde")
    model.save(tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning,
        match=r"trained for 5 classes, not 3: these layers start with new weights: head\.(classifier|presence)",
    ):
        loaded = apcnet.load(tmp_path / "model.safetensors", num_classes=3)
    assert (loaded.num_classes, loaded.classes) == (3, None)
    fresh = 0
    for key, tensor in loaded.state_dict().items():
        kept = tensor.shape == model.state_dict()[key].shape and torch.equal(tensor, model.state_dict()[key])
        fresh += not kept
        assert kept or "classifier" in key or "presence" in key, key
    assert fresh
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apcnet.load(tmp_path / "model.safetensors", num_classes=5).classes == model.classes


def test_backbone_weights_from_a_file(tmp_path):
    trained = small("fcn")
    backbone = trained.backbone.state_dict()
    timm_names = {k.replace("stem.7.", "bn1.").replace("stem.", "conv1."): v for k, v in backbone.items()}
    files = {
        "ours": trained.state_dict(),
        "mmseg_backbone": {**backbone, "fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)},
        "mmseg_model": {"meta": {}, "state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}},
        "timm": {**timm_names, "fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)},
    }
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        model = apcnet.create("pspnet", **SMALL, backbone_weights=tmp_path / f"{name}.pth")
        assert all(
            torch.equal(a, b) for a, b in zip(model.backbone.state_dict().values(), backbone.values(), strict=True)
        )
    with pytest.raises(
        ValueError, match=r"backbone_weights: .*expected the tensors of the model, got others; missing: layer1\.2"
    ):
        apcnet.create("fcn", **{**SMALL, "backbone": "resnet34"}, backbone_weights=tmp_path / "timm.pth")
    with pytest.raises(FileNotFoundError, match="backbone_weights"):
        apcnet.create("fcn", **SMALL, backbone_weights=tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "pspnett"}, "model: .*apcnet, pspnet.*did you mean 'pspnet'"),
        ({"backbone": "resnet51"}, "backbone: .*resnet18.*did you mean 'resnet"),
        ({"num_classes": 0}, "num_classes: expected 1 or more, got 0"),
        ({"fusoin": True}, "option of apcnet on resnet18: .*did you mean 'fusion'"),
        ({"output_stride": 4}, "output_stride: expected 8, 16 or 32, got 4"),
        ({"neck_norm": True}, "neck_norm: expected only with model semantic_fpn"),
        ({"scales": (0, 1)}, "scales: expected"),
    ],
)
def test_wrong_choices_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"model": "apcnet", **SMALL, **arguments})


@pytest.mark.parametrize("name", MODELS)
def test_wrong_images_are_named(name):
    model = small(name)
    for wrong in (torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images: expected normalised floating-point images"):
            model(wrong)


@pytest.mark.parametrize("name", ["apcnet", "pspnet"])
def test_one_image_in_training_is_refused_before_a_step(name):
    model = small(name)
    with pytest.raises(
        ValueError, match=r"expected two or more in training, got one.*one value per channel.*larger batch"
    ):
        model(images((1, 3, 64, 64)))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    assert model(images((1, 3, 64, 64))).logits.isfinite().all()


def test_files_that_are_no_model_are_named(tmp_path):
    model, path = small("fcn"), tmp_path / "model.safetensors"
    model.save(path)
    whole, metadata = path.read_bytes(), {"apcnet": json.dumps({"architecture": model.architecture, "classes": None,
        "palette": None, "mean": [0] * 3, "std": [1] * 3})}  # fmt: skip
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        apcnet.load(path)
    torch.save({}, path)
    with pytest.raises(ValueError, match="apcnet convert"):
        apcnet.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        apcnet.load(tmp_path / "nothing")
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="got safetensors without an architecture"):
        apcnet.load(path)
    wrong = {**tensors, "head.classifier.conv.bias": torch.zeros(7), "extra": torch.zeros(1)}
    del wrong["backbone.stem.0.weight"]
    save_file(wrong, path, metadata)
    with pytest.raises(ValueError, match=r"missing: backbone\.stem\.0\.weight; not in the model: extra; different "
        r"shape: head\.classifier\.conv\.bias: expected \(5,\), got \(7,\)"):  # fmt: skip
        apcnet.load(path)


@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name):
    """Tests autocast in training and bfloat16 in evaluation; training a bfloat16 model is refused."""
    model, x, target = small(name), images(), torch.zeros(2, 65, 72, dtype=torch.long)
    exact = model(x, target)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(x, target)
    sum(losses.values()).backward()
    for key, loss in losses.items():
        torch.testing.assert_close(loss.float(), exact[key].float(), rtol=0.05, atol=0.05)
    model.eval()
    logits = model(x)
    rounded = model.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - logits).abs().max() <= 0.05 * logits.abs().max()


LONG_TO_COMPILE = ("pspnet", "semantic_fpn", "upernet")  # APCNet pools a pyramid and convolves it too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG_TO_COMPILE)) for name in MODELS]
)
def test_compiled_whole_with_any_size(name):
    """Compiles one graph for all sizes, without the backbone's convolutions, which are slow to trace."""
    model = small(name).eval()
    rest = model.head if model.neck is None else torch.nn.Sequential(model.neck, model.head)
    torch._dynamo.reset()
    compiled = torch.compile(rest, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for size, stance in [
            ((2, 3, 64, 72), "default"),
            ((2, 3, 65, 97), "default"),
            ((3, 3, 80, 48), "fail_on_recompile"),
        ]:
            features = model.backbone(images(size))
            with torch.compiler.set_stance(stance):
                torch.testing.assert_close(compiled(features), rest(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_and_repetition(name):
    """Tests for the same bits at every call, and close numbers in the other layout."""
    model, x, target = small(name, dropout=0.0), images(), torch.zeros(2, 65, 72, dtype=torch.long)

    def step(x):
        model.zero_grad()
        sum(model(x, target).values()).backward()
        return [p.grad.clone() for p in model.parameters()]

    first, again, other = step(x), step(x), step(x.to(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, other, strict=True):
        assert (a - b).abs().max() <= 2e-2 * a.abs().max() + 1e-5
