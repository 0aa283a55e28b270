"""Tests the explicit speed-up of segmentation_models_pytorch: its models and losses, each beside a plain copy."""

import copy
import inspect
import pickle

import pytest
import real_packages
import torch
import torch.nn.functional as F

import apc_kernels
from apc_kernels.interop import smp as door
from apc_kernels.interop.upsampled import UpsampledLogits

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["FPN", "PSPNet", "DeepLabV3Plus", "UPerNet", "Segformer", "DPT"]


@pytest.fixture(scope="module")
def smp():
    return real_packages.imported("segmentation_models_pytorch")


def pair(smp, name, classes=5, **options):
    encoder = {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True} if name == "DPT" else {}
    encoder = encoder or {"encoder_name": "resnet18"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = getattr(smp, name)(**encoder, encoder_weights=None, classes=classes, **options).double()
    ours = copy.deepcopy(plain)
    return plain, ours, door.accelerate(ours)


def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def labels(classes=5, ignored=255):
    target = torch.randint(0, classes, (2, 64, 96), generator=torch.Generator().manual_seed(1))
    target[:, :9, 5:] = ignored
    return target


def step(model, criterion, target):
    """Returns the logits, the loss and all gradients."""
    torch.manual_seed(0)
    logits = model(images())
    loss = criterion(logits, target)
    loss.backward()
    return logits, loss, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_losses_and_gradients(smp, name):
    plain, ours, report = pair(smp, name)
    assert list(report.swapped) == ["segmentation_head.forward"] and not report.left

    def criterion(logits, target):
        return F.cross_entropy(logits, target, ignore_index=255)

    (logits, loss, grads), (theirs, their_loss, their_grads) = (step(m, criterion, labels()) for m in (ours, plain))
    assert isinstance(logits, UpsampledLogits)
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(grads, their_grads, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=0)
    assert torch.equal(logits.argmax(1), theirs.argmax(1))


def test_copies_and_names(smp, tmp_path):
    plain, ours, report = pair(smp, "FPN")
    assert list(ours.state_dict()) == list(plain.state_dict()) and door.accelerate(ours) == report
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin.segmentation_head) is type(ours.segmentation_head)
        torch.testing.assert_close(twin.eval()(images()), plain.eval()(images()))
    ours.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path)
    assert type(loaded.segmentation_head) is type(plain.segmentation_head)


def test_what_is_left_alone(smp):
    plain, _, _ = pair(smp, "FPN")
    report = apc_kernels.accelerate(plain)
    assert not report.swapped and "apc_kernels.interop.smp.accelerate" in report.left["segmentation_head"]
    assert type(plain.segmentation_head) is smp.base.SegmentationHead
    _, _, report = pair(smp, "Unet")
    assert report.left == {"segmentation_head.forward": "it does not upsample"}
    _, _, report = pair(smp, "FPN", activation="sigmoid")
    assert report.left == {"segmentation_head.forward": "an activation, Sigmoid, reads the upsampled logits"}
    plain.segmentation_head.forward = torch.sin
    assert door.accelerate(plain).left == {"segmentation_head.forward": "forward is overridden on the instance"}
    report = door.accelerate(smp.losses.LovaszLoss("multiclass"))
    assert report.left == {"forward": "LovaszLoss reads every upsampled logit"}
    with pytest.raises(ValueError, match="expected a model or loss of segmentation_models_pytorch, got Linear"):
        door.accelerate(torch.nn.Linear(2, 2))


def test_exported_and_compiled_models_compute_as_before(smp):
    plain, ours, _ = pair(smp, "FPN")
    expected = plain.eval()(images())
    exported = torch.export.export(ours.eval(), (images(),)).module()
    for model in (exported, torch.compile(ours, backend="aot_eager")):
        given = model(images())
        assert type(given) is torch.Tensor
        torch.testing.assert_close(given, expected)


