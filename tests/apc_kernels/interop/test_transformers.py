"""Tests accelerate() on models and image processors of transformers, each beside a plain copy."""

import copy
import inspect
import json
import pickle

import pytest
import real_packages
import tiny_transformers as tiny
import torch
from kept import kept_bytes
from torch import nn

import apc_kernels
from apc_kernels.interop.upsampled import UpsampledLogits

pytestmark = pytest.mark.usefixtures("one_thread")

models = pytest.mark.parametrize("name", tiny.NAMES)
FULL_SIZE = ("DPT", "UperNet")  # their logits have the size of the images
PYRAMIDS = ("Beit", "Data2VecVision", "UperNet")


@pytest.fixture(scope="module")
def transformers():
    return real_packages.imported("transformers")


def images(batch=2, size=(64, 64), dtype=torch.float32):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def labels(batch=2, size=(64, 64), classes=7):
    target = torch.randint(0, classes, (batch, *size), generator=torch.Generator().manual_seed(1))
    target[:, :9, 5:] = 255
    return target


def pair(name, **changes):
    """Builds a model, its accelerated copy, and the report."""
    plain = tiny.build(name, **changes)
    ours = copy.deepcopy(plain)
    return plain, ours, apc_kernels.accelerate(ours)


def results(model, x, target, **options):
    """Returns loss, logits, all gradients, and buffers after a step."""
    model.zero_grad()
    torch.manual_seed(0)  # of the dropout that no config turns off
    output = model(pixel_values=x, labels=target, **options)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}


def assert_same(given, expected, tolerance):
    assert list(given) == list(expected)
    for name, value in expected.items():
        assert given[name].dtype == value.dtype and given[name].shape == value.shape, name
        allowed = tolerance * max(value.abs().max().item(), 1e-3)
        assert (given[name] - value).abs().max() <= allowed, f"{name}: {(given[name] - value).abs().max():.3g}"


@models
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_loss_logits_and_gradients(transformers, name, training):
    """Tests in float64, where batch norms over few values do not spread rounding."""
    plain, ours, report = pair(name)
    assert report.swapped["forward"] == f"{name}ForSemanticSegmentation of apc_kernels" and not report.left
    assert (name in PYRAMIDS) == ("decode_head.psp_forward" in report.swapped)
    x, target = images(dtype=torch.float64), labels()
    given, expected = (results(model.double().train(training), x, target) for model in (ours, plain))
    assert_same(given, expected, 1e-9)


@models
def test_in_float32_the_loss_and_most_gradients_are_equal_to_1e_5(transformers, name):
    """Tests in evaluation mode: in training, batch norms over 2×2 values turn rounding into percents."""
    plain, ours, _ = pair(name)
    given, expected = (results(model.eval(), images(), labels()) for model in (ours, plain))
    assert_same(given, expected, 1e-5)


@models
def test_the_upsampled_logits_are_not_kept(transformers, name):
    """Tests the tensors that forward keeps for backward beside those that it keeps without labels."""
    plain, ours, _ = pair(name, classes=150)
    x, target = images(), labels(classes=150)

    def kept(model):
        given = *model.parameters(), *model.buffers()
        with_loss = kept_bytes(lambda: model(pixel_values=x, labels=target).loss, given)
        return with_loss, kept_bytes(lambda: model(pixel_values=x).logits.sum(), given)

    (theirs, without), (own, own_without) = kept(plain), kept(ours)
    share = 0.3 if name == "DPT" else 0.1  # DPT's logits have half the images' size
    assert own - own_without < share * (theirs - without)


@models
def test_without_labels_nothing_changes(transformers, name):
    plain, ours, _ = pair(name)
    with torch.no_grad():
        given, expected = (model.eval()(pixel_values=images()).logits for model in (ours, plain))
    assert type(given) is torch.Tensor
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@models
def test_tuples_and_other_sizes_of_labels(transformers, name):
    plain, ours, _ = pair(name)
    size = (64, 64) if name == "UperNet" else (48, 80)  # UperNet takes no other labels
    given, expected = (m.double()(images(dtype=torch.float64), None, return_dict=False) for m in (ours, plain))
    assert type(given) is tuple and len(given) == len(expected)
    given, expected = (
        m.eval()(pixel_values=images(dtype=torch.float64), labels=labels(size=size), return_dict=False)
        for m in (ours, plain)
    )
    assert type(given) is tuple and len(given) == len(expected)
    torch.testing.assert_close(given[0], expected[0])


