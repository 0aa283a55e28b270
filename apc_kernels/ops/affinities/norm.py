"""Implements adaptive_context_norm: APCNet's adaptive context with its guide, residual convolution and batch norms.

Training is one node (norm_node.py) and evaluation without gradients a few kernels (norm_evaluation.py). All other calls
are a composition under autograd (composition.py), which is also the specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.affinities import composition
from apc_kernels.ops.affinities.algebra import BatchNorm, Statistics
from apc_kernels.ops.affinities.checks import check_affinities
from apc_kernels.ops.affinities.norm_evaluation import evaluate
from apc_kernels.ops.affinities.norm_node import one_node
from apc_kernels.ops.autograd import under_transforms
from apc_kernels.ops.common import check_flag, check_small, only_computes


def adaptive_context_norm(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: BatchNorm,
    *,
    guide: Tensor | None = None,
    guide_norm: BatchNorm | None = None,
    training: bool = True,
    group: str = "",
) -> Tensor:
    """Computes APCNet's adaptive context modules of all scales, with their global guide and batch norms.

        g = relu(guide_norm(mean(x)·guideᵀ))                one vector for each image and scale
        A = sigmoid((x + g)·weightᵀ + bias)                 (N, s²) for each scale s
        z = relu(norm(A·regions·projectionᵀ)) + x           (N, C)

    Equivalent to, for one scale:

        batch_norm = lambda v, n: F.batch_norm(v, n[2], n[3], n[0], n[1], training, n.momentum, n.eps)
        g = batch_norm(x.mean((2, 3)) @ guide.mT, guide_norm).relu()[:, :, None, None]
        affinities = torch.sigmoid(F.conv2d(x + g, weight[:, :, None, None], bias)).flatten(2)    # (B, s², N)
        z = (projection @ regions.mT @ affinities).view(x.shape)
        batch_norm(z, norm).relu() + x

    Neither x + g nor A nor A·regions is ever stored, and x is the only map that is saved: g becomes a bias of J numbers
    for each image, the projection acts on the J region vectors, and the statistics of the batch norm follow from the
    mean and covariance of A (affinity_moments). Training is one autograd node. Its backward reads x and dz, reduces the
    gradients of the region vectors, takes them through the batch norm, reads x and dz again and writes dx once. Forward
    reads or writes 4 maps, backward 5.

    Args:
        x, regions, weight, bias, scales: as in adaptive_context, with bias (J,). x is the output of a ReLU. The last
            ReLU of the module acts on a sum that cannot be negative, and is left out. (It would stop the gradient where
            the sum is 0; so does the ReLU that x came from.) regions are the pooled and reduced features.
        projection: (S·C, C), the residual convolutions of all scales.
        norm: the batch norm after the projection.
        guide, guide_norm: (S·C, C), the global convolutions of all scales, and the batch norm after them; both or
            neither.
        training: normalises by the statistics of this batch, and moves the running statistics towards them, in place;
            otherwise the operation normalises by the running statistics.
        group: the name of the process group that shares batch statistics, or "" for this process alone.

    The tensors other than x are float32 (float64 if x is float64), as in adaptive_context. Running statistics are
    updated in place: copy them back if they are a concatenation. With a group, every rank calls forward and backward,
    and gets its own share of the gradients.

    Returns:
        z, (B, S·C, h, w), with x's dtype and the strides of torch.empty_like(x).

    The operation is differentiable once, with respect to all tensors but the running statistics. Results are the same
    bits from run to run with the same number of threads (the mean of x is PyTorch's own).

    If a scale has more regions than channels, and more than 64, its covariance costs more than the products it
    describes. Training then forms A·regions·projectionᵀ, takes its statistics, and saves three maps.
    """
    weight, scales = check_affinities(x, weight, scales)
    rows, channels = weight.shape
    bias = check_small(bias, "bias", [(rows,)], x)
    regions = check_small(regions, "regions", [(x.shape[0], rows, channels)], x)
    projection = check_small(projection, "projection", [(x.shape[1], channels)], x)
    check_flag(training, "training")
    if not isinstance(group, str):
        raise TypeError(f"group: expected the name of a process group (its group_name), got {type(group).__name__}")
    if (guide is None) != (guide_norm is None):
        raise ValueError("guide: expected guide and guide_norm, or neither of them")
    images = x.shape[0] if training and not group else 2  # other processes may hold more images
    norm = _check_norm(norm, "norm", x, values=images * x.shape[2] * x.shape[3])
    if guide is not None and guide_norm is not None:
        guide = check_small(guide, "guide", [(x.shape[1], channels)], x)
        guide_norm = _check_norm(guide_norm, "guide_norm", x, values=images)

    if training and under_transforms():
        raise RuntimeError("adaptive_context_norm: training updates running statistics in place, not under torch.func")

    tensors = (x, regions, weight, bias, projection, *norm[:4], guide, *(guide_norm or ())[:4])
    if not training and only_computes(*tensors):
        return evaluate(x, regions, weight, bias, scales, projection, norm, guide, guide_norm)

    composed = not training or torch.compiler.is_exporting() or composition.forms_products(scales, channels)
    path = composition.adaptive_context_norm if composed else one_node
    arguments = (x, regions, weight, bias, scales, projection, norm, guide, guide_norm, training, group)
    z, statistics, guide_statistics, *_ = path(*arguments)
    if training:
        _update(norm, statistics)
        if guide_norm is not None and guide_statistics is not None:
            _update(guide_norm, guide_statistics)
    return z


def _check_norm(norm: BatchNorm, name: str, x: Tensor, values: int) -> BatchNorm:
    if not isinstance(norm, tuple) or len(norm) != len(BatchNorm._fields):
        raise TypeError(f"{name}: expected an apc_kernels.BatchNorm, got {type(norm).__name__}")
    *tensors, momentum, eps = norm
    for field, number in (("momentum", momentum), ("eps", eps)):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name}.{field}: expected a number, got {number!r}")
    if values < 2:
        raise ValueError(f"{name}: expected more than one value per channel in training, got a map of {tuple(x.shape)}")
    shapes = [(x.shape[1],)]
    weight, bias, mean, variance = (
        check_small(tensor, f"{name}.{field}", shapes, x)
        for field, tensor in zip(BatchNorm._fields[:4], tensors, strict=True)
    )
    if mean is not norm[2] or variance is not norm[3]:  # an update of a widened copy would be lost
        raise ValueError(f"{name}: expected running statistics in {mean.dtype}, got {norm[2].dtype}")
    return BatchNorm(weight, bias, mean, variance, momentum, eps)


def _update(norm: BatchNorm, batch: Statistics) -> None:
    """Updates running statistics as torch.nn.BatchNorm does: the variance by its unbiased estimate."""
    with torch.no_grad():
        count = batch.count
        dtype = norm.running_mean.dtype
        others = count - 1 if isinstance(count, int) else (count - 1).clamp_min(1)  # 0, not NaN, for one in a group
        norm.running_mean.lerp_(batch.mean.to(dtype), norm.momentum)
        norm.running_var.lerp_((batch.variance * (count / others)).to(dtype), norm.momentum)
