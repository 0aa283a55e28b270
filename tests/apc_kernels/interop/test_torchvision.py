"""Tests accelerate() on torchvision's segmentation models, each beside a plain copy."""

import copy
import pickle

import pytest
import real_packages
import torch
import torch.nn.functional as F
from torch import nn

import apc_kernels
from apc_kernels.interop.upsampled import UpsampledLogits

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
models = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def segmentation():
    return real_packages.imported("torchvision").models.segmentation


def pair(segmentation, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
        plain = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, **auxiliary).double()
    ours = copy.deepcopy(plain)
    return plain, ours, apc_kernels.accelerate(ours)


def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def step(model):
    """Returns the outputs, the loss that torchvision's reference training takes, and all gradients."""
    target = torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(1))
    target[:, :9] = 255
    torch.manual_seed(0)
    outputs = model(images())
    losses = {name: F.cross_entropy(x, target, ignore_index=255) for name, x in outputs.items()}
    loss = losses["out"] + 0.5 * losses.get("aux", 0)
    loss.backward()
    return outputs, loss, [p.grad for p in model.parameters()]


@models
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_outputs_losses_and_gradients(segmentation, name, training):
    plain, ours, report = pair(segmentation, name)
    assert report.swapped and not report.left
    (outputs, loss, grads), (theirs, their_loss, their_grads) = (step(m.train(training)) for m in (ours, plain))
    assert list(outputs) == list(theirs) and all(isinstance(x, UpsampledLogits) for x in outputs.values())
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(grads, their_grads, rtol=1e-6, atol=1e-9)
    for key, value in theirs.items():
        torch.testing.assert_close(outputs[key], value, rtol=0, atol=0)
        assert torch.equal(outputs[key].argmax(1), value.argmax(1))


@models
def test_copies_and_names(segmentation, name):
    plain, ours, report = pair(segmentation, name)
    assert list(ours.state_dict()) == list(plain.state_dict()) and type(ours).__name__ == type(plain).__name__
    assert apc_kernels.accelerate(ours) == report
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        torch.testing.assert_close(twin.eval()(images())["out"], plain.eval()(images())["out"])


def test_exported_compiled_and_scripted_models_compute_as_before(segmentation):
    plain, ours, _ = pair(segmentation, NAMES[2])
    expected = plain.eval()(images())["out"]
    exported = torch.export.export(ours.eval(), (images(),)).module()
    compiled = torch.compile(ours, backend="aot_eager")
    traced = torch.jit.trace(ours, (images(),), strict=False)
    for model in (exported, compiled, traced, torch.jit.script(ours)):
        given = model(images())["out"]
        assert type(given) is torch.Tensor
        torch.testing.assert_close(given, expected)


def test_subclasses_and_methods_on_the_instance_are_left_alone(segmentation):
    plain, _, _ = pair(segmentation, NAMES[1])

    class OwnFCN(segmentation.FCN):
        pass

    own = OwnFCN(plain.backbone, plain.classifier)
    assert apc_kernels.accelerate(own).left == {
        "forward": "OwnFCN is not a class of torchvision, and may compute something else"
    }
    plain.forward = lambda x: {"out": x}
    assert apc_kernels.accelerate(plain).left == {"forward": "forward is overridden on the instance"}


def test_a_hook_takes_effect(segmentation):
    plain, ours, _ = pair(segmentation, NAMES[2])
    for model in (plain, ours):
        model.classifier.register_forward_hook(lambda module, args, result: result * 2)
        model.register_full_backward_hook(lambda module, inputs, outputs: None)
    x, y = (model.eval()(images())["out"] for model in (ours, plain))
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*find_unused")
def test_distributed_data_parallel(segmentation, tmp_path, options):
    """Tests one process: the wrapper reads the outputs without a call of a function of PyTorch."""
    plain, ours, _ = pair(segmentation, NAMES[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(ours.eval(), **options)
        (_, loss, _), (_, their_loss, grads) = step(parallel), step(plain.eval())
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close([p.grad for p in ours.parameters()], grads, rtol=1e-6, atol=1e-9)


def test_other_models_of_torchvision_are_an_error(segmentation):
    other = real_packages.imported("torchvision").models.resnet18(weights=None)
    with pytest.raises(
        ValueError, match=r"model: expected parts of mmsegmentation, .* that segment images, got ResNet"
    ):
        apc_kernels.accelerate(nn.Sequential(other)[0])
