"""Labels out of range: what is said of them, and the switch that has it said on a GPU too."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

_checking = []  # one entry for each `with` block that is open, in whatever thread


@contextlib.contextmanager
def checked_labels() -> Iterator[None]:
    """Inside this `with` block, labels out of range are an error on a GPU too.

    On a CPU they always are. On a GPU looking at them would have every call wait for its result; without it the loss
    and the gradient of the pixels concerned are NaN. Worth it for the first step of a training.
    """
    _checking.append(None)
    try:
        yield
    finally:
        _checking.pop()


def are_checked(target: Tensor) -> bool:
    return target.device.type == "cpu" or bool(_checking)


def refuse(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises for the labels of which a kernel has said that some are out of range."""
    target = target.long()  # a narrow dtype would wrap what it is compared with
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