@models
def test_names_parameters_and_the_signature_stay(transformers, name):
    model = tiny.build(name)
    cls, attributes, state = type(model), set(vars(model)), model.state_dict()
    parameters = dict(model.named_parameters())
    apc_kernels.accelerate(model)
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__ and type(model).__module__ == cls.__module__
    assert inspect.signature(model.forward) == inspect.signature(cls(model.config).forward)
    assert set(vars(model)) == attributes and list(model.state_dict()) == list(state)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())


@models
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_has_weights_of_its_own(transformers, name, copied):
    plain, ours, _ = pair(name)
    if copied is not copy.deepcopy:
        try:
            pickle.dumps(plain)
        except AttributeError as error:
            pytest.skip(f"needs a transformers that can pickle its own {name}: {error}")
    twin, other = copied(ours), tiny.build(name, seed=7)
    assert type(twin) is type(ours)
    twin.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    x, target = images(dtype=torch.float64), labels()
    assert_same(results(twin.double(), x, target), results(other.double(), x, target), 1e-9)


@models
def test_save_pretrained_and_from_pretrained(transformers, tmp_path, name):
    plain, ours, _ = pair(name)
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "ours")]
    assert configs[0] == configs[1]
    loaded = type(plain).from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))
    again = type(ours).from_pretrained(tmp_path / "plain")  # by the accelerated class
    assert isinstance(again, type(plain))


@models
def test_accelerating_twice_changes_nothing(transformers, name):
    _, ours, report = pair(name)
    types = [type(module) for module in ours.modules()]
    assert apc_kernels.accelerate(ours) == report
    assert [type(module) for module in ours.modules()] == types


@pytest.mark.parametrize("ignored", [255, 3, -100])
def test_the_ignore_index_is_the_configs(transformers, ignored):
    plain, ours, _ = pair("Segformer", semantic_loss_ignore_index=ignored)
    target = labels().masked_fill(labels() == 255, ignored)
    assert_same(*(results(m.double(), images(dtype=torch.float64), target) for m in (ours, plain)), 1e-9)


def test_one_label_is_a_binary_cross_entropy(transformers):
    plain, ours, report = pair("Segformer", classes=1)
    assert "forward" in report.swapped
    target = labels(classes=2)
    assert_same(*(results(m.double(), images(dtype=torch.float64), target) for m in (ours, plain)), 1e-9)


def test_nothing_but_ignored_pixels(transformers):
    plain, ours, _ = pair("Segformer")
    losses = [m(pixel_values=images(), labels=torch.full((2, 64, 64), 255)).loss for m in (ours, plain)]
    assert all(loss.isnan() for loss in losses)


