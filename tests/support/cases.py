"""Lists the hard cases once: tests run all of them, benchmarks the large ones.

Sizes: 1; odd; around the blocks of 64 columns and channels; not divisible by 2, 3 and 6; smaller than a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MapCase:
    """Describes a feature map and the scales to pool it at."""

    shape: tuple[int, int, int, int]
    scales: tuple[int, ...] = (1, 2, 3, 6)

    def __str__(self) -> str:
        usual = self.scales == MapCase.scales
        return "x".join(map(str, self.shape)) + ("" if usual else f", scales {'.'.join(map(str, self.scales))}")


MAPS = [
    MapCase((2, 8, 12, 18)),  # divisible by every scale: no bins overlap
    MapCase((2, 5, 13, 17)),  # odd
    MapCase((1, 3, 1, 1)),
    MapCase((2, 4, 1, 9)),
    MapCase((2, 16, 7, 1)),  # both NCHW and channels_last
    MapCase((1, 1, 10, 11)),
    MapCase((1, 64, 9, 64)),  # exactly one block
    MapCase((1, 65, 5, 65)),  # one more than a block
    MapCase((1, 72, 6, 136)),  # several blocks, in vectors of 8
    MapCase((2, 3, 4, 5), (7, 2)),  # a scale larger than the map
    MapCase((1, 2, 3, 150), (20, 5)),
    MapCase((3, 6, 8, 8), (1,)),
    MapCase((1, 8, 64, 64), (1,)),  # sums long enough for their order to matter
    MapCase((1, 3, 128, 256), (1, 2)),
    MapCase((1, 2050, 3, 5), (2,)),  # more channels than the CPU takes at once in channels_last
    MapCase((1, 6, 8, 8), (8,)),  # the identity
    MapCase((2, 2, 11, 6), (3, 3, 1)),  # a scale twice, in no order
    MapCase((0, 4, 6, 6)),
    MapCase((2, 0, 6, 6)),
]
LARGE_MAPS = [
    MapCase((2, 2048, 64, 64)),  # 512x512 at stride 8
    MapCase((2, 2048, 65, 63)),
    MapCase((1, 2048, 97, 97)),  # 769x769 at stride 8
    MapCase((2, 512, 64, 128)),  # 512x1024 at stride 8
]


def draw(
    case: MapCase, layout: Callable = lambda x: x, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Draws a map and a gradient of its pooled result, with the same values for every layout."""
    generator = torch.Generator().manual_seed(sum(case.shape))
    x = torch.randn(case.shape, generator=generator).to(device, dtype)
    grad = torch.randn(*case.shape[:2], sum(s * s for s in case.scales), generator=generator).to(device, dtype)
    return layout(x), grad


def with_gradient(function: Callable, x: Tensor, scales: Sequence[int], grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    result = function(x, scales)
    return result.detach(), torch.autograd.grad(result, x, grad)[0]


def nchw(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x: Tensor) -> Tensor:
    """Copies a map into a window of a larger one: all axes have neighbours, and nothing is aligned."""
    return _window(torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device), x)


def sliced_channels_last(x: Tensor) -> Tensor:
    larger = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    return _window(larger.contiguous(memory_format=torch.channels_last), x)


def transposed(x: Tensor) -> Tensor:
    """Stores rows and columns exchanged, so that every kernel needs a copy."""
    return x.mT.contiguous().mT


