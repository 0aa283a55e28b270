"""Counts the computing calls of heads, a launch each on a GPU, beside those of mmsegmentation's layers.

The table in docs/kernels/README.md holds the counts; it is what these tests compare with.
"""

import contextlib
from pathlib import Path
from unittest import mock

import calls
import mmseg_peer as peer
import pytest
import stock_models
import torch

import apc_kernels
from apc_kernels.ops import common, pyramid_conv, pyramid_reduce
from apcnet.interop.mmseg import load_head

PAGE = Path(__file__).parents[2] / "docs" / "kernels" / "README.md"
BEGIN, END = "<!-- calls: held to by tests/apcnet/test_head_calls.py -->", "<!-- end of calls -->"
PLACES = ("CPU", "GPU", "mmsegmentation")


def table() -> dict[tuple[str, bool, str], int]:
    """Reads the counts from the documentation, by head, training or not, and place."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.split("\n") if "|" in line]
    counts = {}
    for name, *numbers in rows[2:]:
        columns = [(training, place) for training in (False, True) for place in PLACES]
        for (training, place), number in zip(columns, numbers, strict=True):
            counts[name.lower(), training, place] = int(number)
    return counts


COUNTS = table()


def counted(name: str, training: bool, place: str):
    """Counts as in eager use: constants are kept, and nothing traces the call.

    On a GPU Triton's kernels compute, and PyTorch where there are none, on channels_last maps.
    """
    config = peer.head_config(name, 16, 8, 4)
    theirs = stock_models.head(config)
    head = theirs if place == "mmsegmentation" else load_head(config, theirs.state_dict())
    layout = torch.channels_last if place == "GPU" else torch.contiguous_format
    sides = (8, 4, 2, 1) if name in ("fpn", "uper") else (3,)
    features = [torch.randn(2, 16, side, side).contiguous(memory_format=layout) for side in sides]
    head = head.to(memory_format=layout).train(training)

    def run():
        with torch.set_grad_enabled(training):
            results = head(features)
            results = results if isinstance(results, tuple) else (results,)
            if training:
                sum(result.sum() for result in results).backward()

    with contextlib.ExitStack() as stack:
        if place == "GPU":
            stack.enter_context(apc_kernels.backend("triton"))
            for operation in (pyramid_conv, pyramid_reduce):
                stack.enter_context(mock.patch.object(operation, "_in_kernels", lambda *_: False))
        run()
        head.zero_grad()
        for module in (pyramid_conv.reference, common):
            stack.enter_context(mock.patch.object(module, "is_in_torch_dispatch_mode", lambda: False))
        return calls.count(run)


SLOW = {("apc", training, "GPU") for training in (False, True)}  # in Triton's interpreter
CASES = [pytest.param(*case, marks=[pytest.mark.slow] if case in SLOW else []) for case in COUNTS]


@pytest.mark.parametrize(("name", "training", "place"), CASES)
def test_a_head_takes_as_many_calls_as_documented(name, training, place):
    if place == "GPU":
        pytest.importorskip("triton", reason="needs triton")
        if torch.cuda.is_available():
            pytest.skip("needs Triton's interpreter, which excludes the GPU")
    found, most = counted(name, training, place), COUNTS[name, training, place]
    assert 0.9 * most <= found.total() <= most, found


def test_heads_take_few_calls():
    """Tests the bounds that the table has to keep: on a CPU, fewer than mmsegmentation's layers; 40 for PSPNet's."""
    assert {name for name, *_ in COUNTS} == set(peer.HEADS)
    for (name, training, place), count in COUNTS.items():
        if place == "CPU":
            assert count <= COUNTS[name, training, "mmsegmentation"], (name, training)
    assert COUNTS["psp", False, "GPU"] <= 40
