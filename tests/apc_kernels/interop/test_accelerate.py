"""Tests accelerate() without any other package: what it imports, and its errors."""

import subprocess
import sys

import pytest
from torch import nn

import apc_kernels

PROGRAM = """
import sys
import apc_kernels
from torch import nn

try:
    apc_kernels.accelerate(nn.Linear(2, 2))
except ValueError:
    others = {"apcnet", "mmseg", "segmentation_models_pytorch", "timm", "torchvision", "transformers"}
    print(sorted(others & set(sys.modules)))
"""


def test_it_imports_no_other_package():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[]\n", 0), run.stderr


@pytest.mark.parametrize(("model", "name"), [(nn.Linear(2, 2), "Linear"), ("model", "str"), (None, "NoneType")])
def test_other_objects_are_an_error(model, name):
    expected = r"model: expected parts of mmsegmentation, transformers, .* that segment images, got "
    with pytest.raises(ValueError, match=expected + name):
        apc_kernels.accelerate(model)


def test_labels_only_is_for_mmsegmentation():
    with pytest.raises(ValueError, match="labels_only: expected False without a model of mmsegmentation, got True"):
        apc_kernels.accelerate(nn.Linear(2, 2), labels_only=True)
