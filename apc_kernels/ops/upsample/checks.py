"""Checks the arguments of the upsample_* operations, and declares their kernels."""

import operator
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.common import check_dtype, name_of
from apc_kernels.ops.interpolation import MAX_SIZE, check_extent
from apc_kernels.ops.upsample import reference

MAX_GPU_POSITION = 2**30  # twice the source's size times the result's, along an axis
MAX_GPU_ROWS, MAX_GPU_LOGITS = 2**31, 2**40  # source rows times result columns, and all logits: grids are no larger
LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _triton() -> ModuleType:
    from apc_kernels.ops.upsample import triton

    return triton


KERNELS = Kernels(reference, triton=_triton)


def check_logits(logits: Tensor) -> None:
    if logits.dim() != 4:
        raise ValueError(f"logits: expected 4 dimensions (B, K, h, w), got {logits.dim()}: {tuple(logits.shape)}")
    check_dtype(logits, "logits")
    check_extent(logits.shape[2:], "logits", logits.shape)
    if not 1 <= logits.shape[1] < MAX_SIZE:
        raise ValueError(f"logits: expected 1 to {MAX_SIZE - 1} classes, got {tuple(logits.shape)}")


def check_target(target: Tensor, logits: Tensor) -> None:
    if target.dim() != 3:
        raise ValueError(f"target: expected 3 dimensions (B, H, W), got {target.dim()}: {tuple(target.shape)}")
    if target.dtype not in LABELS:
        raise ValueError(f"target: expected labels in uint8, int16, int32 or int64, got {name_of(target.dtype)}")
    if target.device != logits.device:
        raise ValueError(f"target: expected a tensor on the logits' device, {logits.device}, got {target.device}")
    if target.shape[0] != logits.shape[0]:
        raise ValueError(f"target: expected a batch of {logits.shape[0]}, as the logits', got {tuple(target.shape)}")
    check_extent(target.shape[1:], "target", target.shape)


def as_ignored(ignore_index: int) -> int:
    try:
        ignore_index = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}") from None
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index}")
    return ignore_index


def limits(logits: Tensor, size: Sequence[int]) -> dict[str, str]:
    """Returns the reasons why GPU kernels cannot take a call, by backend."""
    batch, classes, height, width = logits.shape
    positions = max(2 * height * size[0], 2 * width * size[1])
    rows, all_logits = batch * height * size[1], batch * classes * height * width
    if positions < MAX_GPU_POSITION and rows < MAX_GPU_ROWS and all_logits < MAX_GPU_LOGITS:
        return {}
    reason = (
        f"the kernels take axes whose source and result sizes multiply to less than {MAX_GPU_POSITION // 2}, fewer "
        f"than {MAX_GPU_ROWS} source rows times result columns and {MAX_GPU_LOGITS} logits; the logits are "
        f"{tuple(logits.shape)}, the result is {tuple(size)}"
    )
    return {"triton": reason, "cuda": reason}
