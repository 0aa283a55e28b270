"""Tests the models against mmsegmentation 1.2.2: outputs, losses and gradients, by the reference and the fused path.

Tolerances are about ten times the distance between mmsegmentation's own float32 and float64 results.
"""

import parity
import pytest
import torch

import apc_kernels
from apcnet import inference
from apcnet.interop import mmseg
from apcnet.interop.mmseg.names import in_place

HEADS = ["apc", "apc_nofusion", "apc_odd", "apc_scales", "enc", "enc_lateral", "fcn", "fpn", "psp", "psp_aligned_odd"]
HEADS += ["uper", "uper_odd"]
MODELS = ["apcnet", "encnet", "fcn", "pspnet", "semantic_fpn", "upernet"]
BACKENDS = ["reference", "cpp"]
OUTPUT = {"eval": 1e-5, "train": 2e-4}
INPUT_GRADIENT = {"eval": 1e-4, "train": 1e-3}
PARAMETER_GRADIENT = {"eval": 1e-4, "train": 1e-2}


def gradients(module):
    """Returns the gradients of a head's or model's parameters, by mmsegmentation's names."""
    held = {name: parameter.grad for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(held[name])
    return mmseg.state_dict(module)


def check(given, expected, tolerance):
    apart = {name: parity.distance(given[name], tensor) for name, tensor in expected.items()}
    assert expected
    assert max(apart.values()) <= tolerance, max(apart.items(), key=lambda item: item[1])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HEADS)
def test_head(name, backend, mode):
    case = parity.load(f"head_{name}")
    head = mmseg.load_head(case.about["head"], case.under("state/")).train(mode == "train")
    inputs = [x.requires_grad_() for x in case.listed("input.")]
    with apc_kernels.backend(backend):
        outputs = head(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((y * c).sum() for y, c in zip(outputs, case.listed("cotangent."), strict=True))
        total.backward()
    for output, expected in zip(outputs, case.listed(f"{mode}.output."), strict=True):
        assert parity.distance(output, expected) <= OUTPUT[mode]
    for x, expected in zip(inputs, case.listed(f"{mode}.grad.input."), strict=True):
        if x.grad is None:  # a map that the head leaves alone
            assert not expected.any()
        else:
            assert parity.distance(x.grad, expected) <= INPUT_GRADIENT[mode]
    check(gradients(head), case.under(f"{mode}.grad.param/"), PARAMETER_GRADIENT[mode])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_model_in_evaluation(name, backend):
    case = parity.load(f"model_{name}")
    model = mmseg.load_model(case.about["model"], case.under("state/")).eval()
    images, slide = case.tensors["input"], case.about["slide"]
    with apc_kernels.backend(backend), torch.inference_mode():
        means = [features.mean((2, 3)) for features in model.backbone(images)]
        logits = inference.whole_logits(model, images)
        sliding = inference.slide_logits(model, images, slide["crop_size"], slide["stride"])
    for mean, expected in zip(means, case.listed("eval.feature_mean."), strict=True):
        assert parity.distance(mean, expected) <= OUTPUT["eval"]
    assert parity.distance(logits, case.tensors["eval.logits"]) <= OUTPUT["eval"]
    assert parity.distance(sliding, case.tensors["slide.logits"]) <= OUTPUT["eval"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_model_in_training(name, backend):
    case = parity.load(f"model_{name}")
    model = mmseg.load_model(case.about["model"], case.under("state/"))
    with apc_kernels.backend(backend):
        losses = model(case.tensors["input"], case.tensors["target"])
        sum(losses.values()).backward()
    expected = case.under("train.loss/")
    assert set(losses) == {name for name in expected if "acc" not in name}
    for name, loss in losses.items():
        assert parity.distance(loss, expected[name]) <= 1e-5, name
    assert parity.distance(sum(losses.values()), case.tensors["train.loss_total"]) <= 1e-5
    check(gradients(model), case.under("train.grad.param/"), PARAMETER_GRADIENT["train"])


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_back_as_they_came(name):
    case = parity.load(f"model_{name}")
    state = case.under("state/")
    model = mmseg.load_model(case.about["model"], state)
    given_back = mmseg.state_dict(model)
    assert given_back.keys() == state.keys()
    assert all(torch.equal(given_back[name], tensor) for name, tensor in state.items())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(given_back.values(), in_place(model).values(), strict=True))
