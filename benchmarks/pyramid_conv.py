"""PSPNet's bottleneck, conv(features) + pyramid_conv(regions), beside the convolution of their concatenation.

    python -m benchmarks.pyramid_conv          the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Operations for 2048 channels of features and four scales of 512: the convolution of the concatenation has twice those
of the convolution of the features; pyramid_conv adds J/(h·w), about 1 %, and the interpolation of 36 rows and columns.
Bytes that have to move: features, regions and weight read, the result written; backward once more each way.
Memory is what the forward pass leaves to the backward one beyond parameters and arguments.
"""

import argparse

import pytest
import stock
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from cases import channels_last, nchw
from head_cases import BOTTLENECK, ConvCase, draw_conv
from torch import Tensor

import apc_kernels
from benchmarks.timing import paired, result_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FEATURES = 2048
CASE = ConvCase(8, 512, 512, (64, 64), 3) if DEVICE == "cuda" else BOTTLENECK
LAYOUTS = (channels_last,) if DEVICE == "cuda" else (nchw, channels_last)
COMPILED = (False, True) if DEVICE == "cuda" else (False,)  # PyTorch's side, in torch.compile as well
DIRECTIONS = ("forward", "forward+backward")


def bottleneck(features: Tensor, regions: Tensor, weight: Tensor) -> Tensor:
    last = features.is_contiguous(memory_format=torch.channels_last)
    pyramid = apc_kernels.pyramid_conv(
        regions,
        weight[:, features.shape[1] :],
        features.shape[2:],
        CASE.scales,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    return F.conv2d(features, weight[:, : features.shape[1]], padding=weight.shape[2] // 2) + pyramid


def concatenated(features: Tensor, regions: Tensor, weight: Tensor) -> Tensor:
    upsampled = stock.upsampled_pyramid(regions, features.shape[2:], CASE.scales)
    return F.conv2d(torch.cat([features, upsampled], 1), weight, padding=weight.shape[2] // 2)


def draw(layout, dtype: torch.dtype = DTYPE) -> tuple[list[Tensor], Tensor]:
    """Features, regions, weight, and a gradient of the result; of the size that initialisation gives them."""
    t = draw_conv(CASE, dtype, DEVICE)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(CASE.batch, FEATURES, *CASE.size, generator=generator).relu().to(DEVICE, dtype)
    weight = torch.randn(CASE.outputs, FEATURES, CASE.kernel, CASE.kernel, generator=generator).to(DEVICE, dtype)
    weight = torch.cat([weight / (9 * FEATURES) ** 0.5, t["weight"]], 1)
    return [layout(features), t["regions"], layout(weight)], layout(t["grad"])


def functions(layout, direction: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    leaves, grad = draw(layout)
    leaves = [leaf.requires_grad_(direction != "forward") for leaf in leaves]

    def step(function, leaves=leaves, grad=grad):
        def run():
            result = function(*leaves)
            return [result] if direction == "forward" else torch.autograd.grad(result, leaves, grad)

        return run

    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    ours, other = step(bottleneck), step(torch.compile(concatenated) if compiled else concatenated)
    for actual, exact, own in zip(ours(), step(concatenated, wide, grad.double())(), other(), strict=True):
        assert_accurate(actual.detach(), exact.detach(), own.detach(), direction)
    return ours, other


def kept(function, layout) -> int:
    """Bytes that the forward pass keeps for the backward one, parameters and arguments aside."""
    leaves, _ = draw(layout)
    mine = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*(leaf.requires_grad_() for leaf in leaves))
    return sum(storages.values())


def measure(layout, direction: str, compiled: bool = False, seconds: float = 2.0) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(layout, direction, compiled)
    case = ", ".join((direction, f"{FEATURES}+{len(CASE.scales)}*{CASE}", layout.__name__, str(DTYPE)[6:]))
    leaves, grad = draw(layout)
    moved = sum(tensor.nbytes for tensor in (*leaves, grad)) * (1 if direction == "forward" else 3)
    memory = {"memory_mib": kept(bottleneck, layout) / 2**20, "other_memory_mib": kept(concatenated, layout) / 2**20}
    beside = "conv of the concatenation" + (", torch.compile" if compiled else "")
    pair = paired(ours, other, DEVICE, seconds)
    return result_row("pyramid_conv", case, "PyTorch", beside, pair, moved, DEVICE, **memory), ours


@pytest.mark.parametrize("compiled", COMPILED, ids=("eager", "compile")[: len(COMPILED)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def bench_pyramid_conv(benchmark, layout, direction, compiled):
    row, ours = measure(layout, direction, compiled)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(f"PSPNet's bottleneck, {FEATURES}+{len(CASE.scales)}*{CASE}, {str(DTYPE)[6:]}, on {DEVICE}\n")
    print(f"{'':<36}{'ours ms':>9}{'PyTorch ms':>12}{'times':>7}{'ours MiB':>10}{'PyTorch MiB':>13}")
    for layout in LAYOUTS:
        for direction in DIRECTIONS:
            row, _ = measure(layout, direction, seconds=1.0)
            print(
                f"{layout.__name__ + ', ' + direction:<36}{row['ours_ms']:>9.2f}{row['other_ms']:>12.2f}"
                f"{row['ratio']:>7.1f}{row['memory_mib']:>10.1f}{row['other_memory_mib']:>13.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
