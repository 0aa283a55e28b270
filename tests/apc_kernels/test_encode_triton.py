"""Tests the Triton kernels of encode on the CPU, against float64 and the residuals written out in PyTorch.

By Triton's interpreter, and as compiled code (tests/ptx, slow).
"""

import pytest
import torch
from accuracy import same_bits
from cases import channels_last, nchw, sliced
from encoding import NAMES, check, with_gradients
from head_cases import CodeCase, draw_code

import apc_kernels
from apc_kernels.ops.encode import MAX_GPU_WORDS

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU")

ODD = CodeCase(2, 37, (9, 11), 5)  # two tiles of positions, two blocks of channels
CASES = [
    CodeCase(1, 1, (1, 1), 3),
    CodeCase(2, 6, (5, 4), 1),
    CodeCase(1, 64, (16, 16), 32),
    ODD,
    CodeCase(0, 4, (3, 3), 5),
]


@pytest.fixture(autouse=True)
def triton_serves(triton_machine):
    with apc_kernels.backend("triton"):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hard_cases(case):
    check(draw_code(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", [nchw, channels_last, sliced], ids=lambda layout: layout.__name__)
def test_layouts_and_dtypes(layout, dtype):
    check(draw_code(ODD, layout, dtype), f"{layout.__name__} {dtype}")


def test_far_from_the_origin():
    t = draw_code(CodeCase(1, 32, (8, 12), 8))
    check(t | {"x": t["x"] + 100, "codewords": t["codewords"] + 100}, "far")


def test_same_bits_every_time():
    tensors = draw_code(ODD, channels_last)
    first, second = with_gradients(apc_kernels.encode, tensors), with_gradients(apc_kernels.encode, tensors)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_more_codewords_than_the_kernels_take():
    t = draw_code(CodeCase(1, 4, (3, 3), MAX_GPU_WORDS + 1))
    with pytest.raises(RuntimeError, match="encode: the backend 'triton' was asked for, but the kernels take up to 64"):
        apc_kernels.encode(*(t[name] for name in NAMES))
