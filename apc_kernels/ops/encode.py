"""Implements encode: EncNet's residual encoding, without the (B, N, K, C) tensor of residuals."""

import math
from typing import Any

import torch
from torch import Tensor

from apc_kernels.ops.common import check_dtype, check_small, check_tensor, without_autocast, working
from apc_kernels.ops.operator import define


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Sums, for every codeword, the softly assigned residuals of all positions.

        a[i, k] = softmax_k(scale[k] · ‖x[i] − codewords[k]‖²)
        out[k] = Σ_i a[i, k] · (x[i] − codewords[k])

    Equivalent to:

        residuals = x.flatten(2).mT[:, :, None] - codewords    # (B, N, K, C)
        a = (scale * residuals.square().sum(3)).softmax(2)    # (B, N, K)
        (a[..., None] * residuals).sum(1)

    The (B, N, K, C) tensor of residuals is never stored: the squares and sums are multiplied out into matrix products
    of x. Features and codewords are taken relative to the mean codeword, so that nothing cancels far from the origin.

    Args:
        x: (B, C, h, w) or (B, C, N), float32, bfloat16, float16 or float64, of any strides.
        codewords: (K, C), float32 (float64 if x is float64).
        scale: (K,), of the same dtype.

    Returns:
        (B, K, C) in the dtype of codewords.

    Saved for backward are x and two numbers for each position and codeword. The operation is differentiable once, with
    respect to all three tensors. It computes in float32 (float64), under autocast too, and every backend is PyTorch's
    matrix products, also under torch.compile and torch.export. With more than 80 codewords the error of x's gradient
    can exceed the other operations' bound (twice PyTorch's own error and four units in the last place) by a fifth.
    """
    _check(x, codewords)
    codewords = check_small(codewords, "codewords", [(codewords.shape[0], x.shape[1])], x)
    scale = check_small(scale, "scale", [(codewords.shape[0],)], x)
    compute = _compute if torch.compiler.is_exporting() else _forward
    encoded, *_ = compute(x, codewords, scale)
    return encoded


def _compute(x: Tensor, codewords: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the encoding, and for its backward the distances and weights of all positions, (B, K, N)."""
    with without_autocast(x):
        features, words = _centered(x, codewords)
        squares = features.square().sum(1, keepdim=True) + words.square().sum(1)[:, None]
        distances = torch.baddbmm(squares, words.expand(x.shape[0], -1, -1), features, alpha=-2)
        weights = (scale[:, None] * distances).softmax(1)
        return (features @ weights.mT).mT - weights.sum(2)[..., None] * words, distances, weights


def _empty(x: Tensor, codewords: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels, *size), words = x.shape, codewords.shape[0]
    distances = codewords.new_empty(batch, words, math.prod(size))
    return codewords.new_empty(batch, channels, words).mT, distances, torch.empty_like(distances)


def _compute_gradients(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, distances: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of all three; PyTorch's own would read the features again for every term."""
    with without_autocast(x):
        features, words = _centered(x, codewords)
        grad_weights = grad @ features - (grad * words).sum(2)[..., None]
        through_softmax = weights * (grad_weights - (weights * grad_weights).sum(1, keepdim=True))
        grad_distances = scale[:, None] * through_softmax
        # Two of the three terms of the features' gradient are one product. It sums in order, and a number that is
        # added to a large sum is rounded to it: with the smaller term first the error is half as large.
        left = torch.cat([-2 * words.expand(x.shape[0], -1, -1), grad], 1)  # (B, 2K, C)
        right = torch.cat([grad_distances, weights], 1)  # (B, 2K, N)
        grad_x = (right.mT @ left).mT if _by_channel(x) else left.mT @ right
        grad_x.addcmul_(grad_distances.sum(1, keepdim=True), features, value=2)
        grad_words = 2 * (grad_distances.sum(2)[..., None] * words - grad_distances @ features.mT)
        grad_words -= weights.sum(2)[..., None] * grad
        grad_scale = (through_softmax * distances).sum((0, 2))
        return grad_x.view(x.shape).to(x.dtype), grad_words.sum(0), grad_scale


def _empty_gradients(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, *size = x.shape
    grad_x = x.new_empty(batch, math.prod(size), channels).mT if _by_channel(x) else x.new_empty(*x.shape)
    return grad_x.view(x.shape), codewords.new_empty(codewords.shape), scale.new_empty(scale.shape)


def _by_channel(x: Tensor) -> bool:
    return x.flatten(2).stride(1) == 1


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _through(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if grad is None else _backward(grad, *ctx.saved_tensors)


_backward = define(
    "encode_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale, Tensor distances, Tensor weights) "
    "-> (Tensor, Tensor, Tensor)",
    _compute_gradients,
    _empty_gradients,
)
_forward = define(
    "encode(Tensor x, Tensor codewords, Tensor scale) -> (Tensor, Tensor, Tensor)",
    _compute,
    _empty,
    backward=_through,
    remember=_remember,
)


def _centered(x: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Returns features (B, C, N) and codewords (K, C) relative to the mean codeword."""
    center = codewords.mean(0)
    return working(x).flatten(2) - center[:, None], codewords - center


def _check(x: Tensor, codewords: Tensor) -> None:
    check_tensor(x, "x")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected (B, C, h, w) or (B, C, N), got {tuple(x.shape)}")
    check_dtype(x, "x")
    check_tensor(codewords, "codewords")
    if codewords.dim() != 2 or codewords.shape[1] != x.shape[1] or codewords.shape[0] == 0:
        raise ValueError(f"codewords: expected (K, {x.shape[1]}) for these features, got {tuple(codewords.shape)}")
