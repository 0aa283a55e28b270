"""The CUDA kernels as compiled code: no finding, the emulation's numbers, and the same bits in every schedule.

Against float64, on every hard case, layout and dtype, they are tested where the emulation is
(tests/apc_kernels/test_adaptive_context_cuda.py, test_pyramid_pool.py: marked slow).
"""

import ptx_cuda
import pytest
import torch
from accuracy import same_bits
from cases import channels_last, nchw
from cuda_calls import cuda_calls

from apc_kernels import build

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
slow = pytest.mark.slow
SETTINGS = [
    (torch.bfloat16, channels_last),
    (torch.float32, nchw),
    pytest.param(torch.bfloat16, nchw, marks=slow),
    pytest.param(torch.float32, channels_last, marks=slow),
    pytest.param(torch.float16, channels_last, marks=slow),
    pytest.param(torch.float16, nchw, marks=slow),
]


@pytest.mark.parametrize(("dtype", "layout"), SETTINGS, ids=lambda value: getattr(value, "__name__", str(value)[6:]))
def test_results(cuda_emulation, dtype, layout):
    first, *others = (cuda_calls(ptx_cuda.Kernels(seed=seed), layout, dtype) for seed in range(3))
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))
    for ours, emulated in zip(first, cuda_calls(cuda_emulation, layout, dtype), strict=True):
        largest = emulated.abs().max().item()
        torch.testing.assert_close(ours, emulated, rtol=0, atol=4 * torch.finfo(ours.dtype).eps * largest + 2e-5)


@slow
@pytest.mark.parametrize("arch", [80, 100])
def test_the_library_has_this_code(tmp_path, arch):
    """The files that the library is linked from, with their PTX for sm_80, and for sm_100 as the library ships it."""
    texts = ptx_cuda.library_texts(arch, tmp_path)
    assert set(texts) == set(ptx_cuda.texts())
    for dtype, layout in ((torch.bfloat16, channels_last), (torch.float32, nchw)):
        expected = cuda_calls(ptx_cuda.Kernels(), layout, dtype)
        ours = cuda_calls(ptx_cuda.Kernels(changed=lambda kernel, _: texts[kernel]), layout, dtype)
        assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))
