"""Computes the upsample_* operations in plain PyTorch, from the upsampled logits.

This is the specification, and the code of exported models. Products with the matrices of the interpolation collapse the
gradients, because PyTorch's own backward adds atomically on a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apc_kernels.ops.common import without_autocast, working
from apc_kernels.ops.interpolation import matrix


def upsampled(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(working(logits), size=tuple(size), mode="bilinear", align_corners=align_corners)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal: float,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes Σ exp(l − its largest l) of each pixel, for the backward, its loss, and four sums.

    With focal the Σ leaves out the label. The four sums are those of losses, weights, correct pixels and labels out of
    range.
    """
    scores = upsampled(logits, target.shape[1:], align_corners)
    label, valid, wrong = _labels(target, scores.shape[1], ignore_index)
    logarithms = scores.log_softmax(1)
    own = -logarithms.gather(1, label)[:, 0]
    weights = valid.to(scores.dtype) if weight is None else torch.where(valid, weight[label[:, 0]], 0.0)
    normalizer = (scores - scores.amax(1, keepdim=True)).exp()
    if focal:
        normalizer, shares = _without(normalizer, label)
        own = _focal(*shares, own, focal)[0]
    losses = torch.where(valid, (1 - label_smoothing) * weights * own, 0.0)
    if label_smoothing:
        smooth = (logarithms if weight is None else logarithms * weight[:, None, None]).sum(1)
        losses = losses - torch.where(valid, label_smoothing / scores.shape[1] * smooth, 0.0)
    losses = torch.where(wrong, float("nan"), losses)
    correct = valid & (scores.argmax(1) == label[:, 0])
    sums = torch.stack([t.sum(dtype=torch.float64) for t in (losses, weights, correct, wrong)])
    return normalizer.sum(1), losses if per_pixel else losses.new_empty(0), sums


def upsample_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal: float,
    align_corners: bool,
    normalizer: Tensor,
) -> Tensor:
    """Computes the gradient of logits from that of every pixel's loss, (B, H, W), or (1,) if it is the same for all."""
    classes = logits.shape[1]
    scores = upsampled(logits, target.shape[1:], align_corners)
    label, valid, wrong = _labels(target, classes, ignore_index)
    grad = torch.where(valid, grad.expand(target.shape) if grad.dim() == 1 else grad, 0.0)[:, None]
    own = torch.arange(classes, device=logits.device)[:, None, None] == label
    softmax = scores.softmax(1)
    weights = torch.ones_like(grad) if weight is None else weight[label]
    full = grad * (1 - label_smoothing) * weights
    if focal:
        others, shares = _without(softmax, label)
        _, factor = _focal(*shares, -scores.log_softmax(1).gather(1, label)[:, 0], focal)
        full = full * factor[:, None] * torch.where(own, -shares[1][:, None], others)
    else:
        full = full * (softmax - own.to(softmax.dtype))
    if label_smoothing:
        of_class = scores.new_ones(classes) if weight is None else weight
        full += grad * label_smoothing / classes * (softmax * of_class.sum() - of_class[:, None, None])
    full = torch.where(valid[:, None], full, 0.0).masked_fill(wrong[:, None], float("nan"))
    return _collapsed(full, logits, align_corners)


def _collapsed(full: Tensor, logits: Tensor, align_corners: bool) -> Tensor:
    """Returns the gradient of the logits from that of the upsampled logits."""
    rows = matrix(logits.shape[2], full.shape[2], align_corners, full)
    columns = matrix(logits.shape[3], full.shape[3], align_corners, full)
    with without_autocast(full):
        return (rows.mT @ (full @ columns)).to(logits.dtype)


def _without(shares: Tensor, label: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the shares of classes with 0 for the label, and p and 1 − p of the label, both as accurate as shares."""
    own, others = shares.gather(1, label)[:, 0], shares.scatter(1, label, 0.0)
    rest = others.sum(1)
    return others, (own / (own + rest), rest / (own + rest))


def _focal(p: Tensor, rest: Tensor, own: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Returns the focal loss (1 − p)^γ·(−log p), and its gradient as a multiple of that of −log p.

    `rest` is 1 − p; `own` is −log p, but for rounding errors where p is close to 1. The derivative of the power alone,
    γ·(1 − p)^(γ − 1), is infinite at p = 1 for γ < 1; that of the product is not.
    """
    is_zero = rest == 0
    power = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, rest) ** gamma)
    own = torch.where(rest < 0.5, -torch.log1p(-rest.clamp(max=0.5)), own)
    ratio = torch.where(is_zero, 1.0, own / torch.where(is_zero, 1.0, rest))
    return power * own, power * (1 + gamma * torch.where(p == 0, 0.0, p * ratio))


