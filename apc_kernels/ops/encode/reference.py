"""Computes encode and its gradients in plain PyTorch, by matrix products of x.

Features and codewords are taken relative to the mean codeword, so that nothing cancels far from the origin.
"""

import torch
from torch import Tensor

from apc_kernels.ops.common import without_autocast, working


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the encoding, and for its backward the distances and weights of all positions, (B, K, N)."""
    with without_autocast(x):
        features, words = _centered(x, codewords)
        squares = features.square().sum(1, keepdim=True) + words.square().sum(1)[:, None]
        distances = torch.baddbmm(squares, words.expand(x.shape[0], -1, -1), features, alpha=-2)
        weights = (scale[:, None] * distances).softmax(1)
        return (features @ weights.mT).mT - weights.sum(2)[..., None] * words, distances, weights


def encode_backward(
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
        grad_x = (right.mT @ left).mT if by_channel(x) else left.mT @ right
        grad_x.addcmul_(grad_distances.sum(1, keepdim=True), features, value=2)
        grad_words = 2 * (grad_distances.sum(2)[..., None] * words - grad_distances @ features.mT)
        grad_words -= weights.sum(2)[..., None] * grad
        grad_scale = (through_softmax * distances).sum((0, 2))
        return grad_x.view(x.shape).to(x.dtype), grad_words.sum(0), grad_scale


def by_channel(x: Tensor) -> bool:
    """Tells whether the channels of a map are adjacent."""
    return x.flatten(2).stride(1) == 1


def _centered(x: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Returns features (B, C, N) and codewords (K, C) relative to the mean codeword."""
    center = codewords.mean(0)
    return working(x).flatten(2) - center[:, None], codewords - center
