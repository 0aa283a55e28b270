"""Tests accelerate() on whole models: reports, label-only predictions, errors for other objects."""

import copy
import sys
from types import ModuleType

import mmseg_peer as peer
import pytest
import torch
from torch import nn

from apc_kernels.interop.mmseg import accelerate

needs_mmseg = pytest.mark.skipif(not peer.AVAILABLE, reason="needs mmsegmentation")

pytestmark = [
    pytest.mark.filterwarnings(
        *(
            f"ignore:.*{what}"
            for what in ("avg_non_ignore", "align_corners", "binary segmentation", "deprecated", "mmcv.ops")
        )
    ),
    pytest.mark.usefixtures("one_thread"),
]


# Whole models.

BACKBONE = {"type": "ResNetV1c", "depth": 18, "base_channels": 4, "norm_cfg": {"type": "BN"}}
BACKBONE |= {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
MAIN = peer.head_config("apc", channels=32, in_index=3)
AUXILIARY = peer.head_config("fcn", channels=16, in_index=2, num_convs=1, concat_input=False)
WHOLE, SLIDE = {"mode": "whole"}, {"mode": "slide", "crop_size": (40, 56), "stride": (24, 40)}


def segmentor(test_cfg=WHOLE, decode_head=MAIN):
    """Builds a model and its accelerated copy."""
    config = {"type": "EncoderDecoder", "backbone": BACKBONE, "decode_head": decode_head, "auxiliary_head": AUXILIARY}
    theirs = peer.build(config | {"train_cfg": {}, "test_cfg": _attributes(test_cfg)})
    return theirs.eval(), copy.deepcopy(theirs)


def _attributes(config):
    peer.imported()
    from mmengine.config import ConfigDict

    return ConfigDict(config)


@needs_mmseg
def test_a_model_and_its_report():
    theirs, ours = segmentor()
    report = accelerate(ours)
    assert report.swapped == {
        "decode_head.loss_by_feat": "FusedAPCHead",
        "decode_head.forward": "FusedAPCHead",
        "auxiliary_head.loss_by_feat": "FusedFCNHead",
        "backbone": "FusedConvolution, 23 times",
    }
    assert report.left == {"predict": "labels_only is False"}
    assert "left     predict: labels_only is False" in str(report)
    images, target = torch.randn(2, 3, 48, 64), peer.labels(size=(48, 64))
    theirs.train(), ours.train()
    expected, given = (model(images, peer.samples(target), mode="loss") for model in (theirs, ours))
    assert list(given) == list(expected)
    for name in given:
        torch.testing.assert_close(given[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)


META = {
    "as it went in": {},
    "resized": {"ori_shape": (71, 93)},
    "padded": {"padding_size": [0, 8, 0, 4], "ori_shape": (44, 56)},
    "padded and resized": {"img_padding_size": [3, 5, 2, 4], "ori_shape": (99, 120)},
    "flipped": {"flip": True, "flip_direction": "horizontal"},
    "upside down, resized": {"flip": True, "flip_direction": "vertical", "ori_shape": (71, 93)},
    "padded beforehand": {"pad_shape": (56, 72), "ori_shape": (48, 64)},
}


@needs_mmseg
@pytest.mark.parametrize("test_cfg", [WHOLE, SLIDE], ids=["whole", "slide"])
@pytest.mark.parametrize("meta", META)
def test_labels_only(meta, test_cfg):
    if meta == "padded beforehand" and test_cfg is SLIDE:
        meta = "resized"  # mmsegmentation's windows have the shape of the image
    theirs, ours = segmentor(test_cfg)
    assert accelerate(ours, labels_only=True).swapped["predict"] == "LabelsOnlyEncoderDecoder"
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, given = (
            model(images, peer.samples(peer.labels(size=(48, 64)), **META[meta]), mode="predict")
            for model in (theirs, ours)
        )
    for theirs, ours in zip(expected, given, strict=True):
        assert "seg_logits" not in ours and "gt_sem_seg" in ours
        assert ours.pred_sem_seg.data.dtype == theirs.pred_sem_seg.data.dtype
        # Classes whose logits differ by a rounding are all that may come out otherwise.
        close = theirs.seg_logits.data.topk(2, 0).values
        close = close[0] - close[1] < 1e-5
        assert ours.pred_sem_seg.shape == theirs.pred_sem_seg.shape
        assert ((ours.pred_sem_seg.data[0] == theirs.pred_sem_seg.data[0]) | close).all()
        assert close.float().mean() < 0.01


@needs_mmseg
def test_labels_only_without_data_samples_and_of_a_head_with_two_outputs():
    theirs, ours = segmentor(decode_head=peer.head_config("enc", in_channels=[32], in_index=[3]))
    accelerate(ours, labels_only=True)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        for expected, given in zip(theirs.predict(images), ours.predict(images), strict=True):
            assert (expected.pred_sem_seg.data == given.pred_sem_seg.data).float().mean() > 0.999


@needs_mmseg
def test_labels_only_can_be_taken_back():
    _, ours = segmentor()
    accelerate(ours, labels_only=True)
    accelerate(ours)
    assert "seg_logits" in ours.predict(torch.randn(1, 3, 48, 64))[0]


@needs_mmseg
def test_test_time_augmentation_keeps_its_logits():
    _, model = segmentor()
    from mmseg.models.segmentors import SegTTAModel

    report = accelerate(SegTTAModel(module=model), labels_only=True)
    assert report.left["module.predict"] == "test-time augmentation reads the logits"
    assert "module.decode_head.forward" in report.swapped


@needs_mmseg
def test_a_binary_model_keeps_its_threshold():
    head = peer.head_config("fcn", channels=32, classes=2, in_index=3, out_channels=1, threshold=0.3)
    theirs, ours = segmentor(decode_head=head | {"loss_decode": peer.LOSS | {"use_sigmoid": True}})
    report = accelerate(ours, labels_only=True)
    assert "threshold" in report.left["predict"]
    images = torch.randn(1, 3, 48, 64)
    assert (theirs.predict(images)[0].pred_sem_seg.data == ours.predict(images)[0].pred_sem_seg.data).all()


@needs_mmseg
def test_what_is_not_mmsegmentation_is_refused():
    peer.imported()
    with pytest.raises(ValueError, match="model: expected an mmsegmentation model, got Linear"):
        accelerate(nn.Linear(2, 2))


# Without mmsegmentation.


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model: expected an mmsegmentation model, got str"):
        accelerate("apcnet")


def test_without_mmsegmentation_there_is_no_model_of_its(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmseg", raising=False)
    with pytest.raises(ValueError, match="model: expected an mmsegmentation model, got Linear"):
        accelerate(nn.Linear(2, 2))


def test_models_of_0_x_are_refused(monkeypatch):
    older = ModuleType("mmseg")
    older.__version__ = "0.30.0"
    monkeypatch.setitem(sys.modules, "mmseg", older)
    with pytest.raises(ValueError, match=r"model: expected a model of mmsegmentation 1.x, got 0.30.0"):
        accelerate(nn.Linear(2, 2))


@needs_mmseg
def test_a_wide_backbone_through_tiles():
    """Its convolutions are Winograd's, its maps channels_last; training and evaluation compute what they did."""
    backbone = BACKBONE | {"base_channels": 32, "depth": 50}
    head = peer.head_config("psp", channels=1024, in_index=3)
    config = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": head, "train_cfg": {}}
    theirs = peer.build(config | {"test_cfg": _attributes(WHOLE)})
    ours = copy.deepcopy(theirs)
    assert accelerate(ours).swapped["backbone"].startswith("FusedConvolution")
    images = torch.randn(1, 3, 256, 288, generator=torch.Generator().manual_seed(3))
    for model in (theirs.eval(), ours.eval()):
        model.zero_grad()
        model.decode_head(model.extract_feat(images)).square().mean().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * a.grad.abs().max().item(), msg=name)
    assert ours.extract_feat(images)[3].is_contiguous(memory_format=torch.channels_last)
