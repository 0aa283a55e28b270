"""upsample_argmax, upsample_confusion, upsample_softmax: what evaluation makes of bilinearly upsampled logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels import dispatch, labels
from apc_kernels.ops.common import call, readable
from apc_kernels.ops.interpolation import check_size
from apc_kernels.ops.upsample import reference
from apc_kernels.ops.upsample.checks import check_ignored, check_logits, check_target, limits

MAX_COUNTED = 46339  # classes whose pairs an int32 counts; their matrix has 17 GB


def upsample_argmax(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """F.interpolate(logits, size, mode="bilinear").argmax(1), without the tensor in between.

    Args:
        logits: (B, K, h, w), float32, bfloat16, float16 or float64; NCHW and channels_last are read where they lie.
        size: (H, W) of the result.

    Returns:
        (B, H, W), uint8 for up to 256 classes, int16 for up to 32768, int32 beyond. Of classes with exactly the same
        interpolated logit the first; beside a NaN, which compares with nothing, some class.
    """
    check_logits(logits)
    size = check_size(size)
    operator = reference.upsample_argmax if torch.compiler.is_exporting() else _argmax
    return operator(logits, size, align_corners)


@torch.library.custom_op("apc_kernels::upsample_argmax", mutates_args=())
def _argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    check_logits(logits)
    size = check_size(size)
    result = _empty_labels(logits, size)
    call("upsample", "upsample_argmax", logits, limits(logits, size), (logits, size, align_corners), (result,))
    return result


@_argmax.register_fake
def _(logits, size, align_corners):
    check_logits(logits)
    return _empty_labels(logits, check_size(size))


def _empty_labels(logits: Tensor, size: Sequence[int]) -> Tensor:
    return logits.new_empty(logits.shape[0], *size, dtype=reference.label_dtype(logits.shape[1]))


def upsample_confusion(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """The confusion matrix of upsample_argmax(logits, target's size) with target, without the prediction in between.

    Args:
        logits: as in upsample_argmax.
        target: (B, H, W), uint8, int16, int32 or int64.
        ignore_index: the label of pixels that are not counted.

    Returns:
        (K, K) int64, rows: target, columns: prediction; exact.

    A label out of range is an error, on a GPU too: a count cannot be NaN. The check waits for the result.
    """
    _check_confusion(logits, target)
    ignore_index = check_ignored(ignore_index)
    operator = reference.upsample_confusion if torch.compiler.is_exporting() else _confusion
    return operator(logits, target, ignore_index, align_corners)[0]


# It waits for the GPU, which no graph of launches can.
@torch.library.custom_op("apc_kernels::upsample_confusion", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _confusion(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    _check_confusion(logits, target)
    results = _empty_counts(logits)
    arguments = (logits, target, ignore_index, align_corners)
    call("upsample", "upsample_confusion", logits, limits(logits, target.shape[1:]), arguments, results)
    if results[1].item():
        labels.refuse(target, logits.shape[1], ignore_index)
    return results


@_confusion.register_fake
def _(logits, target, ignore_index, align_corners):
    _check_confusion(logits, target)
    return _empty_counts(logits)


def _check_confusion(logits: Tensor, target: Tensor) -> None:
    check_logits(logits)
    check_target(target, logits)
    if logits.shape[1] > MAX_COUNTED:
        raise ValueError(
            f"logits: expected at most {MAX_COUNTED} classes for a confusion matrix, got {logits.shape[1]}"
        )


def _empty_counts(logits: Tensor) -> tuple[Tensor, Tensor]:
    classes = logits.shape[1]
    return logits.new_empty(classes, classes, dtype=torch.int64), logits.new_empty(1, dtype=torch.int64)


def upsample_softmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    flip: bool = False,
    align_corners: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """F.interpolate(logits, size, mode="bilinear").softmax(1), written or added to a buffer.

    Args:
        logits: as in upsample_argmax; inference only, they must not require a gradient.
        size: (H, W) of the result.
        flip: the logits are those of a mirrored image: the result is mirrored back, columns in reverse order.
        out: (B, K, H, W), float32 (float64 for float64 logits). The probabilities are added to it: the sum over scales
            and flips of an image needs no other memory. A layout with neither columns nor channels side by side costs
            a copy, and so do logits that lie in it.

    Returns:
        `out`; or, if it is not given, a new tensor in the memory format of the logits.
    """
    check_logits(logits)
    size = check_size(size)
    _check_out(logits, size, out)
    if torch.is_grad_enabled() and (logits.requires_grad or (out is not None and out.requires_grad)):
        raise ValueError("logits, out: expected tensors without gradient: upsample_softmax is for inference only")
    if torch.compiler.is_exporting():
        probabilities = reference.upsample_softmax(logits, size, flip, align_corners)
        return probabilities if out is None else out.add_(probabilities)
    result = _empty_probabilities(logits, size) if out is None else out
    _softmax(logits, flip, align_corners, out is not None, result)
    return result


def _check_out(logits: Tensor, size: Sequence[int], out: Tensor | None) -> None:
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    shape, dtype = (*logits.shape[:2], *size), torch.float64 if logits.dtype == torch.float64 else torch.float32
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != logits.device:
        expected = f"{shape} in {str(dtype)[6:]} on {logits.device}"
        raise ValueError(f"out: expected {expected}, got {tuple(out.shape)} in {str(out.dtype)[6:]} on {out.device}")


def _overlaps_itself(tensor: Tensor) -> bool:
    extent = 1
    for step, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and step < extent:
            return True
        extent += step * (n - 1)
    return False


def _empty_probabilities(logits: Tensor, size: Sequence[int]) -> Tensor:
    last = logits.stride(1) == 1 and logits.stride(3) != 1
    return torch.empty(
        (*logits.shape[:2], *size),
        dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32,
        device=logits.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


@torch.library.custom_op("apc_kernels::upsample_softmax", mutates_args=("out",))
def _softmax(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> None:
    """Adds the probabilities to `out`, or writes them there."""
    check_logits(logits)
    size = out.shape[2:]
    _check_out(logits, size, out)
    name = dispatch.select("upsample_softmax", logits, limits(logits, size))
    if not out.numel():
        return
    if _overlaps_itself(out):
        raise ValueError(f"out: expected memory of its own for every element, got strides {out.stride()}")
    if out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        logits = logits.clone()  # they are still being read when the first results are written
    if name == "reference":
        probabilities = reference.upsample_softmax(logits, size, flip, align_corners)
        _ = out.add_(probabilities) if add else out.copy_(probabilities)
        return
    target = readable(out)
    kernels = dispatch.kernels(name, "upsample")
    kernels.upsample_softmax(readable(logits), flip, align_corners, add, target)
    if target is not out:
        out.copy_(target)


@_softmax.register_fake
def _(logits, flip, align_corners, add, out):
    _check_out(logits, out.shape[2:], out)
