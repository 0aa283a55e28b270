"""Tests online hard example mining against mmsegmentation's sampler, restated, and its rule for equal losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels
from apcnet.losses import ohem


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 7, 6, 8, generator=generator)
    target = torch.randint(7, (3, 24, 30), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return logits.to(dtype), target, 0.5 + torch.rand(7, generator=generator)


def sampled(logits: Tensor, target: Tensor, thresh: float | None, min_kept: int, weight: Tensor | None) -> Tensor:
    """Restates OHEMPixelSampler.sample of mmsegmentation 1.2.2 on full-size logits: the weight of each pixel."""
    batch_kept = min_kept * target.size(0)
    valid = target != 255
    seg_weight = logits.new_zeros(target.shape)
    valid_weight = seg_weight[valid]
    if thresh is not None:
        label = torch.where(valid, target, 0)[:, None]
        prob = logits.softmax(1).gather(1, label).squeeze(1)
        ordered = prob[valid].sort().values
        threshold = max(ordered[min(batch_kept, ordered.numel() - 1)], thresh)
        valid_weight[prob[valid] < threshold] = 1.0
    else:
        losses = F.cross_entropy(logits, target, weight, ignore_index=255, reduction="none")
        valid_weight[losses[valid].sort(descending=True).indices[:batch_kept]] = 1.0
    seg_weight[valid] = valid_weight
    return seg_weight


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("thresh", "min_kept"), [(0.7, 2), (0.2, 100), (0.05, 300), (None, 50)])
def test_mmsegmentations_sampler(thresh, min_kept, weighted):
    logits, target, weight = draw()
    weight = weight if weighted else None
    full = F.interpolate(logits, target.shape[1:], mode="bilinear").requires_grad_()
    mask = sampled(full.detach(), target, thresh, min_kept, weight)
    losses = F.cross_entropy(full, target, weight, ignore_index=255, reduction="none")
    kept = mask > 0
    assert 0.05 < kept.sum() / (target != 255).sum() < 0.97
    ours = ohem(logits, target, threshold=thresh, min_kept=min_kept, weight=weight, reduction="none")
    assert torch.equal(ours > 0, kept)
    torch.testing.assert_close(ours, (losses * mask).detach())
    leaf = logits.requires_grad_()
    loss = ohem(leaf, target, threshold=thresh, min_kept=min_kept, weight=weight, reduction="mean_all")
    expected = (
        F.cross_entropy(
            F.interpolate(leaf, target.shape[1:], mode="bilinear"), target, weight, ignore_index=255, reduction="none"
        )
        * mask
    ).mean()
    torch.testing.assert_close(loss, expected)
    grads = (torch.autograd.grad(value, leaf)[0] for value in (loss, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_the_hardest_share(share):
    logits, target, _ = draw()
    losses = apc_kernels.upsample_cross_entropy(logits, target, reduction="none")
    count = math.ceil(share * (target != 255).sum().item())
    hardest = losses[target != 255].sort(descending=True).values[:count]
    torch.testing.assert_close(ohem(logits, target, share=share), hardest.mean())
    torch.testing.assert_close(ohem(logits, target, share=share, reduction="sum"), hardest.sum())
    torch.testing.assert_close(ohem(logits, target, share=share, denominator=7), hardest.sum() / 7)


def test_the_mean_is_over_the_weights_of_the_pixels_that_are_kept():
    logits, target, weight = draw()
    pixels = ohem(logits, target, threshold=0.3, share=0.2, weight=weight, reduction="none")
    total = weight[target[pixels > 0]].sum()
    torch.testing.assert_close(ohem(logits, target, threshold=0.3, share=0.2, weight=weight), pixels.sum() / total)


def test_equal_losses_are_kept_together():
    logits = torch.zeros(1, 3, 2, 2)  # every loss is log 3
    target = torch.arange(16).view(1, 4, 4) % 3
    assert (ohem(logits, target, min_kept=1, reduction="none") > 0).all()
    logits[0, 0, 0, 0] = -1.0
    for _ in range(2):
        first = ohem(logits, target, share=0.1, reduction="none")
        flipped = ohem(logits.flip(2, 3), target.flip(1, 2), share=0.1, reduction="none")
        assert torch.equal(first, flipped.flip(1, 2)) and (first > 0).sum() < 16


def test_pixels_that_do_not_count():
    logits, target, weight = draw()
    target.fill_(255)
    leaf = logits.requires_grad_()
    for given in {"share": 0.5}, {"threshold": 0.9, "min_kept": 10}, {"min_kept": 10, "reduction": "mean_all"}:
        loss = ohem(leaf, target, weight=weight, **given)
        assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()
    target = torch.zeros(3, 24, 30, dtype=torch.uint8) + 6
    assert ohem(leaf, target, share=1.0, ignore_index=6 - 256) > 0  # uint8 does not hold it: nothing is ignored


def test_a_nan_is_not_left_out():
    logits, target, _ = draw()
    target[0, 0, 0] = 2
    logits[0, 1, 0, 0] = float("nan")
    for given in {"share": 0.5}, {"threshold": 0.9}, {"min_kept": 10}:
        assert ohem(logits, target, **given).isnan()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "threshold, share, min_kept: expected one of them at least, got none"),
        ({"threshold": 1.5}, "threshold: expected 0 to 1, got 1.5"),
        ({"share": -0.5}, "share: expected 0 to 1, got -0.5"),
        ({"min_kept": -1}, "min_kept: expected 0 or more, got -1"),
        ({"share": 0.5, "reduction": "average"}, "reduction: expected one of mean, mean_all, sum, none; got 'average'"),
    ],
)
def test_wrong_options(given, message):
    logits, target, _ = draw()
    with pytest.raises(ValueError, match=message):
        ohem(logits, target, **given)
