"""Tests that every operation computes the lines of PyTorch that its docstring calls equivalent."""

import ast
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from arguments import arguments

import apc_kernels
from apc_kernels import info

WITHOUT = {"augment"}  # its resizing is OpenCV's


@pytest.mark.parametrize("operation", sorted(set(info.SERVED_BY) - WITHOUT))
def test_docstring(operation):
    function = getattr(apc_kernels, operation)
    _, _, text = inspect.getdoc(function).partition("Equivalent to")
    _, _, text = text.partition(":\n\n")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("    ")]
    *statements, last = ast.parse(textwrap.dedent("\n".join(lines))).body
    assert isinstance(last, ast.Expr) and lines[0] == text.splitlines()[0]

    # The argmax's dtype and the running statistics, which both sides would update, are not compared.
    names = vars(apc_kernels) | {"torch": torch, "F": F} | arguments(operation)
    exec(compile(ast.Module(statements, []), operation, "exec"), names)
    expected = eval(compile(ast.Expression(last.value), operation, "eval"), names)
    torch.testing.assert_close(function(**arguments(operation)), expected, check_dtype=operation != "upsample_argmax")
