"""Computes pyramid_pool in plain PyTorch, by two small matrix products for each scale, P_h · x · P_wᵀ.

This is the specification, and the code of exported models: stock operators only, sizes may be symbolic. The products
turn an infinity into NaN in the other bins of its row and column (infinity · 0).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.common import without_autocast, working, working_dtype


def pyramid_pool(x: Tensor, scales: Sequence[int]) -> Tensor:
    with without_autocast(x):
        work, pooled = working(x), []
        for s in scales:
            columns = work @ averaging(x.shape[3], s, x).mT  # (B, C, h, s)
            pooled.append((columns.mT @ averaging(x.shape[2], s, x).mT).mT.flatten(2))  # (B, C, s*s)
        return torch.cat(pooled, 2).to(x.dtype)


def pyramid_pool_backward(grad: Tensor, scales: Sequence[int], size: Sequence[int]) -> Tensor:
    with without_autocast(grad):
        work = working(grad)
        grad_x = work.new_zeros(size)
        for s, pooled in zip(scales, work.split([s * s for s in scales], 2), strict=True):
            columns = pooled.unflatten(2, (s, s)).mT @ averaging(size[2], s, grad)  # (B, C, s, h)
            grad_x += columns.mT @ averaging(size[3], s, grad)
        return grad_x.to(grad.dtype)


def averaging(size: int, s: int, like: Tensor) -> Tensor:
    """Returns the (s, size) matrix that averages over bins: bin i covers [floor(i*size/s), ceil((i+1)*size/s))."""
    i = torch.arange(s, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    begin, end = i * size // s, ((i + 1) * size + s - 1) // s
    inside = (position >= begin) & (position < end)
    return inside / (end - begin).to(working_dtype(like))
