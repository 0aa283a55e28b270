"""Implements FusedConv2d: convolution, bias, addition and ReLU in one pass over the result, for inference on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc_kernels.ops.common import check_tensor, name_of
from apc_kernels.ops.conv3x3 import KERNELS, tiles
from apc_kernels.ops.operator import define

TILE = 4  # F(4×4, 3×3): 36 products instead of 144 for sixteen numbers of the result
LEAST_CHANNELS = 64  # with fewer, the transforms of tiles cost more than they save


class FusedConv2d(nn.Module):
    """Applies a convolution, adds a bias and another map, and applies ReLU, for inference on a CPU.

    Equivalent to:

        F.relu(F.conv2d(torch.cat(maps, 1), weight, bias, stride, padding, dilation, groups) + other)

    The result is written once, in channels_last, and read by none of the steps. Weights are laid out once, here. A 1×1
    convolution is one matrix product. A 3×3 convolution of 64 and more channels that keeps the map's size takes
    Winograd's F(4×4, 3×3), a quarter of the products; its error is about twice that of a direct convolution. PyTorch's
    convolution serves all others.

    Args:
        weight: (O, C / groups, k, k) in float32 or float64, on the CPU.
        bias: (O,), or None.
        stride, padding, dilation: One number each, for both axes.
        groups: Number of groups of channels, as in `torch.nn.Conv2d`.

    Example:
        >>> conv = apc_kernels.FusedConv2d(torch.randn(128, 64, 3, 3), padding=1)
        >>> y = conv(x, relu=True)
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        _check(weight, bias, groups)
        weight = weight.detach()
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.kernel_size = tuple(weight.shape[2:])
        self.kind = self._kind(weight)
        if self.kind == "tiles":
            weight = tiles.transformed(weight, TILE)
        elif self.kind == "rows":
            weight = tiles.panels(weight.flatten(1))
        else:
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _kind(self, weight: Tensor) -> str:
        """Returns what serves: rows of one matrix, Winograd's tiles, or PyTorch's convolution."""
        if self.groups != 1 or self.stride != 1 or KERNELS.select("conv3x3", weight) != "cpp":
            return "direct"
        if self.kernel_size == (1, 1) and self.padding == 0:
            return "rows"
        keeps_size = self.kernel_size == (3, 3) and self.padding == self.dilation
        return "tiles" if keeps_size and min(weight.shape[:2]) >= LEAST_CHANNELS else "direct"

    def forward(
        self,
        maps: Tensor | Sequence[Tensor],
        other: Tensor | None = None,
        *,
        relu: bool = False,
        overwrite: bool = False,
    ) -> Tensor:
        """Convolves one map (B, C, h, w), or several as if they were concatenated along the channels.

        Args:
            maps: One map or several, in the weight's dtype, in any layout; channels_last is read in place.
            other: A map of the result's shape to add, or None.
            relu: Apply ReLU at the end.
            overwrite: Write the result into `other`, if its layout is channels_last.

        Returns:
            (B, O, h', w'), in channels_last.
        """
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        self._check_maps(maps, other)
        if self.kind == "direct":
            x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
            return _direct(self, x, other, relu)
        x = maps[0]
        last = torch.channels_last
        maps = [m if m.stride(1) == 1 else m.contiguous(memory_format=last) for m in maps]
        add = False
        if overwrite and other is not None and other.is_contiguous(memory_format=last):
            out, other, add = other, None, True
        else:
            out = x.new_empty(x.shape[0], *x.shape[2:], self.out_channels).permute(0, 3, 1, 2)  # channels_last
            other = None if other is None else other.contiguous(memory_format=last)
        fused = _rows if self.kind == "rows" else _tiles
        fused(out, self.weight, self.bias, other, self.dilation, relu, add, maps)
        return out

    def _check_maps(self, maps: Sequence[Tensor], other: Tensor | None) -> None:
        if torch.compiler.is_exporting():
            raise RuntimeError("FusedConv2d cannot be exported: export the model that was prepared, not its copy")
        if not maps:
            raise ValueError("maps: expected at least one map, got none")
        for i, x in enumerate(maps):
            check_tensor(x, f"maps[{i}]")
            if x.dim() != 4 or x.dtype != self.weight.dtype or (x.shape[0], *x.shape[2:]) != _size(maps[0]):
                expected = f"(B, C, h, w) in {name_of(self.weight.dtype)}, of one batch and size"
                raise ValueError(f"maps[{i}]: expected {expected}, got {tuple(x.shape)} in {name_of(x.dtype)}")
        given = sum(x.shape[1] for x in maps)
        if given != self.in_channels:
            raise ValueError(f"maps: expected {self.in_channels} channels, got {given}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in maps):
            raise RuntimeError("FusedConv2d is not differentiable: call it under torch.no_grad(), or use F.conv2d")
        if (
            other is not None
            and self.kind != "direct"
            and other.shape != (maps[0].shape[0], self.out_channels, *maps[0].shape[2:])
        ):
            expected = (maps[0].shape[0], self.out_channels, *maps[0].shape[2:])
            raise ValueError(f"other: expected {expected}, got {tuple(other.shape)}")

    def extra_repr(self) -> str:
        size = "×".join(map(str, self.kernel_size))
        return f"{self.in_channels}, {self.out_channels}, {size}, {self.kind}"


def _size(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])


def _check(weight: Tensor, bias: Tensor | None, groups: int) -> None:
    check_tensor(weight, "weight")
    if weight.dim() != 4 or weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        given = f"{tuple(weight.shape)} in {name_of(weight.dtype)} on {weight.device}"
        raise ValueError(f"weight: expected (O, C, k, k) in float32 or float64 on the CPU, got {given}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias: expected ({weight.shape[0]},) in the weight's dtype, got {tuple(bias.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of {weight.shape[0]}, got {groups}")


def _direct(conv: FusedConv2d, x: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if other is not None:
        y += other
    return y.relu_() if relu else y


def _multiply_rows(
    out: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    dilation: int,
    relu: bool,
    add: bool,
    maps: Sequence[Tensor],
) -> None:
    rows = [tiles.as_rows(x) for x in maps]
    target, first = tiles.as_rows(out), 0
    for i, x in enumerate(rows):
        part, is_last = panels[:, :, first : first + x.shape[2]], i == len(rows) - 1
        first += x.shape[2]
        added = tiles.as_rows(other) if is_last and other is not None else None
        torch.ops.apc_kernels_cpp.products(
            x, part, bias if is_last else None, added, relu and is_last, add or i > 0, target
        )


def _multiply_tiles(
    out: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    dilation: int,
    relu: bool,
    add: bool,
    maps: Sequence[Tensor],
) -> None:
    tiles.convolve_prepared(maps, panels, dilation, bias, out if add else other, relu, out)


def _no_results(*_: Any) -> None:
    pass


_SCHEMA = (
    "(Tensor(a!) out, Tensor panels, Tensor? bias, Tensor? other, SymInt dilation, bool relu, bool add, Tensor[] maps)"
    " -> ()"
)
_rows = define("fused_conv1x1" + _SCHEMA, _multiply_rows, _no_results)
_tiles = define("fused_conv3x3" + _SCHEMA, _multiply_tiles, _no_results)
