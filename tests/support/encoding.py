"""Compares encode and its gradients with float64 and with the residuals written out in PyTorch."""

import stock
import torch
from accuracy import assert_accurate

import apc_kernels

NAMES = ("x", "codewords", "scale")


def with_gradients(function, tensors):
    """Returns the result and the gradients of the tensors in NAMES, for the gradient `grad` of the result."""
    leaves = [tensors[name].detach().requires_grad_() for name in NAMES]
    result = function(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves, tensors["grad"])


def check(tensors, name):
    """Checks that results and gradients are as accurate as PyTorch's."""
    actual = with_gradients(apc_kernels.encode, tensors)
    exact = with_gradients(stock.encode, {name: t.double() for name, t in tensors.items()})
    pytorch = with_gradients(stock.encode, tensors)
    for ours, true, own, part in zip(actual, exact, pytorch, ("result", *NAMES), strict=True):
        assert_accurate(ours, true, own, f"{name} {part}")
