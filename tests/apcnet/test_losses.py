"""Tests the region losses against their formulas on upsampled probabilities, and segmentation_models_pytorch's."""

import pytest
import torch
import torch.nn.functional as F
from real_packages import imported

from apcnet import losses

MODES = ("binary", "multiclass", "multilabel")
LOSSES = {  # what segmentation_models_pytorch calls them, and what says which of its family they are
    "dice": ("DiceLoss", {}),
    "jaccard": ("JaccardLoss", {}),
    "tversky": ("TverskyLoss", {"alpha": 0.3, "beta": 0.8}),
    "focal_tversky": ("TverskyLoss", {"alpha": 0.3, "beta": 0.7, "gamma": 0.75}),
}
OPTIONS = [
    {},
    {"smooth": 2.0},
    {"log_loss": True, "eps": 1e-3},
    {"classes": [4, 1]},
    {"class_weights": [1.0, 0.5, 2.0, 0.25, 3.0]},
    {"class_weights": [1.0, 0.5, 2.0, 0.25, 3.0], "classes": [1, 2]},
]
modes = pytest.mark.parametrize("mode", MODES)
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


def draw(mode, dtype=torch.float64):
    """Draws logits and targets of which a fifth is ignored; the third class is in no image, the fourth in one."""
    generator = torch.Generator().manual_seed(0)
    classes, size = 1 if mode == "binary" else 5, (31, 40)
    logits = 2 * torch.randn(3, classes, 8, 9, generator=generator, dtype=dtype)
    if mode == "multiclass":
        target = torch.randint(5, (3, *size), generator=generator)
        target[target == 2] = 0
        target[1:] = target[1:].where(target[1:] != 3, 1)
    else:
        target = torch.randint(2, (3, *size) if mode == "binary" else (3, 5, *size), generator=generator)
    if mode == "multilabel":
        target[:, 2], target[1:, 3] = 0, 0
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return logits.requires_grad_(), target


def upsampled(logits, target, align_corners=False):
    return F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)


def regions(logits, target, mode, ignore_index=255, align_corners=False):
    """Returns true positives, false positives and false negatives of every image and class, (B, K), by their names."""
    full = upsampled(logits, target, align_corners)
    p = full.softmax(1) if mode == "multiclass" else full.sigmoid()
    label = target[:, None] if target.dim() == 3 else target
    inside = label == (torch.arange(p.shape[1])[:, None, None] if mode == "multiclass" else 1)
    valid = label != ignore_index
    return ((p * inside * valid), (p * ~inside * valid), ((1 - p) * inside * valid))


def formula(name, sums, settings):
    """Computes a loss from sums (B or 1, K) of true positives, false positives and false negatives."""
    hit, false, missed = sums
    given = {"alpha": 0.5, "beta": 0.5, "gamma": 1.0, "smooth": 0.0, "eps": 1e-7} | settings
    if name == "jaccard":
        given |= {"alpha": 1.0, "beta": 1.0}
    below = hit + given["alpha"] * false + given["beta"] * missed + given["smooth"]
    score = (hit + given["smooth"]) / below.clamp_min(given["eps"])
    loss = -score.clamp_min(given["eps"]).log() if given.get("log_loss") else 1 - score
    loss = loss * (hit + missed > 0)
    chosen = given.get("classes") or list(range(loss.shape[1]))
    weights = torch.tensor(given.get("class_weights") or [1.0] * loss.shape[1]).double()[chosen]
    return (((loss[:, chosen] * weights).sum(1) / weights.sum()) ** given["gamma"]).mean()