def even_window(x: Tensor) -> Tensor:
    """Copies a map into a window whose strides and start are multiples of 16 bytes; its sizes need not be."""
    larger = torch.full([n + 16 - n % 8 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    return larger[tuple(slice(8 if i == 3 else 0, (8 if i == 3 else 0) + n) for i, n in enumerate(x.shape))].copy_(x)


LAYOUTS: Sequence[Callable[[Tensor], Tensor]] = [
    nchw,
    channels_last,
    sliced,
    sliced_channels_last,
    even_window,
    transposed,
]


def _window(larger: Tensor, x: Tensor) -> Tensor:
    window = larger[tuple(slice(1, n + 1) for n in x.shape)]
    return window.copy_(x)


@dataclass(frozen=True)
class ContextCase:
    """Describes a map with `channels` for each scale, and the scales of the regions it is compared with."""

    batch: int
    channels: int
    size: tuple[int, int]
    scales: tuple[int, ...] = (1, 2, 3, 6)

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size[0]}x{self.size[1]}-{'.'.join(map(str, self.scales))}"


CONTEXTS = [
    ContextCase(2, 8, (12, 18)),
    ContextCase(2, 5, (13, 17)),  # odd
    ContextCase(1, 1, (1, 1)),
    ContextCase(2, 3, (1, 9), (2,)),
    ContextCase(1, 4, (7, 1), (3, 1)),  # both NCHW and channels_last
    ContextCase(1, 16, (8, 16), (6,)),  # exactly one block of positions
    ContextCase(1, 17, (3, 43), (6, 4)),  # one more than a block of positions or channels
    ContextCase(1, 64, (10, 26)),  # several blocks
    ContextCase(1, 33, (31, 37), (1, 2)),  # several chunks of positions
    ContextCase(3, 6, (5, 5), (8,)),
    ContextCase(1, 7, (6, 7), (3, 3, 1)),  # a scale twice, in no order
    ContextCase(1, 130, (4, 5), (2,)),  # more channels than any block
    ContextCase(0, 4, (6, 6)),
]
WIDE_CONTEXTS = [ContextCase(1, 5, (6, 7), (9, 1)), ContextCase(1, 3, (5, 5), (32,))]  # more than 64 regions a scale


def draw_context(
    case: ContextCase, layout: Callable = lambda x: x, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Draws all arguments of adaptive_context and a gradient of its result, with the same values for every layout.

    The map is what a ReLU leaves, as in the models; affinities spread over (0, 1).
    """
    generator = torch.Generator().manual_seed(sum(case.size) + case.channels)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    rows, channels = sum(s * s for s in case.scales), len(case.scales) * case.channels

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": normal(case.batch, channels, *case.size).relu(),
        "regions": normal(case.batch, rows, case.channels),
        "weight": normal(rows, case.channels) * 2 / case.channels**0.5,
        "bias": normal(case.batch, rows),
        "shift": normal(case.batch, channels),
        "center": torch.rand(case.batch, rows, generator=generator),
        "grad": normal(case.batch, channels, *case.size),
    }
    tensors = {name: t.to(device, dtype if name in ("x", "grad") else working) for name, t in tensors.items()}
    return tensors | {"x": layout(tensors["x"]), "grad": layout(tensors["grad"])}


def draw_norm(
    case: ContextCase, layout: Callable = lambda x: x, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Draws the tensors of adaptive_context_norm and a gradient of its result.

    The map is positive throughout: where it is 0, the module's last ReLU and the fused one differ in the gradient.
    """
    t = draw_context(case, layout, dtype, device)
    generator = torch.Generator().manual_seed(case.channels)
    channels = t["x"].shape[1]

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(t["weight"])

    def norm(name):
        parameters = {"weight": 1 + 0.3 * normal(channels), "bias": 0.5 * normal(channels)}
        running = {"running_mean": 0.3 * normal(channels), "running_var": 0.5 + normal(channels).square()}
        return {f"{name}.{field}": tensor for field, tensor in (parameters | running).items()}

    convolutions = {name: normal(channels, case.channels) / case.channels**0.5 for name in ("projection", "guide")}
    small = {
        "x": layout(t["x"] + 2**-6),
        "regions": t["regions"].relu(),
        "weight": t["weight"],
        "bias": t["bias"][:1].flatten(),
    }
    return small | convolutions | norm("norm") | norm("guide_norm") | {"grad": t["grad"]}
