"""Draws small arguments for every operation, with every option that its docstring's lines have."""

import torch

from apc_kernels import BatchNorm


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def batch_norm(channels: int) -> BatchNorm:
    return BatchNorm(drawn(channels), drawn(channels), drawn(channels), drawn(channels).square() + 0.5)


def arguments(operation: str) -> dict:
    """Returns arguments of an operation, with every option that its lines have."""
    torch.manual_seed(0)
    one_scale = {"x": drawn(2, 5, 6, 7), "weight": drawn(9, 5), "bias": drawn(9), "scales": (3,)}
    single = torch.float32  # the lines on logits widen them to it
    logits = {"logits": drawn(2, 4, 5, 6, dtype=single), "align_corners": True}
    target = {"target": torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, (2, 11, 9))], "ignore_index": 255}
    return {
        "adaptive_context": one_scale
        | {"regions": drawn(2, 9, 5), "shift": drawn(5), "residual": True, "center": drawn(2, 9)},
        "adaptive_context_norm": one_scale
        | {"x": drawn(2, 5, 6, 7).relu(), "regions": drawn(2, 9, 5), "projection": drawn(5, 5), "training": True}
        | {"norm": batch_norm(5), "guide": drawn(5, 5), "guide_norm": batch_norm(5)},
        "affinity_moments": one_scale,
        "conv1x1": {"maps": [drawn(2, 3, 6, 7), drawn(2, 4, 6, 7)], "weight": drawn(5, 7, 1, 1)},
        "conv3x3": {"maps": [drawn(2, 3, 6, 7), drawn(2, 4, 6, 7)], "weight": drawn(5, 7, 3, 3), "dilation": 2},
        "encode": {"x": drawn(2, 5, 6, 7), "codewords": drawn(3, 5), "scale": drawn(3)},
        "pyramid_conv": {"regions": drawn(2, 3, 14), "weight": drawn(4, 9, 3, 3), "size": (6, 7), "scales": (1, 2, 3)}
        | {"align_corners": True},
        "pyramid_reduce": {"regions": drawn(2, 5, 14), "scales": (1, 2, 3), "training": True}
        | {"weights": [drawn(4, 5, 1, 1) for _ in range(3)], "norms": [batch_norm(4) for _ in range(3)]},
        "pyramid_pool": {"x": drawn(2, 5, 6, 7), "scales": (1, 2, 4)},
        "upsample_argmax": logits | {"size": (11, 9)},
        "upsample_binary_cross_entropy": {"logits": logits["logits"], "ignore_index": 255}
        | {"target": torch.tensor([0, 1, 255])[torch.randint(3, (2, 4, 11, 9))], "pos_weight": torch.tensor([1.7])},
        "upsample_confusion": logits | target,
        "upsample_cross_entropy": logits | target | {"weight": drawn(4, dtype=single).square(), "label_smoothing": 0.1},
        "upsample_region_sums": logits | target | {"weight": drawn(4, dtype=single).square(), "squares": True},
        "upsample_softmax": logits | {"size": (11, 9), "flip": True, "out": drawn(2, 4, 11, 9, dtype=single)},
    }[operation]
