"""Imports the packages of others that tests compare with, or skips the test.

PyPI's torchvision is built for a CUDA build of torch. Beside a CPU build it lacks its compiled operators, and its
import fails where it gives their shapes: two declarations are enough for models.
"""

import importlib
from types import ModuleType

import pytest
import torch

_operators = None  # a library lives as long as its object


def imported(name: str) -> ModuleType:
    """Imports timm or torchvision, or skips the test."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    _declare_operators()
    return importlib.import_module(name)


def _declare_operators() -> None:
    global _operators
    if _operators is None and importlib.util.find_spec("torchvision") is not None and torch.version.cuda is None:
        _operators = torch.library.Library("torchvision", "FRAGMENT")
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
