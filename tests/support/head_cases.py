"""Lists the hard cases of pyramids, encode, conv1x1 and conv3x3: tests run all, benchmarks the large ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvCase:
    """Describes regions with channels for each scale, convolved to the channels of a map."""

    batch: int
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: int
    scales: tuple[int, ...] = (1, 2, 3, 6)
    align_corners: bool = False

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.channels}-{self.outputs}x{self.size[0]}x{self.size[1]}-{self.kernel}"
        return f"{sizes}-{'.'.join(map(str, self.scales))}{'-corners' if self.align_corners else ''}"


CONVS = [
    ConvCase(2, 8, 6, (12, 18), 3),
    ConvCase(2, 5, 3, (13, 17), 3),  # odd
    ConvCase(2, 5, 3, (13, 17), 3, align_corners=True),
    ConvCase(1, 4, 4, (10, 7), 1),  # no taps to shift
    ConvCase(1, 3, 2, (9, 8), 5, (6, 4)),
    ConvCase(1, 3, 2, (2, 3), 7, (2, 1)),  # a kernel larger than the map: mostly padding
    ConvCase(1, 3, 2, (4, 5), 3, (7, 9)),  # scales larger than the map
    ConvCase(1, 3, 2, (4, 5), 3, (7, 9), True),
    ConvCase(1, 1, 1, (1, 1), 3),
    ConvCase(2, 3, 2, (1, 9), 3, (3, 3, 1)),  # a scale twice, in no order
    ConvCase(3, 2, 5, (8, 8), 3, (1,)),
    ConvCase(1, 3, 2, (6, 6), 3, (6,)),  # the identity
    ConvCase(1, 3, 2, (6, 6), 3, (6,), True),
    ConvCase(0, 3, 2, (6, 7), 3),
]
BOTTLENECK = ConvCase(1, 512, 512, (64, 64), 3)  # of PSPNet: beside 2048 channels of features


def draw_conv(case: ConvCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """Draws regions, weight, and a gradient of the result."""
    generator = torch.Generator().manual_seed(case.channels + sum(case.size))
    inputs = len(case.scales) * case.channels
    tensors = {
        "regions": torch.randn(case.batch, case.channels, sum(s * s for s in case.scales), generator=generator),
        "weight": torch.randn(case.outputs, inputs, case.kernel, case.kernel, generator=generator)
        / (inputs * case.kernel**2) ** 0.5,
        "grad": torch.randn(case.batch, case.outputs, *case.size, generator=generator),
    }
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def draw_bottleneck(
    case: ConvCase, layout: Callable, dtype: torch.dtype, device: str, features: int = 2048
) -> dict[str, Tensor]:
    """Draws features, regions, the weight of both as initialised, and a gradient of the result."""
    t = draw_conv(case, dtype, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, features, *case.size, generator=generator).relu().to(device, dtype)
    weight = torch.randn(case.outputs, features, case.kernel, case.kernel, generator=generator).to(device, dtype)
    weight = torch.cat([weight / (9 * features) ** 0.5, t["weight"]], 1)
    return {"x": layout(x), "regions": t["regions"], "weight": layout(weight), "grad": layout(t["grad"])}


@dataclass(frozen=True)
class ReduceCase:
    """Describes regions of several scales, whose channels are reduced."""

    batch: int
    channels: int
    outputs: int
    scales: tuple[int, ...] = (1, 2, 3, 6)

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}-{self.outputs}-{'.'.join(map(str, self.scales))}"


REDUCTION = ReduceCase(3, 5, 3)  # of two values, a batch norm's gradient is little more than rounding errors
REDUCTIONS = [
    REDUCTION,
    ReduceCase(4, 33, 17),  # past a panel, and past the channels of a unit
    ReduceCase(3, 300, 9),  # sums in two pieces
    ReduceCase(5, 32, 8),  # columns of a panel and a half
    ReduceCase(1, 4, 3, (6, 2, 2)),  # a scale twice, in no order
    ReduceCase(4, 1, 1, (1,)),
    ReduceCase(2, 3, 4, (9,)),
]
POOLED = ReduceCase(8, 2048, 512)  # of PSPNet and APCNet


def draw_reduction(case: ReduceCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """Draws regions, a gradient of the result, and weights and batch norms of all scales, one below the other."""
    generator = torch.Generator().manual_seed(case.channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    rows, count = sum(s * s for s in case.scales), len(case.scales)
    tensors = {
        "regions": normal(case.batch, case.channels, rows).to(dtype),
        "grad": normal(case.batch, case.outputs, rows).to(dtype),
        "weights": (normal(count, case.outputs, case.channels, 1, 1) / case.channels**0.5).to(dtype),
        "gammas": normal(count, case.outputs).to(wide),
        "betas": normal(count, case.outputs).to(wide),
        "means": normal(count, case.outputs).to(wide),
        "variances": (normal(count, case.outputs).square() + 0.5).to(wide),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class MapsCase:
    """Describes maps with channels each, convolved together to channels of one map, and the device."""

    batch: int
    channels: tuple[int, ...]
    outputs: int
    where: str = ""
    size: tuple[int, int] = (64, 64)

    def __str__(self) -> str:
        sizes = f"{self.batch}x{'+'.join(map(str, self.channels))}x{self.size[0]}x{self.size[1]} to {self.outputs}"
        return ", ".join(filter(None, (self.where, sizes)))


SIDE_BY_SIDE = [
    MapsCase(2, (2048,), 512, "EncNet's and PSPNet's bottleneck"),
    MapsCase(2, (1024,), 256, "auxiliary head"),
    MapsCase(2, (256,), 128, "Semantic FPN"),
    MapsCase(1, (128,), 128, "smallest"),
    MapsCase(2, (2048, 512, 512, 512, 512), 512, "APCNet's bottleneck"),
]

PRODUCTS = [
    MapsCase(2, (2048,), 2048, "APCNet's reduction"),
    MapsCase(2, (1024,), 256, "a block of ResNet-50's third stage"),
    MapsCase(2, (512, 512, 512), 512, "three maps"),
]


def draw_products(case: MapsCase) -> dict[str, Tensor]:
    """Draws the same for a 1×1 weight, in channels_last."""
    tensors = draw_maps(case)
    tensors["weight"] = 3 * tensors["weight"][:, :, :1, :1]
    return {name: t.contiguous(memory_format=torch.channels_last) for name, t in tensors.items()}


def draw_maps(case: MapsCase) -> dict[str, Tensor]:
    """Draws maps, a weight scaled as initialised, and a gradient of the result."""
    generator, total = torch.Generator().manual_seed(0), sum(case.channels)
    maps = [torch.randn(case.batch, c, *case.size, generator=generator).relu() for c in case.channels]
    weight = torch.randn(case.outputs, total, 3, 3, generator=generator) / (9 * total) ** 0.5
    grad = torch.randn(case.batch, case.outputs, *case.size, generator=generator)
    return {f"map {i}": x for i, x in enumerate(maps)} | {"weight": weight, "grad": grad}


@dataclass(frozen=True)
class CodeCase:
    """Describes a map with channels, and a number of codewords."""

    batch: int
    channels: int
    size: tuple[int, int]
    codewords: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size[0]}x{self.size[1]}-{self.codewords}"


CODES = [
    CodeCase(2, 8, (6, 9), 4),
    CodeCase(2, 13, (7, 5), 5),
    CodeCase(1, 1, (1, 1), 3),
    CodeCase(2, 6, (5, 4), 1),  # nothing to choose from
    CodeCase(1, 4, (1, 40), 7),
    CodeCase(3, 64, (16, 16), 32),
    CodeCase(1, 16, (64, 64), 80),  # long sums over codewords
    CodeCase(0, 4, (3, 3), 5),
]
ENCODER = CodeCase(1, 512, (64, 64), 32)  # of EncNet


def draw_code(
    case: CodeCase, layout: Callable = lambda x: x, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Draws features, codewords and scales as EncNet initialises them, and a gradient of the result.

    Squared distances are about 2 and scales between −1 and 0, so that every codeword has a share of every position.
    """
    generator = torch.Generator().manual_seed(case.channels + case.codewords)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(case.batch, case.channels, *case.size, generator=generator) / case.channels**0.5
    small = {
        "codewords": torch.randn(case.codewords, case.channels, generator=generator) / case.channels**0.5,
        "scale": -torch.rand(case.codewords, generator=generator),
        "grad": torch.randn(case.batch, case.codewords, case.channels, generator=generator),
    }
    return {"x": layout(x.to(device, dtype))} | {name: tensor.to(device, working) for name, tensor in small.items()}
