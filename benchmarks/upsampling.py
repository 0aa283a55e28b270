"""Defines the table's entries for the operations that upsample logits.

The logits are read, the labels read (int64) or written (uint8), the probabilities read and written; the loss writes one
float for each pixel, and its backward reads logits, labels and those floats and writes the gradient. PyTorch moves the
upsampled logits, K floats for each pixel, several times on top. Operations, for each pixel and class, an exponential
counted as one: 2 of the interpolation, and then 3 of the loss, 1 of the argmax, 4 of the softmax; the loss's backward
repeats its 5 operations, and takes 4 more to distribute the result to source pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import stock
import torch
from upsample_cases import LARGE_UPSAMPLES, UpsampleCase, assert_labels, draw_upsample

import apc_kernels
from apcnet import losses
from benchmarks.operation import BOTH, FORWARD, Operation, Point, Sides, Tensors, calls, fastest_only, points
from benchmarks.setting import BATCHES, DEVICE, DTYPE, ON_GPU, SIDES, THREADS, here

SMALL = UpsampleCase(1, 5, (4, 5), (9, 12))
TWO_CLASSES = UpsampleCase(4, 2, (128, 128), (512, 512))
BINARY = here(UpsampleCase(4, 1, (128, 128), (512, 512)), UpsampleCase(16, 1, (128, 128), (512, 512)))
LOGITS = here(LARGE_UPSAMPLES, [UpsampleCase(8, 150, (64, 64), (512, 512)), *LARGE_UPSAMPLES])


def upsample(
    name: str,
    other: str,
    apply: Callable,
    bytes_a_pixel: Callable,
    operations: int,
    directions: Sequence[str] = ("",),
    cases: Sequence[UpsampleCase] = LOGITS,
    small: UpsampleCase = SMALL,
    kernel: str = "",
    ours: Callable | None = None,
    theirs: Callable | None = None,
    **more: Any,
) -> Operation:
    """Makes an entry from the bytes of a pixel beside its logits, and the operations for each pixel and class.

    `kernel` is the operation whose kernels run, if it is not that of the name; `name` may name an option of it.
    """

    function = name if name in apc_kernels.__all__ else kernel

    def draw(case: UpsampleCase, layout: Callable) -> Tensors:
        t = draw_upsample(case, layout, DTYPE, DEVICE)
        if name == "upsample_softmax":
            t["out"] = torch.zeros(case.batch, case.classes, *case.size, device=DEVICE)
        if name == "upsample_binary_cross_entropy":
            t["target"] = torch.where(t["target"] == 255, 255, (t["grad"] > 0).long())
        return {key: t[key] for key in ("logits", "target", "out") if key in t}

    def counts(case: UpsampleCase, t: Tensors, backward: bool) -> tuple[int, int]:
        pixels = case.batch * case.size[0] * case.size[1]
        moved = (1 + 2 * backward) * t["logits"].nbytes + (1 + backward) * bytes_a_pixel(case) * pixels
        return moved, (operations + 9 * backward) * case.classes * pixels

    def by_default(case: UpsampleCase, layout: str, direction: str) -> bool:
        """Selects all rows of the first case, and of the others those that goals name."""
        named = not ON_GPU and (direction == BOTH or name == "upsample_argmax")
        return fastest_only(case, layout, direction) and (case is cases[0] or named)

    return Operation(
        name=name,
        cases=cases,
        small=small,
        draw=draw,
        ready=calls(apply, "logits"),
        ours=ours or getattr(apc_kernels, function),
        others={other: theirs or getattr(stock, function)},
        counts=counts,
        kernel=kernel or name,
        by_default=by_default,
        directions=directions,
        **more,
    )


def _check_argmax(case: UpsampleCase, t: Tensors, sides: Sides) -> None:
    assert_labels(*sides.ours(), t["logits"], case)


def _check_confusion(case: UpsampleCase, t: Tensors, sides: Sides) -> None:
    labels = apc_kernels.upsample_argmax(t["logits"], case.size)
    assert torch.equal(*sides.ours(), stock.confusion(labels, t["target"], case.classes))


def _cross_entropy_and_dice(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return apc_kernels.upsample_cross_entropy(logits, target) + losses.dice(logits, target)


UPSAMPLES = (
    upsample(
        "upsample_cross_entropy",
        "F.interpolate, F.cross_entropy",
        lambda function, case, t, logits: function(logits, t["target"]),
        bytes_a_pixel=lambda case: 8 + 4,
        operations=5,
        directions=(FORWARD, BOTH),
        scaling=[
            *points(LOGITS[0], batch=BATCHES[:3], classes=(19, 60, 150), threads=THREADS),
            *(Point("size", n, replace(LOGITS[0], source=(n, n), size=(8 * n, 8 * n))) for n in SIDES[:3]),
        ],
    ),
    upsample(
        "focal_loss",  # upsample_cross_entropy with focal
        "F.interpolate, F.cross_entropy, (1 - p)^2",
        lambda function, case, t, logits: function(logits, t["target"], focal=2.0),
        bytes_a_pixel=lambda case: 8 + 4,
        operations=5,
        directions=(FORWARD, BOTH),
        kernel="upsample_cross_entropy",
    ),
    upsample(
        "upsample_binary_cross_entropy",  # its kernels see two classes, as which it counts
        "F.interpolate, F.binary_cross_entropy_with_logits",
        lambda function, case, t, logits: function(logits, t["target"]),
        bytes_a_pixel=lambda case: 8 + 4,
        operations=10,
        directions=(FORWARD, BOTH),
        cases=[BINARY],
        small=UpsampleCase(1, 1, (4, 5), (9, 12)),
        kernel="upsample_cross_entropy",
    ),
    upsample(
        "upsample_region_sums",
        "F.interpolate, softmax, sums",
        lambda function, case, t, logits: function(logits, t["target"])[:3],
        bytes_a_pixel=lambda case: 8,
        operations=6,
        directions=(FORWARD, BOTH),
    ),
    upsample(
        "cross_entropy_and_dice",  # the loss that is most common in training for few classes
        "F.interpolate, F.cross_entropy, Dice loss",
        lambda function, case, t, logits: function(logits, t["target"]),
        bytes_a_pixel=lambda case: 2 * 8 + 4,
        operations=11,
        directions=(FORWARD, BOTH),
        cases=[LOGITS[0], *here([TWO_CLASSES], [])],
        kernel="upsample_region_sums",
        ours=_cross_entropy_and_dice,
        theirs=stock.cross_entropy_and_dice,
    ),
    upsample(
        "upsample_argmax",
        "F.interpolate, argmax",
        lambda function, case, t, logits: function(logits, case.size),
        bytes_a_pixel=lambda case: 1,
        operations=3,
        check=_check_argmax,
    ),
    upsample(
        "upsample_confusion",
        "F.interpolate, argmax, bincount",
        lambda function, case, t, logits: function(logits, t["target"]),
        bytes_a_pixel=lambda case: 8,
        operations=3,
        check=_check_confusion,
    ),
    upsample(
        "upsample_softmax",
        "F.interpolate, softmax, add_",
        lambda function, case, t, logits: function(logits, case.size, out=t["out"]),
        bytes_a_pixel=lambda case: 2 * 4 * case.classes,
        operations=6,
    ),
)
