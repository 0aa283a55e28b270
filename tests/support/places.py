"""Lists where tests run: every device with each of its backends, every layout, every dtype."""

import pytest
from accuracy import DTYPES
from cases import LAYOUTS

CPU, GPU = ["reference", "cpp"], ["reference", "triton", "cuda"]


def at(gpu):
    places = [("cpu", name) for name in CPU] + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in gpu]
    return pytest.mark.parametrize(("device", "backend"), places)


places = at(GPU)
places_without_cuda = at(GPU[:2])  # of operations that have no kernels in CUDA C++
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