def with_gradient(loss, logits):
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@modes
@options
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("name", LOSSES)
def test_formulas(name, per_image, options, mode):
    if mode == "binary" and ("classes" in options or "class_weights" in options):
        pytest.skip("options on several classes")
    logits, target = draw(mode)
    settings = LOSSES[name][1] | options
    ours = getattr(losses, name)(logits, target, mode=mode, per_image=per_image, **settings)
    sums = [part.sum((2, 3)) if per_image else part.sum((0, 2, 3))[None] for part in regions(logits, target, mode)]
    for a, b in zip(with_gradient(ours, logits), with_gradient(formula(name, sums, settings), logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@modes
@options
@pytest.mark.parametrize("ignore_index", [255, None])
@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_segmentation_models_pytorch(name, options, mode, ignore_index):
    """Tests values and gradients on upsampled logits, in float64; probabilities instead of logits, too."""
    smp = imported("segmentation_models_pytorch")
    if mode == "binary" and ("classes" in options or "class_weights" in options):
        pytest.skip("segmentation_models_pytorch takes no such options for a single class")
    logits, target = draw(mode)
    if ignore_index is None:
        target[target == 255] = 1
    kind, settings = LOSSES[name]
    theirs = getattr(smp.losses, kind)(mode, ignore_index=ignore_index, **options, **settings)
    given = {"mode": mode, "ignore_index": ignore_index, **options, **settings}
    # Its weights are float32: their product with float64 losses is not rounded, and neither are ours.
    actual = with_gradient(getattr(losses, name)(logits, target, **given), logits)
    expected = with_gradient(theirs(upsampled(logits, target), target), logits)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    shares = (logits.softmax(1) if mode == "multiclass" else logits.sigmoid()).detach().requires_grad_()
    theirs = getattr(smp.losses, kind)(mode, ignore_index=ignore_index, from_logits=False, **options, **settings)
    actual = with_gradient(getattr(losses, name)(shares, target, from_logits=False, **given), shares)
    expected = with_gradient(theirs(upsampled(shares, target), target), shares)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@modes
def test_float32_is_closer_to_float64_than_segmentation_models_pytorch(mode):
    smp = imported("segmentation_models_pytorch")
    logits, target = draw(mode)
    exact = losses.dice(logits, target, mode=mode)
    single = logits.detach().float()
    theirs = smp.losses.DiceLoss(mode, ignore_index=255)(upsampled(single, target), target)
    assert (losses.dice(single, target, mode=mode) - exact).abs() <= (theirs - exact).abs() + 1e-7


@modes
@pytest.mark.parametrize("align_corners", [False, True])
def test_generalised_dice(mode, align_corners):
    """Tests the formula with weights 1 / t², and that a class without pixels weighs nothing."""
    logits, target = draw(mode)
    hit, false, missed = (part.sum((0, 2, 3)) for part in regions(logits, target, mode, align_corners=align_corners))
    t = hit + missed
    weights = torch.where(t > 0, t.detach() ** -2.0, 0.0)
    expected = 1 - 2 * (weights * hit).sum() / (weights * (2 * hit + false + missed)).sum()
    ours = losses.generalised_dice(logits, target, mode=mode, align_corners=align_corners)
    for a, b in zip(with_gradient(ours, logits), with_gradient(expected, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    images = [
        losses.generalised_dice(x[None], y[None], mode=mode, smooth=3.0) for x, y in zip(logits, target, strict=True)
    ]
    together = losses.generalised_dice(logits, target, mode=mode, smooth=3.0, per_image=True)
    torch.testing.assert_close(together, torch.stack(images).mean(), rtol=1e-9, atol=0)
    if mode != "binary":
        some = losses.generalised_dice(logits, target, mode=mode, classes=[0, 1], log_loss=True)
        weights = weights[:2]
        score = 2 * (weights * hit[:2]).sum() / (weights * (2 * hit + false + missed)[:2]).sum()
        if not align_corners:
            torch.testing.assert_close(some, -score.log(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [*LOSSES, "generalised_dice"])
def test_targets_without_a_pixel_that_counts(name):
    """Tests that nothing is lost where there is nothing to find, with gradients of 0."""
    logits, target = draw("multiclass", torch.float32)
    for given in {}, {"per_image": True}, {"smooth": 1.0}:
        loss, grad = with_gradient(getattr(losses, name)(logits, torch.full_like(target, 255), **given), logits)
        assert loss == 0 and not grad.any()


def test_several_losses_share_their_sums():
    logits, target = draw("multiclass")
    sums = losses.region_sums(logits, target)
    shared = (
        losses.dice_of_sums(sums, smooth=1.0) + losses.jaccard_of_sums(sums) + losses.generalised_dice_of_sums(sums)
    )
    alone = losses.dice(logits, target, smooth=1.0) + losses.jaccard(logits, target)
    alone = alone + losses.generalised_dice(logits, target)
    for a, b in zip(with_gradient(shared, logits), with_gradient(alone, logits), strict=True):
        torch.testing.assert_close(a, b)


def test_single_logits_take_labels_or_masks():
    logits, target = draw("binary")
    by_labels = losses.dice(logits, target, mode="binary")
    for mask in target[:, None], target[:, None].to(torch.uint8):
        assert torch.equal(losses.dice(logits, mask, mode="binary"), by_labels)
    clean = target.where(target != 255, 0)
    assert torch.equal(losses.dice(logits, clean.bool(), mode="binary"), losses.dice(logits, clean, mode="binary"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "binary"}, r"logits: expected one channel for mode='binary', got \(3, 5, 8, 9\)"),
        ({"mode": "several"}, "mode: expected one of binary, multiclass, multilabel; got 'several'"),
        ({"mode": "multilabel"}, r"target: expected \(B, K, H, W\) for mode='multilabel', got \(3, 31, 40\)"),
        ({"target": torch.zeros(3, 5, 31, 40).long()}, r"target: expected \(B, H, W\) for mode='multiclass', got"),
        (
            {"target": torch.full((3, 31, 40), 5)},
            "target: expected labels of 0 to 4, or 255 for pixels to ignore; got 5",
        ),
    ],
)
def test_wrong_arguments(changed, message):
    logits, target = draw("multiclass")
    with pytest.raises(ValueError, match=message):
        losses.dice(**{"logits": logits, "target": target} | changed)


def test_wrong_options():
    logits, target = draw("multiclass")
    with pytest.raises(TypeError, match="unexpected keyword argument 'smoth'"):
        losses.dice(logits, target, smoth=1.0)
