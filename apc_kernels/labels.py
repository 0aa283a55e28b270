"""Reports labels that are out of range, and lets a user turn the check on for GPUs."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

_checking: list[None] = []  # one entry for each `with` block that is open, in whatever thread


@contextlib.contextmanager
def checked_labels() -> Iterator[None]:
    """Makes labels out of range raise a ValueError on a GPU too, for all calls inside the `with` block.

        with apc_kernels.checked_labels():
            loss = apc_kernels.upsample_cross_entropy(logits, target)

    On a CPU such labels always raise. On a GPU the check makes every call wait for its result; without it, the loss
    and the gradient of the pixels concerned are NaN. Use it for the first steps of a training run.
    """
    _checking.append(None)
    try:
        yield
    finally:
        _checking.pop()


def are_checked(target: Tensor) -> bool:
    """Tells whether labels on this device are checked now."""
    return target.device.type == "cpu" or bool(_checking)


def refuse(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises a ValueError for a target in which a kernel has found labels out of range."""
    target = target.long()  # a comparison in a narrow dtype would wrap ignore_index
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    first = wrong.nonzero()[0].tolist()
    label = target[tuple(first)].item()
    count = int((wrong & (target == label)).sum())
    pixels = "1 pixel, at" if count == 1 else f"{count} pixels, the first at"
    others = int(wrong.sum()) - count
    more = f"; {others} more have other labels out of range" if others else ""
    raise ValueError(
        f"target: expected labels of 0 to {classes - 1}, or {ignore_index} for pixels to ignore; got {label} in "
        f"{pixels} {tuple(first)}{more}"
    )
