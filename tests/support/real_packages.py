"""Imports the packages of others that tests compare with, or skips the test.

PyPI's torchvision is built for a CUDA build of torch. Beside a CPU build it cannot load its compiled operators, and its
import fails where it gives their shapes: two declarations are enough for models.
"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_operators = None  # a library lives as long as its object


def imported(name: str) -> ModuleType:
    """Imports timm, torchvision or another package, or skips the test."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    if importlib.util.find_spec("torchvision") is not None:  # the others import it
        _import_torchvision()
    return importlib.import_module(name)


def _import_torchvision() -> None:
    global _operators
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        _operators = torch.library.Library("torchvision", "DEF")
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
