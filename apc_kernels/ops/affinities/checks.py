"""Checks the arguments of the operations on affinities, and declares their kernels."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels, triton_version
from apc_kernels.ops.affinities import reference
from apc_kernels.ops.common import check_dtype, check_scales, check_small, check_tensor

MAX_SCALES, MAX_SCALE = 64, 32
MAX_GPU_SCALES, MAX_GPU_SCALE = 16, 8  # on a GPU the reference serves more or larger scales
MAX_CUDA_SCALE = 6  # beside bfloat16 and float16 maps; Triton serves scales of 7 and 8


def _triton() -> ModuleType:
    from apc_kernels.ops.affinities import triton

    return triton


KERNELS = Kernels(reference, triton=_triton, cuda=True)


def limits(x: Tensor, scales: Sequence[int]) -> dict[str, str]:
    """Returns the reasons why GPU kernels cannot take a call, by backend."""
    if max(scales) <= MAX_GPU_SCALE and len(scales) <= MAX_GPU_SCALES and x.shape[2] * x.shape[3] < 2**30:
        if x.dtype == torch.float32 or max(scales) <= MAX_CUDA_SCALE:
            return {}
        dtype = str(x.dtype).removeprefix("torch.")
        return {
            "cuda": f"its kernels take scales of up to {MAX_CUDA_SCALE} beside {dtype}; the scales are {tuple(scales)}"
        }
    reason = (
        f"the kernels take up to {MAX_GPU_SCALES} scales of up to {MAX_GPU_SCALE} and 2^30 positions; the scales are "
        f"{tuple(scales)}, the map is {tuple(x.shape)}"
    )
    return {"triton": reason, "cuda": reason}


def wide_limits(x: Tensor, scales: Sequence[int]) -> dict[str, str]:
    """Returns the same of kernels with float64 products."""
    if torch.version.hip and triton_version() < (3, 8):
        return {"triton": "Triton older than 3.8 has no float64 products on AMD GPUs", **limits(x, scales)}
    return limits(x, scales)


def check_affinities(x: Tensor, weight: Tensor, scales: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Checks a map and the 1×1 convolutions on it; returns weight and scales as kernels take them."""
    check_tensor(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (B, S·C, h, w), got {x.dim()}: {tuple(x.shape)}")
    check_dtype(x, "x")
    scales = check_scales(scales, MAX_SCALES, MAX_SCALE)
    if x.shape[1] == 0 or x.shape[1] % len(scales) != 0:
        expected = f"a multiple of {len(scales)} channels, a block for each scale"
        raise ValueError(f"x: expected {expected}, got {x.shape[1]}: {tuple(x.shape)}")
    if not (1 <= x.shape[2] * x.shape[3] < 2**31):
        raise ValueError(f"x: expected 1 to {2**31 - 1} positions, got {tuple(x.shape)}")
    rows = sum(s * s for s in scales)
    return check_small(weight, "weight", [(rows, x.shape[1] // len(scales))], x), scales


def check_for_images(tensor: Tensor, name: str, size: int, x: Tensor) -> Tensor:
    """Checks numbers that are given once or for each image; returns them as (B, size)."""
    return check_small(tensor, name, [(size,), (x.shape[0], size)], x).expand(x.shape[0], size)
