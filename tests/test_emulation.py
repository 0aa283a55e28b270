"""The emulation of CUDA (tests/emulation) notices the faults it is there for."""

import numpy as np
import pytest
import torch


def test_a_missing_barrier_shows(cuda_emulation):
    expected = (np.arange(64) + 1) % 64
    for seed in range(5):
        assert (cuda_emulation.neighbour(True, seed) == expected).all()
        assert not (cuda_emulation.neighbour(False, seed) == expected).all()


def test_a_barrier_for_a_warp_is_none_for_the_block(cuda_emulation):
    """One of two warps runs ahead in some orders; in others they happen to take turns."""
    assert any((cuda_emulation.other_warp(seed) != (np.arange(64) + 32) % 64).any() for seed in range(10))


def test_shuffles_stay_in_their_warp(cuda_emulation):
    sums = cuda_emulation.warp_sum(0)
    assert (sums[:32] == sum(range(32))).all() and (sums[32:] == sum(range(32, 64))).all()


def test_a_barrier_that_some_threads_never_reach(cuda_emulation):
    with pytest.raises(RuntimeError, match="a barrier was not reached by every thread"):
        cuda_emulation.early_return(0)


def test_shuffles_down_stop_at_the_end_of_a_warp(cuda_emulation):
    lanes = np.arange(64) % 32
    assert (cuda_emulation.shuffle_down(0) == np.arange(64) + np.where(lanes < 30, 2, 0)).all()


@pytest.mark.parametrize(
    ("kernel", "message"), [("partial_mask", "shuffles take the full mask"), ("misaligned", "a vector is not aligned")]
)
def test_what_a_gpu_would_not_forgive(cuda_emulation, kernel, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(cuda_emulation, kernel)(0)


def test_a_write_past_shared_memory(cuda_emulation):
    with pytest.raises(RuntimeError, match="past the end of its shared memory"):
        cuda_emulation.overrun(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("a_by_row", [True, False])
@pytest.mark.parametrize("b_by_row", [True, False])
def test_tensor_core_products(cuda_emulation, dtype, a_by_row, b_by_row):
    """Both operands by rows or by columns; every warp has the product, in any order of threads."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = [t if by_row else t.mT.contiguous() for t, by_row in ((a, a_by_row), (b, b_by_row))]
    for seed in range(3):
        arrays = [t.view(torch.uint16).numpy() for t in stored]
        c, _ = cuda_emulation.warp_product(*arrays, str(dtype)[6:], a_by_row, b_by_row, seed)
        torch.testing.assert_close(torch.from_numpy(c[0]).double(), 2 * a.double() @ b.double(), rtol=1e-6, atol=1e-6)
        assert (c[0] == c[1]).all()


def test_tensor_core_operands_lie_where_ptx_says(cuda_emulation):
    """mma.m16n8k16's matrix a: lane 4g + t holds rows g and g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9."""
    a = np.arange(256, dtype=np.uint16).reshape(16, 16)
    numbers = a.tolist()
    for by_row in (True, False):
        _, parts = cuda_emulation.warp_product(a if by_row else a.T.copy(), a, "float16", by_row, True, 0)
        for lane in range(32):
            g, t = divmod(lane, 4)
            pairs = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
            assert [int(part) for part in parts[lane]] == [numbers[i][j] | numbers[i][j + 1] << 16 for i, j in pairs]
