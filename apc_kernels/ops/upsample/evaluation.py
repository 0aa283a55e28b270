"""upsample_argmax, upsample_confusion, upsample_softmax: what evaluation makes of bilinearly upsampled logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels import labels
from apc_kernels.ops.common import check_tensor, name_of, working_dtype
from apc_kernels.ops.interpolation import as_size, check_extent
from apc_kernels.ops.operator import Operator, readable
from apc_kernels.ops.upsample import reference
from apc_kernels.ops.upsample.checks import KERNELS, as_ignored, check_logits, check_target, limits

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
    check_tensor(logits, "logits")
    return _argmax(logits, as_size(size), align_corners)


def _check_argmax(logits, size, align_corners):
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
    check_tensor(logits, "logits")
    check_tensor(target, "target")
    return _confusion(logits, target, as_ignored(ignore_index), align_corners)[0]


def _check_confusion(logits, target, ignore_index, align_corners):
    check_logits(logits)
    check_target(target, logits)
    if logits.shape[1] > MAX_COUNTED:
        raise ValueError(
            f"logits: expected at most {MAX_COUNTED} classes for a confusion matrix, got {logits.shape[1]}"
        )
    return logits, target, ignore_index, align_corners


def _refuse_wrong(logits, target, ignore_index, align_corners, results):
    if results[1].item():
        labels.refuse(target, logits.shape[1], ignore_index)


def _empty_counts(logits, *_):
    classes = logits.shape[1]
    return logits.new_empty(classes, classes, dtype=torch.int64), logits.new_empty(1, dtype=torch.int64)


_confusion = Operator(
    "upsample_confusion(Tensor logits, Tensor target, SymInt ignore_index, bool align_corners) -> (Tensor, Tensor)",
    KERNELS,
    _check_confusion,
    on=lambda logits, target, *_: (logits, limits(logits, target.shape[1:])),
    empty=_empty_counts,
    verify=_refuse_wrong,
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for the GPU, which no graph of launches can
)


def upsample_softmax(
    logits: Tensor, size: Sequence[int], *, flip: bool = False, align_corners: bool = False, out: Tensor | None = None
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
    check_tensor(logits, "logits")
    size = as_size(size)
    _check_softmax(logits, size, out)  # the operator cannot for us: it takes a result to write to, and no size
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


# Written out, not an Operator: it writes, or adds, to what it is given.
@torch.library.custom_op("apc_kernels::upsample_softmax", mutates_args=("out",))
def _softmax(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> None:
    """Adds the probabilities to `out`, or writes them there."""
    size = out.shape[2:]
    _check_softmax(logits, size, out)
    backend = KERNELS.select("upsample_softmax", logits, limits(logits, size))
    function = KERNELS.function(backend, "upsample_softmax")
    if not out.numel():
        return
    if _overlaps_itself(out):
        raise ValueError(f"out: expected memory of its own for every element, got strides {out.stride()}")
    if out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        logits = logits.clone()  # they are still being read when the first results are written
    if backend == "reference":
        probabilities = function(logits, size, flip, align_corners)
        _ = out.add_(probabilities) if add else out.copy_(probabilities)
        return
    written = readable(out)
    function(readable(logits), flip, align_corners, add, written)
    if written is not out:
        out.copy_(written)


@_softmax.register_fake
def _(logits, flip, align_corners, add, out):
    _check_softmax(logits, out.shape[2:], out)