def test_a_wrong_label_is_an_error_that_says_so(transformers):
    _, ours, _ = pair("Segformer")
    with pytest.raises(ValueError, match="target: expected labels of 0 to 6"):
        ours(pixel_values=images(), labels=torch.full((2, 64, 64), 7))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_logits_at_full_size_are_upsampled_when_something_reads_them(transformers, name):
    plain, ours, _ = pair(name)
    x, target = images(), labels()
    given, expected = (model.eval()(pixel_values=x, labels=target).logits for model in (ours, plain))
    assert isinstance(given, UpsampledLogits) and given.shape == expected.shape == (2, 7, 64, 64)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    assert (given.argmax(1) != expected.argmax(1)).sum() <= 1
    given.square().mean().backward()
    expected.square().mean().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Segformer", "UperNet"])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_in_low_precision(transformers, name, autocast):
    plain, ours, _ = pair(name)
    if not autocast:
        plain, ours = plain.bfloat16(), ours.bfloat16()
    x = images(dtype=next(ours.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given, expected = (model.eval()(pixel_values=x, labels=labels()) for model in (ours, plain))
    assert given.loss.dtype == expected.loss.dtype and given.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(given.loss, expected.loss, rtol=0.02, atol=0.02)


def test_a_compiled_model_computes_as_before(transformers):
    plain, ours, _ = pair("Segformer")
    compiled = torch.compile(ours.eval(), backend="aot_eager")
    given, expected = compiled(pixel_values=images(), labels=labels()), plain.eval()(images(), labels())
    torch.testing.assert_close(given.loss, expected.loss)


def test_an_exported_model_computes_as_before(transformers):
    plain, ours, _ = pair("Segformer")
    exported = torch.export.export(ours.eval(), (), {"pixel_values": images()}).module()
    torch.testing.assert_close(exported(pixel_values=images()).logits, plain.eval()(images()).logits)


def test_gradient_checkpointing(transformers):
    plain, ours, _ = pair("Segformer")
    for model in (plain, ours):
        model.double().gradient_checkpointing_enable()
    assert_same(*(results(m, images(dtype=torch.float64), labels()) for m in (ours, plain)), 1e-9)


# What is left alone.


def test_a_hook_takes_effect(transformers):
    plain, ours, _ = pair("Beit")
    for model in (plain, ours):
        model.decode_head.classifier.register_forward_hook(lambda module, args, result: result * 2)
        model.decode_head.psp_modules.register_forward_hook(lambda module, args, result: [x + 1 for x in result])
    report = apc_kernels.accelerate(copy.deepcopy(ours))
    assert "has hooks" in report.left["decode_head.psp_forward"] and "forward" in report.swapped
    assert_same(*(results(m.double(), images(dtype=torch.float64), labels()) for m in (ours, plain)), 1e-9)


def test_subclasses_and_methods_on_the_instance_are_left_alone(transformers):
    class OwnModel(transformers.SegformerForSemanticSegmentation):
        pass

    own = OwnModel(tiny.build("Segformer").config)
    report = apc_kernels.accelerate(own)
    assert type(own) is OwnModel and not report.swapped
    assert report.left == {"forward": "OwnModel is not a class of transformers, and may compute something else"}
    model = tiny.build("Segformer")
    model.forward = lambda pixel_values, labels=None: pixel_values
    assert apc_kernels.accelerate(model).left == {"forward": "forward is overridden on the instance"}


def test_a_model_inside_of_another_module(transformers):
    wrapper = nn.ModuleDict({"inner": tiny.build("Segformer"), "other": nn.Linear(2, 2)})
    assert list(apc_kernels.accelerate(wrapper).swapped) == ["inner.forward"]


def test_other_models_of_transformers_are_reported(transformers):
    config = tiny.build("Segformer").config
    for cls, reason in (
        (transformers.SegformerModel, "SegformerModel takes no labels"),
        (transformers.SegformerForImageClassification, "returns no logits of semantic segmentation"),
    ):
        model = cls(config)
        report = apc_kernels.accelerate(model)
        assert type(model) is cls and not report.swapped and reason in report.left["forward"]


# Image processors.

PROCESSORS = ["Segformer", "DPT", "Beit", "MobileViT", "MobileNetV2"]


@pytest.mark.parametrize("name", PROCESSORS)
def test_labels_of_an_image_processor(transformers, name):
    plain = getattr(transformers, f"{name}ImageProcessor")()
    ours = copy.deepcopy(plain)
    report = apc_kernels.accelerate(ours)
    assert list(report.swapped) == ["post_process_semantic_segmentation"] and not report.left
    logits = torch.randn(2, 150, 16, 24, generator=torch.Generator().manual_seed(0))
    outputs = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
    for sizes in (None, [(64, 96), (33, 50)], [(16, 24)] * 2):
        given, expected = (p.post_process_semantic_segmentation(outputs, sizes) for p in (ours, plain))
        for image, a, b in zip(logits, given, expected, strict=True):
            assert type(a) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape
            upsampled = nn.functional.interpolate(image[None], b.shape, mode="bilinear")[0]
            gap = upsampled.gather(0, b[None]) - upsampled.gather(0, a[None])
            assert gap.max() <= 5e-7  # equal but for ties up to rounding
            assert (a != b).sum() <= 1
    with pytest.raises(ValueError, match="as many target sizes"):
        ours.post_process_semantic_segmentation(outputs, [(1, 2)])


def test_an_image_processor_is_saved_and_copied_as_before(transformers, tmp_path):
    plain = transformers.SegformerImageProcessor()
    ours = copy.deepcopy(plain)
    apc_kernels.accelerate(ours)
    assert ours.to_dict() == plain.to_dict() and type(copy.deepcopy(ours)) is type(ours)
    assert type(pickle.loads(pickle.dumps(ours))) is type(ours)
    ours.save_pretrained(tmp_path)
    assert type(transformers.SegformerImageProcessor.from_pretrained(tmp_path)) is type(plain)


def test_scores_of_an_image_processor(transformers):
    plain = transformers.SegformerImageProcessor()
    ours = copy.deepcopy(plain)
    apc_kernels.accelerate(ours)
    if "return_segmentation_scores" not in inspect.signature(plain.post_process_semantic_segmentation).parameters:
        pytest.skip("needs a transformers whose image processors return segmentation scores")
    outputs = transformers.modeling_outputs.SemanticSegmenterOutput(logits=torch.randn(1, 5, 8, 8))
    options = {"target_sizes": [(20, 30)], "return_segmentation_scores": True}
    (given,), (expected,) = (p.post_process_semantic_segmentation(outputs, **options) for p in (ours, plain))
    assert torch.equal(given.segmentation_scores, expected.segmentation_scores)
