"""The hard cases, written once: tests run all of them, benchmarks the large ones.

Sizes: 1; odd; around the blocks of 64 columns and channels; not divisible by 2, 3 and 6; smaller than a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MapCase:
    """A feature map and the scales to pool it at."""

    shape: tuple[int, int, int, int]
    scales: tuple[int, ...] = (1, 2, 3, 6)

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{'.'.join(map(str, self.scales))}"


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
    """A map and a gradient of its pooled result: the same values for every layout."""
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
    """A window of a larger map: rows, columns and channels all have neighbours, and nothing is aligned."""
    return _window(torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device), x)


def sliced_channels_last(x: Tensor) -> Tensor:
    larger = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    return _window(larger.contiguous(memory_format=torch.channels_last), x)


def transposed(x: Tensor) -> Tensor:
    """Rows side by side: no kernel reads it where it lies."""
    return x.mT.contiguous().mT


def even_window(x: Tensor) -> Tensor:
    """A window whose strides and start are multiples of 16 bytes; its sizes need not be."""
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