def upsample_region_sums(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, sigmoid: bool, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Computes Σp, Σt, Σp·t and Σp² of every image and class, (4, B, K), and the number of labels out of range."""
    scores = upsampled(logits, target.shape[-2:], align_corners)
    own, weights, wrong = _regions(scores, target, weight, ignore_index)
    p = torch.where(weights != 0, scores.sigmoid() if sigmoid else scores.softmax(1), 0.0)
    t = torch.where(own | wrong, weights, 0.0)
    terms = (weights * p, t, t * p, weights * p * p)
    return torch.stack([term.sum((2, 3)) for term in terms]), wrong.sum()[None]


def upsample_region_sums_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    sigmoid: bool,
    align_corners: bool,
) -> Tensor:
    """Computes the gradient of logits from that of the sums, (4, B, K)."""
    scores = upsampled(logits, target.shape[-2:], align_corners)
    own, weights, _ = _regions(scores, target, weight, ignore_index)
    of_sum, _, of_overlap, of_square = grad[..., None, None]
    p = scores.sigmoid() if sigmoid else scores.softmax(1)
    slope = of_sum + torch.where(own, of_overlap, 0.0) + 2 * of_square * p
    if sigmoid:
        full = p * (1 - p) * slope
    else:  # relative to the slope of the largest logit's class: what is left is small if p is near 1
        slope = slope - slope.gather(1, scores.argmax(1, keepdim=True))
        full = p * (slope - (p * slope).sum(1, keepdim=True))
    full = torch.where(weights != 0, weights * full, 0.0)
    return _collapsed(full, logits, align_corners)


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return upsampled(logits, size, align_corners).argmax(1).to(label_dtype(logits.shape[1]))


def upsample_confusion(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Returns the counts (K, K), and the number of labels out of range."""
    classes = logits.shape[1]
    prediction = upsampled(logits, target.shape[1:], align_corners).argmax(1)
    label, valid, wrong = _labels(target, classes, ignore_index)
    cell = torch.where(valid, label[:, 0] * classes + prediction, classes * classes).flatten()
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=logits.device)
    counts = counts.scatter_add(0, cell, torch.ones_like(cell))
    return counts[:-1].unflatten(0, (classes, classes)), wrong.sum()[None]


def upsample_softmax(logits: Tensor, size: Sequence[int], flip: bool, align_corners: bool) -> Tensor:
    probabilities = upsampled(logits, size, align_corners).softmax(1)
    return probabilities.flip(3) if flip else probabilities


def label_dtype(classes: int) -> torch.dtype:
    """Returns the narrowest dtype that holds the labels of this many classes."""
    return torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32


def _labels(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns labels to index by (B, 1, H, W), 0 if invalid, and masks of valid and of out-of-range pixels."""
    given = target.long()
    inside = (given >= 0) & (given < classes)
    kept = given != ignore_index
    return torch.where(inside & kept, given, 0)[:, None], inside & kept, kept & ~inside


def _regions(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the region of each class (B, K, H, W), and the weights of pixels and masks of labels out of range.

    Weights and masks are (B, 1, H, W), or (B, K, H, W) of masks. Ignored pixels weigh 0, and wrong ones NaN.
    """
    if target.dim() == 4:
        label, valid, wrong = _labels(target, 2, ignore_index)
        label = label[:, 0]
        own = label == 1
    else:
        label, valid, wrong = _labels(target, scores.shape[1], ignore_index)
        valid, wrong = valid[:, None], wrong[:, None]
        own = torch.arange(scores.shape[1], device=scores.device)[:, None, None] == label
    weights = torch.ones_like(label, dtype=scores.dtype) if weight is None else weight[label]
    return own & valid, torch.where(valid, weights, 0.0).masked_fill(wrong, float("nan")), wrong
