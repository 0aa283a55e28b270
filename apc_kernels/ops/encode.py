"""encode: EncNet's residual encoding, without the (B, N, K, C) tensor of residuals."""

import torch
from torch import Tensor

from apc_kernels.ops.common import check_dtype, check_small, check_tensor, without_autocast, working


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Sums, for every codeword, what is left of each position's features beside it.

        a[i, k] = softmax_k(scale[k] · ‖x[i] − codewords[k]‖²)
        out[k] = Σ_i a[i, k] · (x[i] − codewords[k])

    Squares and sums are multiplied out, so that all of it is matrix products of x. Features and codewords are first
    taken relative to the mean codeword: far from the origin the products would otherwise cancel.

    Args:
        x: (B, C, h, w) or (B, C, N), float32, bfloat16, float16 or float64, of any strides.
        codewords: (K, C), float32 (float64 beside float64 maps).
        scale: (K,), of the same dtype.

    Returns:
        (B, K, C) in the dtype of codewords. Saves x and two numbers for each position and codeword. Differentiable
        once, with respect to all three; computes in float32 (float64) under autocast too; the same under torch.compile
        and torch.export. With more than 80 codewords the error of x's gradient can be 1.2 times what is allowed
        elsewhere, twice PyTorch's own and four units in the last place.
    """
    _check(x, codewords)
    codewords = check_small(codewords, "codewords", [(codewords.shape[0], x.shape[1])], x)
    scale = check_small(scale, "scale", [(codewords.shape[0],)], x)
    return _Encode.apply(x, codewords, scale)


class _Encode(torch.autograd.Function):
    """For its backward: PyTorch's own would go over the features for every term of the distances."""

    @staticmethod
    def forward(ctx, x, codewords, scale):
        with without_autocast(x):
            features, words = _centered(x, codewords)
            squares = features.square().sum(1, keepdim=True) + words.square().sum(1)[:, None]
            distances = torch.baddbmm(squares, words.expand(x.shape[0], -1, -1), features, alpha=-2)  # (B, K, N)
            weights = (scale[:, None] * distances).softmax(1)
            ctx.save_for_backward(x, codewords, scale, distances, weights)
            return (features @ weights.mT).mT - weights.sum(2)[..., None] * words

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, codewords, scale, distances, weights = ctx.saved_tensors
        with without_autocast(x):
            features, words = _centered(x, codewords)
            grad_weights = grad @ features - (grad * words).sum(2)[..., None]
            through_softmax = weights * (grad_weights - (weights * grad_weights).sum(1, keepdim=True))
            grad_distances = scale[:, None] * through_softmax
            # Two of the three terms of the features' gradient are one product. It sums in order, so the smaller term is
            # first: what is added to a large sum is rounded to it. The other way round the error is twice as large.
            left = torch.cat([-2 * words.expand(x.shape[0], -1, -1), grad], 1)  # (B, 2K, C)
            right = torch.cat([grad_distances, weights], 1)  # (B, 2K, N)
            by_channel = features.stride(1) == 1
            grad_x = (right.mT @ left).mT if by_channel else left.mT @ right
            grad_x.addcmul_(grad_distances.sum(1, keepdim=True), features, value=2)
            grad_words = 2 * (grad_distances.sum(2)[..., None] * words - grad_distances @ features.mT)
            grad_words -= weights.sum(2)[..., None] * grad
            grad_scale = (through_softmax * distances).sum((0, 2))
            return grad_x.view(x.shape).to(x.dtype), grad_words.sum(0), grad_scale


def _centered(x: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, C, N) and codewords (K, C) relative to the mean codeword."""
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
