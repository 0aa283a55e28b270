"""Writes the operations in plain PyTorch as people do today: the baseline of the tests' errors and of the speeds."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid_pool(x: Tensor, scales: Sequence[int]) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(x, s).flatten(2) for s in scales], 2)


def affinities(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Computes the affinities of each scale, (B, N, s*s) in x's dtype."""
    result, row, channels = [], 0, x.shape[1] // len(scales)
    for i, s in enumerate(scales):
        rows, row = slice(row, row + s * s), row + s * s
        block = x[:, i * channels : (i + 1) * channels]
        logits = F.conv2d(block, weight[rows, :, None, None].to(x.dtype)) + bias[..., rows, None, None].to(x.dtype)
        result.append(torch.sigmoid(logits).flatten(2).mT)
    return result


def adaptive_context(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None = None,
    residual: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    row, result = 0, []
    for i, affinity in enumerate(affinities(x, weight, bias, scales)):
        channels = slice(i * regions.shape[2], (i + 1) * regions.shape[2])
        rows, row = slice(row, row + affinity.shape[2]), row + affinity.shape[2]
        if center is not None:
            affinity = affinity - center[:, None, rows].to(x.dtype)
        z = (affinity @ regions[:, rows].to(x.dtype)).mT.unflatten(2, x.shape[2:])
        if shift is not None:
            z = F.relu(z + shift[..., channels, None, None].to(x.dtype))
        result.append(z + x[:, channels] if residual else z)
    return torch.cat(result, 1)


def affinity_moments(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Computes the moments in float32 at least, because nobody takes them in less."""
    means, covariances = [], []
    for affinity in affinities(x, weight, bias, scales):
        affinity = affinity if affinity.dtype == torch.float64 else affinity.float()
        means.append(affinity.mean(1))
        centered = affinity - means[-1][:, None]
        covariances.append(centered.mT @ centered / affinity.shape[1])
    return torch.cat(means, 1), covariances


def adaptive_context_norm(
    xs: Sequence[Tensor],
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: tuple,
    guide: Tensor | None = None,
    guide_norm: tuple | None = None,
    training: bool = True,
) -> list[Tensor]:
    """Runs mmsegmentation's module of every scale, from its reduced features on; xs and the result are by scale."""
    result = []
    for i, (x, rows) in enumerate(zip(xs, _split(regions, 1, scales), strict=True)):
        here = slice(i * x.shape[1], (i + 1) * x.shape[1])
        w, b = _split(weight, 0, scales)[i], _split(bias, 0, scales)[i]
        guided = x
        if guide is not None:
            g = _batch_norm(
                F.conv2d(F.adaptive_avg_pool2d(x, 1), guide[here, :, None, None]), guide_norm, here, training
            )
            guided = x + F.relu(g)
        affinity = torch.sigmoid(F.conv2d(guided, w[:, :, None, None], b).flatten(2).mT)
        z = torch.matmul(affinity, rows).permute(0, 2, 1).contiguous().view(x.shape)
        z = F.relu(_batch_norm(F.conv2d(z, projection[here, :, None, None]), norm, here, training))
        result.append(F.relu(z + x))
    return result


def adaptive_context_norm_by_identities(
    xs: Sequence[Tensor],
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: tuple,
    guide: Tensor,
    guide_norm: tuple,
) -> list[Tensor]:
    """Computes the same in training by DESIGN's identities 1 to 3, to show what is left for a kernel to gain."""
    result = []
    for i, (x, rows) in enumerate(zip(xs, _split(regions, 1, scales), strict=True)):
        here = slice(i * x.shape[1], (i + 1) * x.shape[1])
        w, b = _split(weight, 0, scales)[i], _split(bias, 0, scales)[i]
        features = x.mean((2, 3)) @ guide[here].mT
        g = F.relu(_batch_norm(features, guide_norm, here, True))
        biases = b + g @ w.mT
        affinity = torch.sigmoid(w @ x.flatten(2) + biases[..., None])  # (B, s*s, N)
        vectors = rows.double() @ projection[here].double().mT
        mean = affinity.mean(2, keepdim=True)
        covariance = ((affinity - mean) @ (affinity - mean).mT / affinity.shape[2]).double()
        means = (vectors * mean.double()).sum(1)
        variance = ((vectors * (covariance @ vectors)).sum(1) + (means - means.mean(0)).square()).mean(0)
        factor = norm[0][here] * (variance + norm[5]).rsqrt()
        shift = norm[1][here] - means.mean(0) * factor
        z = F.relu((vectors * factor).to(x.dtype).mT @ affinity + shift.to(x.dtype)[:, None])
        result.append((z + x.flatten(2)).view(x.shape))
    return result


def _split(tensor: Tensor, dim: int, scales: Sequence[int]) -> Sequence[Tensor]:
    return tensor.split([s * s for s in scales], dim)


def _batch_norm(x: Tensor, norm: tuple, here: slice, training: bool) -> Tensor:
    weight, bias, mean, variance = (t[here] for t in norm[:4])
    return F.batch_norm(x, mean, variance, weight, bias, training, norm[4], norm[5])


def upsampled(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    focal: float | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Computes in the dtype of the logits, then widens to float32, in which losses are compared."""
    scores = upsampled(logits, target.shape[1:], align_corners)
    if focal:
        loss = focal_loss(scores, target, weight, ignore_index, focal, reduction)
        return loss if loss.dtype == torch.float64 else loss.float()
    loss = F.cross_entropy(
        scores,
        target.long(),
        None if weight is None else weight.to(scores.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if reduction == "mean_all" else reduction,
    )
    loss = loss.mean() if reduction == "mean_all" else loss
    return loss if loss.dtype == torch.float64 else loss.float()


def upsample_binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    focal: float | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Computes the loss of masks (B, C, H, W), or (B, H, W), in the dtype of the logits, then widens it."""
    target = target if target.dim() == 4 else target[:, None]
    z, valid = upsampled(logits, target.shape[2:], align_corners), target != 255
    y = (1 - label_smoothing) * (target == 1).to(z.dtype) + label_smoothing / 2
    weight = torch.as_tensor(pos_weight).to(z)
    weight = weight[:, None, None] if weight.dim() else weight
    losses = F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="none")
    if focal:
        losses = losses * (1 - torch.where(target == 1, z.sigmoid(), 1 - z.sigmoid())) ** focal
    losses = torch.where(valid, losses, 0)
    losses = losses if losses.dtype == torch.float64 else losses.float()
    if reduction == "none":
        return losses
    return losses.sum() / {"mean": valid.sum(), "mean_all": valid.numel(), "sum": 1}[reduction]


def focal_loss(
    scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, gamma: float, reduction: str
) -> Tensor:
    """Computes the focal loss as it is usually written, from the cross entropy of every pixel."""
    plain = F.cross_entropy(scores, target.long(), ignore_index=ignore_index, reduction="none")
    valid = target != ignore_index
    factor = torch.where(valid, (1 - torch.exp(-plain)) ** gamma, 0)
    weights = valid.to(plain.dtype)
    if weight is not None:
        weights = weights * weight.to(plain.dtype)[target.long().where(valid, 0)]
    losses = factor * weights * plain
    if reduction == "none":
        return losses
    return losses.sum() / {"mean": weights.sum(), "mean_all": target.numel(), "sum": 1}[reduction]


def upsample_region_sums(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    sigmoid: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Computes Σp, Σt, Σp·t and Σp² in the dtype of the logits, then widens them to float32."""
    scores = upsampled(logits, target.shape[-2:], align_corners)
    target = target.long()  # a comparison in a narrow dtype would wrap ignore_index
    valid = (target if target.dim() == 4 else target[:, None]) != ignore_index
    if target.dim() == 4:
        t = target == 1
    else:
        t = F.one_hot(torch.where(valid[:, 0], target, 0), scores.shape[1]).movedim(3, 1)
    weights = valid.to(scores.dtype)
    if weight is not None:
        weights = weights * weight.to(scores.dtype)[torch.where(valid, target[:, None], 0)]
    p = scores.sigmoid() if sigmoid else scores.softmax(1)
    sums = torch.stack([(weights * term).sum((2, 3)) for term in (p, t, p * t, p * p)])
    return sums if sums.dtype == torch.float64 else sums.float()


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Computes the Dice loss of full-size logits as segmentation_models_pytorch 0.6.0 does, operator by operator."""
    images, classes = logits.shape[:2]
    p = logits.log_softmax(1).exp().reshape(images, classes, -1)
    valid = (label := target.reshape(images, -1)) != 255
    p = p * valid[:, None]
    t = F.one_hot((label * valid).long(), classes).permute(0, 2, 1) * valid[:, None]
    t = t.type_as(p)
    p_sum, t_sum = p.sum((0, 2)), t.sum((0, 2))
    overlap = (p_sum + t_sum - torch.linalg.vector_norm(p - t, ord=1, dim=(0, 2))) / 2
    below = overlap + 0.5 * (p_sum - overlap) + 0.5 * (t_sum - overlap)
    return ((1 - overlap / below.clamp_min(1e-7)) * (t_sum > 0)).mean()


def cross_entropy_and_dice(logits: Tensor, target: Tensor) -> Tensor:
    scores = upsampled(logits, target.shape[1:])
    loss = F.cross_entropy(scores, target.long(), ignore_index=255) + dice(scores, target)
    return loss if loss.dtype == torch.float64 else loss.float()


def upsample_argmax(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    return upsampled(logits, size, align_corners).argmax(1)


def upsample_confusion(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    prediction = upsample_argmax(logits, target.shape[1:], align_corners=align_corners)
    return confusion(prediction, target, logits.shape[1], ignore_index)


def confusion(prediction: Tensor, target: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    kept = target != ignore_index
    cells = target[kept].long() * classes + prediction[kept].long()
    return cells.bincount(minlength=classes * classes).view(classes, classes)


def upsample_softmax(
    logits: Tensor, size: Sequence[int], *, flip: bool = False, align_corners: bool = False, out: Tensor | None = None
) -> Tensor:
    probabilities = upsampled(logits, size, align_corners).softmax(1)
    probabilities = probabilities.flip(3) if flip else probabilities
    return out.add_(probabilities) if out is not None else probabilities


def upsampled_pyramid(
    regions: Tensor, size: Sequence[int], scales: Sequence[int], align_corners: bool = False
) -> Tensor:
    maps = [vectors.unflatten(2, (s, s)) for s, vectors in zip(scales, _split(regions, 2, scales), strict=True)]
    return torch.cat([upsampled(pooled, size, align_corners) for pooled in maps], 1)


def pyramid_conv(
    regions: Tensor, weight: Tensor, size: Sequence[int], scales: Sequence[int], align_corners: bool = False
) -> Tensor:
    return F.conv2d(upsampled_pyramid(regions, size, scales, align_corners), weight, padding=weight.shape[2] // 2)


def pyramid_reduce(regions: Tensor, weights: Sequence[Tensor], norms: Sequence, scales: Sequence[int], training: bool):
    """Computes a convolution, a batch norm and a ReLU for each scale, as modules do."""
    reduced = []
    for part, weight, norm in zip(_split(regions, 2, scales), weights, norms, strict=True):
        product = F.conv2d(part.unsqueeze(3), weight)
        statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
        reduced.append(F.relu(F.batch_norm(product, *statistics, *affine, training, norm.momentum, norm.eps)))
    return torch.cat(reduced, 2).squeeze(3)


def conv3x3(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    return F.conv2d(maps[0] if len(maps) == 1 else torch.cat(list(maps), 1), weight, padding=1)


def conv1x1(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    return F.conv2d(maps[0] if len(maps) == 1 else torch.cat(list(maps), 1), weight)


def pyramid_bottleneck(features: Tensor, regions: Tensor, weight: Tensor, scales: Sequence[int]) -> Tensor:
    """Computes PSPNet's bottleneck: a convolution of features beside their upsampled pyramid."""
    maps = torch.cat([features, upsampled_pyramid(regions, features.shape[2:], scales)], 1)
    return F.conv2d(maps, weight, padding=weight.shape[2] // 2)


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Computes EncNet's encoding as its peers do: residuals of every position and codeword, in the widest dtype."""
    residuals = x.flatten(2).mT.contiguous()[:, :, None].to(codewords.dtype) - codewords  # (B, N, K, C)
    weights = (scale * residuals.square().sum(3)).softmax(2)
    return (weights[..., None] * residuals).sum(1)