DICE = {"ignore_index": 255}
LOSSES = {
    "dice": ("DiceLoss", DICE),
    "dice of some classes": ("DiceLoss", DICE | {"classes": [0, 2, 3], "smooth": 1.0, "log_loss": True}),
    "weighted dice": ("DiceLoss", DICE | {"class_weights": [1.0, 2.0, 0.5, 1.0, 3.0]}),
    "jaccard": ("JaccardLoss", DICE | {"smooth": 0.5}),
    "tversky": ("TverskyLoss", DICE | {"alpha": 0.3, "beta": 0.7, "gamma": 1.3}),
    "focal": ("FocalLoss", DICE),
    "focal of a prior": ("FocalLoss", DICE | {"alpha": 0.25, "gamma": 1.5}),
    "soft cross entropy": ("SoftCrossEntropyLoss", {"ignore_index": 255, "smooth_factor": 0.0}),
    "smoothed soft cross entropy": ("SoftCrossEntropyLoss", {"ignore_index": 255, "smooth_factor": 0.1}),
    "summed soft cross entropy": (
        "SoftCrossEntropyLoss",
        {"reduction": "sum", "ignore_index": 255, "smooth_factor": 0.0},
    ),
    "soft cross entropy of every pixel": (
        "SoftCrossEntropyLoss",
        {"reduction": "none", "ignore_index": 255, "smooth_factor": 0.0},
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses(smp, case):
    name, options = LOSSES[case]
    plain, ours, _ = pair(smp, "FPN")
    mode = {} if name.startswith("Soft") else {"mode": "multiclass"}
    if "class_weights" in options and "class_weights" not in inspect.signature(getattr(smp.losses, name)).parameters:
        pytest.skip(f"needs a segmentation_models_pytorch whose {name} takes class_weights")
    theirs = getattr(smp.losses, name)(**mode, **options)
    own = copy.deepcopy(theirs)
    assert list(door.accelerate(own).swapped) == ["forward"]
    assert type(pickle.loads(pickle.dumps(own))) is type(own) and isinstance(own, type(theirs))
    (_, loss, grads), (_, their_loss, their_grads) = (
        step(model, lambda x, y, c=criterion: c(x, y).sum(), labels())
        for model, criterion in ((ours, own), (plain, theirs))
    )
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(grads, their_grads, rtol=1e-6, atol=1e-9)
    logits = plain(images())
    torch.testing.assert_close(own(logits, labels()), theirs(logits, labels()))  # of full size


BINARY = {
    "dice": ("DiceLoss", {"ignore_index": 255}),
    "jaccard": ("JaccardLoss", {}),
    "tversky": ("TverskyLoss", {"alpha": 0.3, "beta": 0.7}),
    "focal": ("FocalLoss", {"alpha": 0.25}),
    "cross entropy": ("SoftBCEWithLogitsLoss", {"ignore_index": 255, "pos_weight": torch.tensor(2.0)}),
    "smoothed cross entropy": ("SoftBCEWithLogitsLoss", {"smooth_factor": 0.1, "reduction": "sum"}),
}


@pytest.mark.parametrize("masks", ["binary", "multilabel"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=["integers", "floats"])
@pytest.mark.parametrize("case", BINARY)
def test_losses_of_masks(smp, case, dtype, masks):
    name, options = BINARY[case]
    if name.startswith("Soft"):
        dtype = torch.float64  # as it needs them
    else:
        options = options | {"mode": masks}
    classes = 1 if masks == "binary" else 3
    target = torch.randint(0, 2, (2, classes, 64, 96), generator=torch.Generator().manual_seed(1)).to(dtype)
    if "ignore_index" in options:
        target[:, :, :9, 5:] = 255
    plain, ours, _ = pair(smp, "FPN", classes)
    theirs = getattr(smp.losses, name)(**options)
    own = copy.deepcopy(theirs)
    door.accelerate(own)
    (logits, loss, grads), (_, their_loss, their_grads) = (
        step(*each, target) for each in ((ours, own), (plain, theirs))
    )
    assert logits._values is None
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(grads, their_grads, rtol=1e-6, atol=1e-9)


def test_losses_of_other_targets_read_the_upsampled_logits(smp):
    plain, ours, _ = pair(smp, "FPN", 1)
    soft = torch.rand(2, 1, 64, 96, dtype=torch.float64)
    for theirs in (smp.losses.SoftBCEWithLogitsLoss(), smp.losses.DiceLoss("binary"), smp.losses.FocalLoss("binary")):
        own = copy.deepcopy(theirs)
        door.accelerate(own)
        (_, loss, grads), (_, their_loss, their_grads) = (step(*each, soft) for each in ((ours, own), (plain, theirs)))
        torch.testing.assert_close([loss, *grads], [their_loss, *their_grads], rtol=1e-9, atol=1e-12)
        ours.zero_grad(), plain.zero_grad()
