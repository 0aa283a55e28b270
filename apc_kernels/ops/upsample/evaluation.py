"""Implements upsample_argmax, upsample_confusion and upsample_softmax: evaluation of bilinearly upsampled logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels import labels
from apc_kernels.ops.common import check_flag, check_tensor, name_of, working_dtype
from apc_kernels.ops.interpolation import as_size, check_extent
from apc_kernels.ops.operator import Operator, define, readable
from apc_kernels.ops.upsample import reference
from apc_kernels.ops.upsample.binary import as_pair, check_threshold
from apc_kernels.ops.upsample.checks import KERNELS, as_ignored, check_logits, check_target, limits

MAX_COUNTED = 46339  # classes: an int32 numbers their pairs, and their matrix takes 17 GB


def upsample_argmax(
    logits: Tensor, size: Sequence[int], *, align_corners: bool = False, threshold: float | None = None
) -> Tensor:
    """Returns the class with the largest bilinearly upsampled logit for every pixel.

    Equivalent to:

        F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).argmax(1)

    The upsampled logits are never stored.

    Args:
        logits: (B, K, h, w), float32, bfloat16, float16 or float64. NCHW and channels_last logits are read in place;
            any other layout is copied once.
        size: (H, W) of the result, of any ratio to (h, w).
        align_corners: interpolates as F.interpolate does with this option.
        threshold: for one logit a pixel, K = 1: a probability t. The label is 1 where the sigmoid of the interpolated
            logit is larger, else 0. Without it the argmax of one class is 0 everywhere.

    Returns:
        (B, H, W), uint8 for up to 256 classes, int16 for up to 32768, int32 for more. Of classes with exactly the same
        interpolated logit, the first one is returned; for a pixel with a NaN, any class.

    The operation has no gradient, and is deterministic to the bit.
    """
    check_tensor(logits, "logits")
    check_flag(align_corners, "align_corners")
    if threshold is not None:
        logits = as_pair(logits, check_threshold(threshold, logits))
    return _argmax(logits, as_size(size), align_corners)


def _check_argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> tuple[Any, ...]:
    check_logits(logits)
    check_extent(size, "size", size)
    return logits, size, align_corners


_argmax = Operator(
    "upsample_argmax(Tensor logits, SymInt[] size, bool align_corners) -> Tensor",
    KERNELS,
    _check_argmax,
    on=lambda logits, size, align_corners: (logits, limits(logits, size)),
    empty=lambda logits, size, align_corners: logits.new_empty(
        logits.shape[0], *size, dtype=reference.label_dtype(logits.shape[1])
    ),
)


def upsample_confusion(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
    threshold: float | None = None,
) -> Tensor:
    """Counts the pairs of target label and predicted class of bilinearly upsampled logits in a confusion matrix.

    Equivalent to:

        K, prediction = logits.shape[1], upsample_argmax(logits, target.shape[1:], align_corners=align_corners)
        valid = target != ignore_index
        torch.bincount(target[valid].long() * K + prediction[valid], minlength=K * K).view(K, K)

    Neither the upsampled logits nor the prediction is stored.

    Args:
        logits: (B, K, h, w), as in upsample_argmax.
        target: (B, H, W), uint8, int16, int32 or int64.
        ignore_index: the label of pixels that are not counted.
        align_corners: interpolates as F.interpolate does with this option.
        threshold: for one logit a pixel, as in upsample_argmax; the counts are then those of the labels 0 and 1.

    Returns:
        (K, K) int64, (2, 2) with a threshold, exact counts; rows are target labels, columns are predictions.

    A label out of range raises a ValueError, on a GPU too, since a count cannot be NaN. On a GPU this check makes the
    call wait for its result.
    """
    check_tensor(logits, "logits")
    check_tensor(target, "target")
    check_flag(align_corners, "align_corners")
    if threshold is not None:
        logits = as_pair(logits, check_threshold(threshold, logits))
    return _confusion(logits, target, as_ignored(ignore_index), align_corners)[0]


def _check_confusion(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> tuple[Any, ...]:
    check_logits(logits)
    check_target(target, logits)
    if logits.shape[1] > MAX_COUNTED:
        raise ValueError(
            f"logits: expected at most {MAX_COUNTED} classes for a confusion matrix, got {logits.shape[1]}"
        )
    return logits, target, ignore_index, align_corners


def _refuse_wrong(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, results: Sequence[Tensor]
) -> None:
    if results[1].item():
        labels.refuse(target, logits.shape[1], ignore_index)


def _empty_counts(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    classes = logits.shape[1]
    return logits.new_empty(classes, classes, dtype=torch.int64), logits.new_empty(1, dtype=torch.int64)


_confusion = Operator(
    "upsample_confusion(Tensor logits, Tensor target, SymInt ignore_index, bool align_corners) -> (Tensor, Tensor)",
    KERNELS,
    _check_confusion,
    on=lambda logits, target, *_: (logits, limits(logits, target.shape[1:])),
    empty=_empty_counts,
    verify=_refuse_wrong,
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for the GPU, which a CUDA graph cannot do
)


def upsample_softmax(
    logits: Tensor, size: Sequence[int], *, flip: bool = False, align_corners: bool = False, out: Tensor | None = None
) -> Tensor:
    """Computes the class probabilities of bilinearly upsampled logits, and can add them to a buffer.

    Equivalent to:

        p = F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).softmax(1)
        out.add_(p.flip(3) if flip else p)

    The upsampled logits are never stored. With `out`, testing at many scales and flips needs memory for one sum.

    Args:
        logits: (B, K, h, w), as in upsample_argmax. They must not require a gradient: the operation has none.
        size: (H, W) of the result.
        flip: mirrors the result, for logits of a mirrored image.
        align_corners: interpolates as F.interpolate does with this option.
        out: (B, K, H, W), float32 (float64 for float64 logits); the probabilities are added to it. A buffer without
            adjacent columns or channels costs a copy, and so does one that shares memory with the logits.

    Returns:
        `out` if it is given; otherwise a new tensor in the memory format of the logits.

    Results are deterministic to the bit.
    """
    check_tensor(logits, "logits")
    check_flag(flip, "flip")
    check_flag(align_corners, "align_corners")
    size = as_size(size)
    _check_softmax(logits, size, out)  # the operator cannot check `size`: it only takes the result to write to
    if torch.is_grad_enabled() and (logits.requires_grad or (out is not None and out.requires_grad)):
        raise ValueError("logits, out: expected tensors without gradient: upsample_softmax is for inference only")
    if torch.compiler.is_exporting():
        probabilities = reference.upsample_softmax(logits, size, flip, align_corners)
        return probabilities if out is None else out.add_(probabilities)
    result = _empty_probabilities(logits, size) if out is None else out
    _softmax(logits, flip, align_corners, out is not None, result)
    return result


def _check_softmax(logits: Tensor, size: Sequence[int], out: Tensor | None) -> None:
    check_logits(logits)
    check_extent(size, "size", size)
    if out is None:
        return
    check_tensor(out, "out")
    shape, dtype = (*logits.shape[:2], *size), working_dtype(logits)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != logits.device:
        expected = f"{shape} in {name_of(dtype)} on {logits.device}"
        raise ValueError(f"out: expected {expected}, got {tuple(out.shape)} in {name_of(out.dtype)} on {out.device}")


def _empty_probabilities(logits: Tensor, size: Sequence[int]) -> Tensor:
    last = logits.stride(1) == 1 and logits.stride(3) != 1
    return torch.empty(
        (*logits.shape[:2], *size),
        dtype=working_dtype(logits),
        device=logits.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _overlaps_itself(tensor: Tensor) -> bool:
    extent = 1
    for step, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and step < extent:
            return True
        extent += step * (n - 1)
    return False


def _add_softmax(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> None:
    """Adds the probabilities to `out`, or writes them to it."""
    size = out.shape[2:]
    _check_softmax(logits, size, out)
    backend = KERNELS.select("upsample_softmax", logits, limits(logits, size))
    function = KERNELS.function(backend, "upsample_softmax")
    if not out.numel():
        return
    if _overlaps_itself(out):
        raise ValueError(f"out: expected elements that do not overlap in memory, got strides {out.stride()}")
    if out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        logits = logits.clone()  # the kernel reads logits after it has written the first results
    if backend == "reference":
        probabilities = function(logits, size, flip, align_corners)
        _ = out.add_(probabilities) if add else out.copy_(probabilities)
        return
    torch.autograd.graph.increment_version(out)  # as an operator of PyTorch's that writes to its argument
    written = readable(out)
    function(readable(logits), flip, align_corners, add, written)
    if written is not out:
        out.copy_(written)


# Not an Operator, because it writes or adds to its argument.
_softmax = define(
    "upsample_softmax(Tensor logits, bool flip, bool align_corners, bool add, Tensor(a!) out) -> ()",
    _add_softmax,
    lambda logits, flip, align_corners, add, out: _check_softmax(logits, out.shape[2:], out),
)
