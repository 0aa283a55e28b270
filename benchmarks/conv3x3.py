"""conv3x3 beside PyTorch's convolution, on the bottlenecks of the heads.

    python -m benchmarks.conv3x3               the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Operations: 2·9·O·C for each position directly; by tiles 2·4·O·C, and transforms of 4 numbers for each of the maps and
of the result. Bytes that have to move: maps and weight read, the result written; in the other direction both once more.
By tiles four times the maps and the result are written and read again, block by block, and the weight 16/9 times.
On a GPU both sides are PyTorch's convolution: there is nothing to compare.
"""

import argparse

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels
from benchmarks.timing import paired, result_row

CASES = {  # batch, channels of each map, outputs, size
    "EncNet's and PSPNet's bottleneck": (2, (2048,), 512, (64, 64)),
    "APCNet's bottleneck": (2, (2048, 512, 512, 512, 512), 512, (64, 64)),
    "auxiliary head": (2, (1024,), 256, (64, 64)),
    "Semantic FPN": (2, (256,), 128, (64, 64)),
    "smallest": (1, (128,), 128, (32, 32)),
}
DIRECTIONS = ("forward", "forward+backward")


def draw(batch: int, channels: tuple[int, ...], outputs: int, size: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """Maps and weight, of the size that initialisation gives them, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, c, *size, generator=generator).relu() for c in channels]
    weight = torch.randn(outputs, sum(channels), 3, 3, generator=generator) / (9 * sum(channels)) ** 0.5
    return [*maps, weight], torch.randn(batch, outputs, *size, generator=generator)


def concatenated(maps: list[Tensor], weight: Tensor) -> Tensor:
    return F.conv2d(maps[0] if len(maps) == 1 else torch.cat(maps, 1), weight, padding=1)


def functions(name: str, direction: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    leaves, grad = draw(*CASES[name])
    leaves = [leaf.requires_grad_(direction != "forward") for leaf in leaves]

    def step(function):
        def run():
            result = function(leaves[:-1], leaves[-1])
            return [result] if direction == "forward" else torch.autograd.grad(result, leaves, grad)

        return run

    ours, other = step(apc_kernels.conv3x3), step(concatenated)
    for actual, own in zip(ours(), other(), strict=True):  # tests hold both to float64, which takes minutes here
        if not (actual - own).abs().max() <= 1e-5 * own.abs().max():
            raise RuntimeError(f"{name}, {direction}: not what PyTorch computes")
    return ours, other


def measure(name: str, direction: str, seconds: float = 2.0) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(name, direction)
    batch, channels, outputs, size = CASES[name]
    tensors, grad = draw(*CASES[name])
    moved = sum(t.nbytes for t in (*tensors, grad)) * (1 if direction == "forward" else 3)
    case = f"{direction}, {name}, {batch}x{'+'.join(map(str, channels))}x{size[0]}x{size[1]} to {outputs}, float32"
    pair = paired(ours, other, "cpu", seconds)
    return result_row("conv3x3", case, "cpp", "F.conv2d", pair, moved, "cpu"), ours


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU: there it is PyTorch's convolution")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CASES)
def bench_conv3x3(benchmark, name, direction):
    row, ours = measure(name, direction)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(f"conv3x3 on cpu, {torch.get_num_threads()} threads\n")
    print(f"{'':<52}{'ours ms':>9}{'PyTorch ms':>12}{'times':>7}")
    for name in CASES:
        for direction in DIRECTIONS:
            row, _ = measure(name, direction, seconds=1.0)
            line = f"{row['ours_ms']:>9.1f}{row['other_ms']:>12.1f}{row['ratio']:>7.2f}"
            print(f"{name + ', ' + direction:<52}{line}", flush=True)


if __name__ == "__main__":
    main()
