"""Implements conv3x3: a 3×3 convolution of several maps, on a CPU with fewer than half of the multiplications."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from apc_kernels.dispatch import FLOATS, Kernels
from apc_kernels.ops.common import PLAIN, check_dtype, check_tensor, name_of, runs_eagerly, without_autocast
from apc_kernels.ops.conv3x3 import reference, tiles
from apc_kernels.ops.operator import define

KERNELS = Kernels(reference)

# torch.ops.aten's takes 2 µs more.
thnn_conv2d = torch._C._nn.thnn_conv2d  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]

# From these sizes on, tiles are faster than PyTorch's convolution on two threads (benchmarks/results). With fewer
# positions or channels the transforms, above all that of the weight, cost more than they save.
LEAST_CHANNELS, LEAST_POSITIONS = 128, 1024
MOST_TINY = 2**20  # multiplications: up to these, oneDNN's 40 µs a call are more than all others take
MAX_DILATION = 65536


def conv3x3(maps: Tensor | Sequence[Tensor], weight: Tensor, *, dilation: int = 1) -> Tensor:
    """Convolves several maps with one 3×3 weight as if they were concatenated, keeping their size.

        out[b, o, y, x] = Σ_c Σ_{i, j} weight[o, c, i, j] · maps[b, c, y + d·(i − 1), x + d·(j − 1)]

    Equivalent to:

        F.conv2d(torch.cat(maps, 1), weight, padding=dilation, dilation=dilation)

    The concatenation is not saved for backward. On a CPU, large maps take Winograd's F(2×2, 3×3) without any: 16
    products instead of 36 for four numbers of the result, with the accuracy of a convolution, since all factors of its
    transforms are 1 or 1/2. With a dilation d, tiles are read and written d positions apart. One convolution of
    PyTorch's serves GPUs, low precision, autocast, export, and maps of fewer than 128 channels or 1024 positions; the
    maps are concatenated for the time of the call.

    Args:
        maps: one (B, C, h, w) map or several, in float32, float64, bfloat16 or float16. They may differ in C, and under
            autocast in dtype.
        weight: (O, Σ C, 3, 3) in the maps' dtype.
        dilation: Distance d of the positions that the weight reads, 1 or more.

    Returns:
        (B, O, h, w) in the maps' dtype. From Winograd's tiles it is channels_last if the first map is, else contiguous,
        and differentiable once in maps and weight.
    """
    if not isinstance(maps, (Tensor, list, tuple)):
        raise TypeError(f"maps: expected a tensor or a sequence of them, got {type(maps).__name__}")
    maps = [maps] if isinstance(maps, Tensor) else list(maps)
    if type(dilation) is int and dilation == 1 and _are_tiny(maps, weight):
        x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        return thnn_conv2d(x, weight, (3, 3), None, (1, 1), (1, 1))
    check_tensors(maps, weight)
    if torch.compiler.is_exporting() or not by_tiles(maps, weight):
        _check(maps, weight, dilation)
        return reference.conv3x3(maps, weight, dilation)
    return _forward(weight, dilation, maps)


def _check(maps: Sequence[Tensor], weight: Tensor, dilation: int) -> None:
    check_maps(maps, weight, (3, 3))
    if isinstance(dilation, bool) or not isinstance(dilation, int | torch.SymInt):
        raise TypeError(f"dilation: expected an integer, got {dilation!r}")
    if not 1 <= dilation <= MAX_DILATION:
        raise ValueError(f"dilation: expected 1 to {MAX_DILATION}, got {dilation}")


def check_tensors(maps: Sequence[Tensor], weight: Tensor) -> None:
    for i, x in enumerate((*maps, weight)):
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            check_tensor(x, _name(i, maps))


def check_maps(maps: Sequence[Tensor], weight: Tensor, kernel: tuple[int, int]) -> None:
    """Checks several maps, and the weight of a convolution of all of them."""
    if not maps:
        raise ValueError("maps: expected at least one map, got none")
    if len(maps) == 1 and _fit(maps[0], weight, kernel):
        return
    for i, x in enumerate((*maps, weight)):
        if x.dim() != 4:
            raise ValueError(f"{_name(i, maps)}: expected 4 dimensions, got {x.dim()}: {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            check_dtype(x, _name(i, maps))
        if x.device != maps[0].device:
            raise ValueError(f"{_name(i, maps)}: expected a tensor on {maps[0].device}, got one on {x.device}")
    (batch, inputs, *size), dtype, device = maps[0].shape, maps[0].dtype, maps[0].device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # every map, to one dtype
    for i, x in enumerate(maps[1:], 1):
        images, channels, *own = x.shape
        if images != batch or own != size or (x.dtype != dtype and not casts):
            first, given = (f"{tuple(t.shape)} in {name_of(t.dtype)}" for t in (maps[0], x))
            raise ValueError(f"maps[{i}]: expected batch, size and dtype of maps[0], {first}, got {given}")
        inputs += channels
    if weight.dtype != dtype and not casts:
        raise ValueError(f"weight: expected the maps' dtype, {name_of(dtype)}, got {name_of(weight.dtype)}")
    if weight.shape[1:] != (inputs, *kernel) or weight.shape[0] == 0:
        size = ", ".join(map(str, kernel))
        raise ValueError(f"weight: expected (O, {inputs}, {size}), O > 0, got {tuple(weight.shape)}")


def _fit(x: Tensor, weight: Tensor, kernel: tuple[int, int]) -> bool:
    """Tells whether a map and a weight belong together, as they do in nearly every call."""
    if x.dim() != 4 or weight.dim() != 4 or x.dtype not in FLOATS:
        return False
    outputs, *others = weight.shape
    return others == [x.shape[1], *kernel] and outputs > 0 and x.dtype == weight.dtype and x.device == weight.device


def _name(i: int, maps: Sequence[Tensor]) -> str:
    return f"maps[{i}]" if i < len(maps) else "weight"


def by_tiles(maps: Sequence[Tensor], weight: Tensor) -> bool:
    """Tells whether tiles serve these maps and this weight, before they are checked against each other."""
    return (
        is_large(maps, weight, LEAST_CHANNELS, LEAST_POSITIONS)
        and maps[0].device.type == "cpu"
        and maps[0].dtype in (torch.float32, torch.float64)
        and weight.dtype == maps[0].dtype
        and not torch.is_autocast_enabled("cpu")
    )


def _are_tiny(maps: Sequence[Tensor], weight: Tensor) -> bool:
    """Tells whether PyTorch's own product takes less time than oneDNN, which it calls by default, takes to begin.

    Such maps fit together and fit the weight: they need no other check.
    """
    if not runs_eagerly() or torch.is_autocast_enabled("cpu"):
        return False
    for x in (weight, *maps):
        if type(x) not in PLAIN or x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
            return False
        if x.dim() != 4:
            return False
    outputs, inputs, *kernel = weight.shape
    if not maps or kernel != [3, 3] or not outputs or weight.stride()[1:] != (9, 3, 1):
        return False
    batch, _, *size = maps[0].shape
    for x in maps:
        images, channels, *own = x.shape
        inputs -= channels
        if images != batch or own != size or not x.is_contiguous():
            return False
    return inputs == 0 and batch * math.prod(size) * weight.numel() <= MOST_TINY


def is_large(maps: Sequence[Tensor], weight: Tensor, channels: int, positions: int) -> bool:
    """Tells whether maps and weight have four dimensions, and at least so many channels and positions."""
    if not maps or weight.dim() != 4 or min(weight.shape[:2]) < channels or any(x.dim() != 4 for x in maps):
        return False
    batch, _, height, width = maps[0].shape
    return batch * height * width >= positions


def _convolve(weight: Tensor, dilation: int, maps: Sequence[Tensor]) -> Tensor:
    result = _empty(weight, dilation, maps)
    with without_autocast(weight):
        if KERNELS.select("conv3x3", weight) == "reference":
            return result.copy_(reference.conv3x3(maps, weight, dilation))
        tiles.convolve(maps, weight, dilation, result)
    return result


def _empty(weight: Tensor, dilation: int, maps: Sequence[Tensor]) -> Tensor:
    _check(maps, weight, dilation)
    return empty_like(maps[0], weight.shape[0])


def _gradient_of_maps(grad: Tensor, weight: Tensor, dilation: int, channels: Sequence[int]) -> list[Tensor]:
    """Computes the gradients of maps with these numbers of channels."""
    grads = _empty_maps(grad, weight, dilation, channels)
    with without_autocast(weight):
        if KERNELS.select("conv3x3", weight) == "reference":
            transposed = weight.flip(2, 3).transpose(0, 1).split(list(channels))
            for each, w in zip(grads, transposed, strict=True):
                each.copy_(reference.conv3x3([grad], w, dilation))
        else:
            tiles.gradient_of_maps(grad, weight, dilation, grads)
    return grads


def _empty_maps(grad: Tensor, weight: Tensor, dilation: int, channels: Sequence[int]) -> list[Tensor]:
    return [empty_like(grad, count) for count in channels]


def _gradient_of_weight(grad: Tensor, dilation: int, maps: Sequence[Tensor]) -> Tensor:
    with without_autocast(grad):
        if KERNELS.select("conv3x3", grad) == "reference":
            shape = (grad.shape[1], sum(x.shape[1] for x in maps), 3, 3)
            cat = torch.cat(list(maps), 1)
            return conv2d_weight(cat, shape, grad, padding=dilation, dilation=dilation).contiguous()
        grad_weight = _empty_weight(grad, dilation, maps)
        tiles.gradient_of_weight(grad, maps, dilation, grad_weight)
        return grad_weight


def _empty_weight(grad: Tensor, dilation: int, maps: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(grad.shape[1], sum(x.shape[1] for x in maps), 3, 3)


def empty_like(x: Tensor, channels: int) -> Tensor:
    """Returns an empty map of x's batch and size with this number of channels, in x's layout."""
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def layout_of(x: Tensor) -> torch.memory_format:
    """Returns channels_last for a map in that layout, and contiguous_format for all others."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, ctx.dilation, maps = inputs
    ctx.save_for_backward(weight, *maps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, Sequence[Tensor | None]]:
    weight, *maps = ctx.saved_tensors
    of_weight, _, *of_maps = ctx.needs_input_grad
    if grad is None:
        return None, None, [None] * len(maps)
    grads = [None] * len(maps)
    if any(of_maps):
        computed = _backward_maps(grad, weight, ctx.dilation, [x.shape[1] for x in maps])
        grads = [g if wanted else None for g, wanted in zip(computed, of_maps, strict=True)]
    grad_weight = _backward_weight(grad, ctx.dilation, maps) if of_weight else None
    return grad_weight, None, grads


_forward = define(
    "conv3x3(Tensor weight, SymInt dilation, Tensor[] maps) -> Tensor",
    _convolve,
    _empty,
    backward=_backward,
    remember=_remember,
)
_backward_maps = define(
    "conv3x3_backward_maps(Tensor grad, Tensor weight, SymInt dilation, SymInt[] channels) -> Tensor[]",
    _gradient_of_maps,
    _empty_maps,
)
_backward_weight = define(
    "conv3x3_backward_weight(Tensor grad, SymInt dilation, Tensor[] maps) -> Tensor", _gradient_of_weight, _empty_weight
)
