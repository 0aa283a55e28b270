"""conv3x3 beside PyTorch's convolution, on the bottlenecks of the heads.

    python -m benchmarks.conv3x3               the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Operations: 2·9·O·C for each position directly; by tiles 2·4·O·C, which is what is counted here, and transforms of 4
numbers for each of the maps and of the result; three times as many with the backward pass. Bytes that have to move:
maps and weight read, the result written; in the other direction both once more. By tiles four times the maps and the
result are written and read again, block by block, and the weight 16/9 times.
Memory is what a call needs at its peak beyond its arguments, results included.
On a GPU both sides are PyTorch's convolution: there is nothing to compare.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels
from benchmarks import setting
from benchmarks.memory import peak_of_side, peaks
from benchmarks.scaling import BATCHES, SIDES, THREADS, Point, points, scaled
from benchmarks.timing import paired, result_row


@dataclass(frozen=True)
class Case:
    """Maps with so many channels each, and the channels of the result."""

    batch: int
    channels: tuple[int, ...]
    outputs: int
    size: tuple[int, int] = (64, 64)

    def __str__(self) -> str:
        return f"{self.batch}x{'+'.join(map(str, self.channels))}x{self.size[0]}x{self.size[1]} to {self.outputs}"


APCNET = "APCNet's bottleneck"
CASES = {
    "EncNet's and PSPNet's bottleneck": Case(2, (2048,), 512),
    APCNET: Case(2, (2048, 512, 512, 512, 512), 512),
    "auxiliary head": Case(2, (1024,), 256),
    "Semantic FPN": Case(2, (256,), 128),
    "smallest": Case(1, (128,), 128),
}
NAMES = [pytest.param(name, marks=setting.long if name == APCNET else ()) for name in CASES]
BASE = Case(2, (512,), 512)
SCALING = [
    *points(BASE, batch=BATCHES[:3], size=SIDES, threads=THREADS),
    *(Point("channels", n, Case(2, (n,), 512)) for n in (128, 256, 512, 1024)),
]
here_tiles_serve = pytest.mark.skipif(setting.ON_GPU, reason="needs no GPU: there it is PyTorch's convolution")


def draw(case: Case) -> tuple[list[Tensor], Tensor]:
    """Maps and weight, of the size that initialisation gives them, and a gradient of the result."""
    generator, total = torch.Generator().manual_seed(0), sum(case.channels)
    maps = [torch.randn(case.batch, c, *case.size, generator=generator).relu() for c in case.channels]
    weight = torch.randn(case.outputs, total, 3, 3, generator=generator) / (9 * total) ** 0.5
    return [*maps, weight], torch.randn(case.batch, case.outputs, *case.size, generator=generator)


def concatenated(maps: list[Tensor], weight: Tensor) -> Tensor:
    return F.conv2d(maps[0] if len(maps) == 1 else torch.cat(maps, 1), weight, padding=1)


def step(function, leaves: list[Tensor], grad: Tensor, direction: str):
    leaves = [leaf.requires_grad_(direction != "forward") for leaf in leaves]

    def run():
        result = function(leaves[:-1], leaves[-1])
        return [result] if direction == "forward" else torch.autograd.grad(result, leaves, grad)

    return run


def functions(case: Case, direction: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    given = *draw(case), direction
    ours, other = step(apc_kernels.conv3x3, *given), step(concatenated, *given)
    for actual, own in zip(ours(), other(), strict=True):  # tests hold both to float64, which takes minutes here
        if not (actual - own).abs().max() <= 1e-5 * own.abs().max():
            raise RuntimeError(f"{case}, {direction}: not what PyTorch computes")
    return ours, other


def measure(name: str, case: Case, direction: str, **more: float) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(case, direction)
    (*maps, weight), grad = draw(case)
    ways = 1 if direction == "forward" else 3
    counts = (
        ways * sum(t.nbytes for t in (*maps, weight, grad)),
        ways * 8 * case.outputs * sum(case.channels) * case.batch * case.size[0] * case.size[1],
    )
    about = ", ".join(filter(None, (direction, name, str(case), "float32")))
    pair = paired(ours, other, rounds=3)
    return result_row("conv3x3", about, "cpp", "F.conv2d", pair, *counts, dtype=torch.float32, **more), ours


def memory(name: str, direction: str) -> dict[str, float]:
    return peaks("benchmarks.conv3x3", name, direction)


@here_tiles_serve
@setting.directions
@pytest.mark.parametrize("name", NAMES)
def bench_conv3x3(benchmark, name, direction):
    setting.record(benchmark, *measure(name, CASES[name], direction, **memory(name, direction)))


@here_tiles_serve
@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure("", point.case, "forward+backward")
        setting.record(benchmark, point.row(row), ours)


def peak_of(name: str, direction: str, side: str) -> int:
    def ready(function, case: Case):
        return step(function, *draw(case), direction)

    return peak_of_side(side, apc_kernels.conv3x3, concatenated, ready, CASES[name], CASES["smallest"])


def main() -> None:
    settings = itertools.product(CASES, setting.DIRECTIONS)
    setting.print_rows("conv3x3", (measure(name, CASES[name], way, **memory(name, way))[0] for name, way in settings))


if __name__ == "__main__":
    main()
