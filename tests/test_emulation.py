"""The emulation of CUDA (tests/emulation) notices the faults it is there for."""

import numpy as np
import pytest


def test_a_missing_barrier_shows(cuda_emulation):
    expected = (np.arange(64) + 1) % 64
    for seed in range(5):
        assert (cuda_emulation.neighbour(True, seed) == expected).all()
        assert not (cuda_emulation.neighbour(False, seed) == expected).all()


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
