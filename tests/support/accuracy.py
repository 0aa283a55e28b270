"""Checks results by one rule: at most twice PyTorch's own error, plus four units in the last place.

Errors are taken against float64. PyTorch's own is that of the stock composition in the same dtype on the same input;
the unit is that of the tensor's largest magnitude. Scalars, which have no larger neighbour to hide behind, get eight.
"""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def max_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item() if actual.numel() else 0.0


def unit(exact: Tensor, dtype: torch.dtype) -> float:
    """Returns one unit in the last place of the largest magnitude, in a dtype."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(largest).frexp().exponent.item() / 2


def assert_accurate(actual: Tensor, exact: Tensor, pytorch: Tensor, name: str) -> None:
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == pytorch.dtype, f"{name}: {actual.dtype}, expected {pytorch.dtype}"
    assert exact.dtype == torch.float64 and exact.isfinite().all(), f"{name}: the float64 result is no yardstick"
    allowed = 2 * max_error(pytorch, exact) + (8 if actual.dim() == 0 else 4) * unit(exact, actual.dtype)
    assert actual.isfinite().all(), f"{name}: not finite"
    assert max_error(actual, exact) <= allowed, f"{name}: error {max_error(actual, exact):.3g}, allowed {allowed:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool((a.contiguous().view(integer) == b.contiguous().view(integer)).all())
