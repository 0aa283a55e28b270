"""Tests that focal and binary losses are those of segmentation_models_pytorch and torchvision on upsampled logits.

The formulas are restated here, for machines without these packages, and compared with them where they are installed.
"""

import pytest
import real_packages
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels


def draw(classes: int = 1) -> tuple[Tensor, Tensor]:
    """Draws logits that need a gradient, and masks (B, C, H, W) of 0, 1 and 255."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(2, classes, 8, 9, generator=generator)
    target = torch.tensor([0, 1, 1, 255])[torch.randint(4, (2, classes, 32, 36), generator=generator)]
    return logits.requires_grad_(), target


def upsampled(logits: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(logits, target.shape[-2:], mode="bilinear")


def focal(z: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Restates smp.losses.FocalLoss(mode="binary", alpha=None), and torchvision's sigmoid_focal_loss(alpha=-1)."""
    logpt = F.binary_cross_entropy_with_logits(z, y.float(), reduction="none")
    return (1 - torch.exp(-logpt)) ** gamma * logpt


def soft_bce(z: Tensor, y: Tensor, ignored: int, smooth: float | None, pos_weight: float | None) -> Tensor:
    """Restates smp.losses.SoftBCEWithLogitsLoss, whose mean is over ignored pixels too."""
    soft = y.float() if smooth is None else (1 - y) * smooth + y * (1 - smooth)
    weight = None if pos_weight is None else torch.tensor(pos_weight)
    losses = F.binary_cross_entropy_with_logits(z, soft, pos_weight=weight, reduction="none")
    return (losses * (y != ignored)).mean()


def assert_same(ours: Tensor, theirs: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    grads = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=2e-8)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.5])
def test_binary_focal_loss(gamma):
    logits, target = draw()
    ours = apc_kernels.upsample_binary_cross_entropy(logits, target, focal=gamma)
    z, valid = upsampled(logits, target), target != 255
    assert_same(ours, focal(z[valid], target[valid], gamma).mean(), logits)
    smp = real_packages.imported("segmentation_models_pytorch")
    assert_same(ours, smp.losses.FocalLoss("binary", gamma=gamma, ignore_index=255)(z, target), logits)


def test_focal_loss_of_torchvision():
    logits, target = draw(3)
    target = target.clamp(max=1)
    ours = apc_kernels.upsample_binary_cross_entropy(logits, target, focal=2.0, reduction="sum")
    z = upsampled(logits, target)
    torchvision = real_packages.imported("torchvision")
    theirs = torchvision.ops.sigmoid_focal_loss(z, target.float(), alpha=-1, gamma=2.0, reduction="sum")
    assert_same(ours, theirs, logits)
    weighted = apc_kernels.upsample_binary_cross_entropy(  # alpha for label 1, 1 - alpha for label 0
        logits, target, focal=2.0, pos_weight=0.25 / 0.75
    )
    theirs = torchvision.ops.sigmoid_focal_loss(z, target.float(), alpha=0.25, gamma=2.0, reduction="mean")
    assert_same(0.75 * weighted, theirs, logits)


def test_focal_loss_of_smp_for_several_classes():
    """Tests that smp's loss for labels of classes is the mean of one loss for each class, by its sigmoid."""
    logits, _ = draw(4)
    labels = torch.randint(4, (2, 32, 36), generator=torch.Generator().manual_seed(0))
    masks = F.one_hot(labels, 4).permute(0, 3, 1, 2)
    ours = apc_kernels.upsample_binary_cross_entropy(logits, masks, focal=2.0)
    z = upsampled(logits, labels)
    assert_same(ours, sum(focal(z[:, i], masks[:, i], 2.0).mean() for i in range(4)) / 4, logits)
    smp = real_packages.imported("segmentation_models_pytorch")
    assert_same(ours, smp.losses.FocalLoss("multiclass", gamma=2.0)(z, labels), logits)


@pytest.mark.parametrize(("smooth", "pos_weight"), [(None, None), (None, 3.0), (0.1, None)])
def test_soft_binary_cross_entropy(smooth, pos_weight):
    logits, target = draw(2)
    ours = apc_kernels.upsample_binary_cross_entropy(
        logits, target, pos_weight=pos_weight, label_smoothing=2 * (smooth or 0.0), reduction="mean_all"
    )
    z = upsampled(logits, target)
    assert_same(ours, soft_bce(z, target, 255, smooth, pos_weight), logits)
    smp = real_packages.imported("segmentation_models_pytorch")
    weight = None if pos_weight is None else torch.tensor(pos_weight)
    theirs = smp.losses.SoftBCEWithLogitsLoss(ignore_index=255, smooth_factor=smooth, pos_weight=weight)
    assert_same(ours, theirs(z, target.float()), logits)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_a_softmax_over_two_classes(gamma):
    """Tests that the losses of the logits (0, z) and of one logit are the same."""
    logits, target = draw()
    ours = apc_kernels.upsample_cross_entropy(F.pad(logits, (0, 0, 0, 0, 1, 0)), target[:, 0], focal=gamma)
    z, valid = upsampled(logits, target), target != 255
    assert_same(ours, focal(z[valid], target[valid], gamma).mean(), logits)
