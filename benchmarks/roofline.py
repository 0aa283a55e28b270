"""Measures every convolution of a prepared model beside what the machine could do at best, on a CPU.

    python -m benchmarks.roofline apcnet               one image of 512×512; a table in Markdown
    python -m benchmarks.roofline semantic_fpn --size 512 1024

A convolution takes at least the time of its multiplications at the rate of the fastest product of matrices, and at
least that of its bytes at the rate of the fastest copy; both rates are measured in the same run. Bytes are those of
maps, weights and results, each once: what Winograd's tiles write between is the implementation's own. The share is the
longer of the two times, in per cent of the measured one, which is that of the fastest call: a roof is what the machine
can do when nothing disturbs it. Layers of the same sizes stand in one row.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from stock_models import MODELS
from torch import Tensor, nn

from apc_kernels import FusedConv2d
from apc_kernels.ops.conv3x3 import tiles
from apc_kernels.ops.fused_conv import TILE
from apcnet import inference
from benchmarks.models import OURS, built
from benchmarks.timing import copy_bandwidth, time_one

CLASSES = 150
SIDE = 512  # of the square matrices whose product gives the machine's rate; all of them stay in the caches


@dataclass(frozen=True)
class Layer:
    """Describes a call of a convolution: what computes it, its numbers of channels, and the size of its result."""

    kind: str  # of FusedConv2d: rows, tiles or direct
    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    groups: int
    size: tuple[int, int]

    def __str__(self) -> str:
        extra = "".join(
            f", {name} {value}"
            for name, value in (("stride", self.stride), ("dilation", self.dilation), ("groups", self.groups))
            if value > 1
        )
        return f"{self.kernel}×{self.kernel}, {self.inputs} to {self.outputs}{extra}, {self.size[0]}×{self.size[1]}"

    @property
    def operations(self) -> int:
        """Returns the operations of a direct convolution of one image."""
        taps = self.kernel**2 * self.inputs // self.groups
        return 2 * taps * self.outputs * self.size[0] * self.size[1]

    @property
    def computed(self) -> int:
        """Returns the operations in products: tiles take 36 where a direct convolution takes 144."""
        if self.kind != "tiles":
            return self.operations
        apart = TILE * self.dilation
        count = self.dilation**2 * -(-self.size[0] // apart) * -(-self.size[1] // apart)
        return 2 * (TILE + 2) ** 2 * count * self.inputs * self.outputs


@dataclass
class Measured:
    """Holds what is measured of layers of one kind and size: bytes of a call, and the seconds of every call."""

    moved: int
    seconds: list[float]


def measure(model: nn.Module, images: Tensor, rounds: int) -> tuple[dict[Layer, Measured], float]:
    """Times all convolutions of a prepared model, and returns the shortest time of the whole model too."""
    found: dict[Layer, Measured] = defaultdict(lambda: Measured(0, []))
    started = []

    def before(conv: nn.Module, given: tuple) -> None:
        started.append(time.perf_counter())

    def after(conv: FusedConv2d, given: tuple, named: dict, result: Tensor) -> None:
        seconds = time.perf_counter() - started.pop()
        maps = [given[0]] if isinstance(given[0], Tensor) else list(given[0])
        others = (*given[1:], *named.values())
        read = [*maps, *(x for x in others if isinstance(x, Tensor)), conv.weight]
        size = (result.shape[2], result.shape[3])
        kernel, settings = conv.kernel_size[0], (conv.stride, conv.dilation, conv.groups)
        layer = Layer(conv.kind, conv.in_channels, conv.out_channels, kernel, *settings, size)
        found[layer].moved = sum(x.nbytes for x in (*read, result))
        found[layer].seconds.append(seconds)

    convolutions = [module for module in model.modules() if isinstance(module, FusedConv2d)]
    handles = [conv.register_forward_pre_hook(before) for conv in convolutions]
    handles += [conv.register_forward_hook(after, with_kwargs=True) for conv in convolutions]
    try:
        with torch.no_grad():
            model(images)
            found.clear()
            whole = min(time_one(lambda: model(images)) for _ in range(rounds))
    finally:
        for handle in handles:
            handle.remove()
    return dict(found), whole


def product_rate() -> float:
    """Measures the operations a second of the fastest of 20 products by the kernel that convolutions are made of."""
    left, right, out = torch.randn(3, 16, SIDE, SIDE)
    best = min(time_one(lambda: tiles.multiply(left, tiles.as_panels(right), out, add=False)) for _ in range(20))
    return 2 * 16 * SIDE**3 / best


def table(found: dict[Layer, Measured], whole: float, rounds: int, rate: float, bandwidth: float) -> list[str]:
    """Returns a table in Markdown, the slowest layers first."""
    lines = [
        "| layer | computed by | calls | ms | GFLOP | in products | GFLOP/s of these | MB | bound by | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    all_layers = floor_of_all = 0.0
    for layer, each in sorted(found.items(), key=lambda item: -len(item[1].seconds) * min(item[1].seconds)):
        calls, seconds = len(each.seconds) // rounds, min(each.seconds)
        by_products, by_bytes = layer.computed / rate, each.moved / bandwidth
        floor = max(by_products, by_bytes)
        all_layers, floor_of_all = all_layers + calls * seconds, floor_of_all + calls * floor
        cells = [
            str(layer),
            layer.kind,
            calls,
            f"{1e3 * calls * seconds:.1f}",
            f"{layer.operations * calls / 1e9:.1f}",
            f"{layer.computed * calls / 1e9:.1f}",
            f"{layer.computed / seconds / 1e9:.0f}",
            f"{each.moved * calls / 1e6:.0f}",
            "products" if by_products >= by_bytes else "bytes",
            f"{100 * floor / seconds:.0f} %",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    share = f"{100 * floor_of_all / all_layers:.0f} %"
    lines.append(f"| all convolutions | | | {1e3 * all_layers:.1f} | | | | | | {share} |")
    lines.append(f"| the rest | | | {1e3 * (whole - all_layers):.1f} | | | | | | |")
    return lines


def report(model: str, size: Sequence[int], rounds: int) -> str:
    """Measures a model on one image, and returns the rates of the machine and the table."""
    network = inference.prepare(built(model, CLASSES)[OURS].eval())
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    rate, bandwidth = product_rate(), copy_bandwidth(torch.get_num_threads())
    found, whole = measure(network, images, rounds)
    rate = max(rate, product_rate())
    about = f"{model}, 1x3x{size[0]}x{size[1]}, {CLASSES} classes, float32, {torch.get_num_threads()} threads"
    machine = (
        f"{whole * 1e3:.0f} ms in all; products at best {rate / 1e9:.0f} GFLOP/s, a copy {bandwidth / 1e9:.1f} GB/s"
    )
    return "\n".join([f"{about}: {machine}", "", *table(found, whole, rounds, rate, bandwidth)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS, help="Measure this model.")
    parser.add_argument("--size", nargs=2, type=int, default=(512, 512), help="Take an image of this height and width.")
    parser.add_argument("--rounds", type=int, default=7, help="Take the fastest of this many rounds.")
    options = parser.parse_args()
    print(report(options.model, options.size, options.rounds))


if __name__ == "__main__":
    main()
