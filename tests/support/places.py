"""Where tests run: every device with every backend that serves it, every layout, every dtype."""

import pytest
from accuracy import DTYPES
from cases import LAYOUTS

CPU, GPU = ["reference", "cpp"], ["reference", "triton", "cuda"]
PLACES = [("cpu", name) for name in CPU] + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in GPU]

places = pytest.mark.parametrize(("device", "backend"), PLACES)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
