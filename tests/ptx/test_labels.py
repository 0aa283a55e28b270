"""Counts the instructions of the Triton kernels of upsample_argmax and upsample_confusion, and tests their pruning.

Counts are of PTX for sm_90, on a part of (8, 150, 64, 64) in bfloat16 and channels_last, to 512×512. A part has one
window of eight output rows more than source rows, as the whole has: the first source row has twelve.
"""

import ptx_triton
import pytest
import report
import torch
from cases import channels_last

import apc_kernels

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels decorated for the interpreter")

CLASSES, ROWS, COLUMNS, RATIO = 150, 8, 64, 8
SIZE = (ROWS * RATIO, COLUMNS * RATIO)


def random_logits() -> torch.Tensor:
    return torch.randn(1, CLASSES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def peaked_logits() -> torch.Tensor:
    """Draws logits of which one class is 5 ahead in patches of 8×8 source pixels; a boundary runs through the rows."""
    winner = torch.randint(CLASSES, (1, 1, 2, 8), generator=torch.Generator().manual_seed(1))
    winner = winner.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, 4 : 4 + ROWS]
    return random_logits().scatter_add_(1, winner, torch.full(winner.shape, 5.0))


@pytest.fixture
def count(monkeypatch):
    """Returns a function that runs an operation on logits, and returns instructions for each interpolated logit."""
    counts = []
    ptx_triton.serve(monkeypatch, 90, counts=counts)

    def counted(operation, logits, *given) -> float:
        counts.clear()
        with apc_kernels.backend("triton"):
            operation(channels_last(logits.bfloat16()), *given)
        [(_, result)] = counts
        total = sum(warps for warps, _ in result["opcodes"].values())
        of_whole = total / (ROWS + 1) * (64 + 1) / 64 * ROWS
        return of_whole / (CLASSES * SIZE[0] * SIZE[1] / 32)

    return counted


def milliseconds(instructions: float) -> float:
    """Returns the time that an H200 takes to issue so many instructions for each logit of the whole."""
    return instructions * 8 * CLASSES * 512 * 512 / 32 / report.ISSUED_PER_SECOND * 1e3


def test_argmax_issues_few_instructions(count, monkeypatch):
    from apc_kernels.ops.upsample import triton_labels

    random = count(apc_kernels.upsample_argmax, random_logits(), SIZE)
    peaked = count(apc_kernels.upsample_argmax, peaked_logits(), SIZE)
    assert milliseconds(random) <= 0.08
    assert peaked <= random / 3
    monkeypatch.setattr(triton_labels, "_cells", lambda *_: 0)
    assert random <= 1.05 * count(apc_kernels.upsample_argmax, random_logits(), SIZE)


def test_confusion_issues_few_instructions(count):
    """It counts pixels beside what argmax does; here, labels are as different as they can be."""
    target = torch.randint(CLASSES, (1, *SIZE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    random = count(apc_kernels.upsample_confusion, random_logits(), target)
    peaked = count(apc_kernels.upsample_confusion, peaked_logits(), target)
    assert milliseconds(random) <= 0.09
    assert peaked <= random / 2
