"""PSPNet's bottleneck, conv(features) + pyramid_conv(regions), beside the convolution of their concatenation.

    python -m benchmarks.pyramid_conv          the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Operations for 2048 channels of features and four scales of 512: the convolution of the concatenation has twice those
of the convolution of the features, 2·9·2048·512 for each position, three times as many with the backward pass;
pyramid_conv adds J/(h·w), about 1 %, and the interpolation of 36 rows and columns.
Bytes that have to move: features, regions and weight read, the result written; backward once more each way.
Memory is what a call needs at its peak beyond its arguments, results included; beside it stands what the forward pass
keeps for the backward one beyond parameters and arguments.
"""

import itertools

import stock
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from head_cases import BOTTLENECK, ConvCase, draw_conv
from torch import Tensor

import apc_kernels
from benchmarks import setting
from benchmarks.memory import peak_of_side, peaks
from benchmarks.scaling import BATCHES, CHANNELS, COUNTS, SIDES, THREADS, points, scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, LAYOUTS, here, name_of
from benchmarks.timing import paired, result_row

FEATURES = here(2048, 2048, 16)
CASE = here(BOTTLENECK, ConvCase(8, 512, 512, (64, 64), 3), ConvCase(2, 4, 4, (6, 6), 3))
SCALING = points(CASE, batch=BATCHES[:3], size=SIDES, channels=CHANNELS[:3], scales=COUNTS, threads=THREADS)


def bottleneck(features: Tensor, regions: Tensor, weight: Tensor, scales: tuple[int, ...]) -> Tensor:
    last = features.is_contiguous(memory_format=torch.channels_last)
    pyramid = apc_kernels.pyramid_conv(
        regions,
        weight[:, features.shape[1] :],
        features.shape[2:],
        scales,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    return F.conv2d(features, weight[:, : features.shape[1]], padding=weight.shape[2] // 2) + pyramid


def concatenated(features: Tensor, regions: Tensor, weight: Tensor, scales: tuple[int, ...]) -> Tensor:
    upsampled = stock.upsampled_pyramid(regions, features.shape[2:], scales)
    return F.conv2d(torch.cat([features, upsampled], 1), weight, padding=weight.shape[2] // 2)


def draw(case: ConvCase, layout) -> tuple[list[Tensor], Tensor]:
    """Features, regions, weight, and a gradient of the result; of the size that initialisation gives them."""
    t = draw_conv(case, DTYPE, DEVICE)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.batch, FEATURES, *case.size, generator=generator).relu().to(DEVICE, DTYPE)
    weight = torch.randn(case.outputs, FEATURES, case.kernel, case.kernel, generator=generator).to(DEVICE, DTYPE)
    weight = torch.cat([weight / (9 * FEATURES) ** 0.5, t["weight"]], 1)
    return [layout(features), t["regions"], layout(weight)], layout(t["grad"])


def step(function, case: ConvCase, leaves: list[Tensor], grad: Tensor, direction: str):
    leaves = [leaf.requires_grad_(direction != "forward") for leaf in leaves]

    def run():
        result = function(*leaves, case.scales)
        return [result] if direction == "forward" else torch.autograd.grad(result, leaves, grad)

    return run


def functions(case: ConvCase, layout, direction: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    leaves, grad = draw(case, layout)
    wide = [leaf.double() for leaf in leaves]
    other = setting.compile_anew(concatenated) if compiled else concatenated
    ours, other = (step(function, case, leaves, grad, direction) for function in (bottleneck, other))
    exact = step(concatenated, case, wide, grad.double(), direction)
    for actual, right, own in zip(ours(), exact(), other(), strict=True):
        assert_accurate(actual.detach(), right.detach(), own.detach(), direction)
    return ours, other


def kept(function, layout) -> int:
    """Bytes that the forward pass keeps for the backward one, parameters and arguments aside."""
    leaves, _ = draw(CASE, layout)
    mine = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*(leaf.requires_grad_() for leaf in leaves), CASE.scales)
    return sum(storages.values())


def memory(layout, direction: str, compiled: bool = False) -> dict[str, float]:
    found = peaks("benchmarks.pyramid_conv", layout.__name__, direction, compiled=compiled)
    if direction != "forward":
        other = setting.compile_anew(concatenated) if compiled else concatenated
        found |= {"kept_mib": kept(bottleneck, layout) / 2**20, "other_kept_mib": kept(other, layout) / 2**20}
    return found


def measure(case: ConvCase, layout, direction: str, compiled: bool = False, **more: float) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, direction, compiled)
    about = f"{FEATURES}+{len(case.scales)}*{case}"
    name, ways = ", ".join((direction, about, layout.__name__, name_of(DTYPE))), 1 if direction == "forward" else 3
    leaves, grad = draw(case, layout)
    positions = case.batch * case.size[0] * case.size[1]
    counts = (
        ways * sum(tensor.nbytes for tensor in (*leaves, grad)),
        ways * 2 * positions * case.kernel**2 * FEATURES * case.outputs,
    )
    beside = "conv of the concatenation" + (", torch.compile" if compiled else "")
    return result_row("pyramid_conv", name, "PyTorch", beside, paired(ours, other, rounds=5), *counts, **more), ours


@setting.compiled
@setting.directions
@setting.usual_layout_first
def bench_pyramid_conv(benchmark, layout, direction, compiled):
    given = layout, direction, compiled
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward")
        setting.record(benchmark, point.row(row), ours)


def peak_of(layout: str, direction: str, side: str) -> int:
    def ready(function, case: ConvCase):
        return step(function, case, *draw(case, LAYOUTS[layout]), direction)

    return peak_of_side(side, bottleneck, concatenated, ready, CASE, ConvCase(1, 4, 4, (6, 6), 3))


def main() -> None:
    settings = itertools.product(LAYOUTS.values(), DIRECTIONS)
    setting.print_rows("PSPNet's bottleneck", (measure(CASE, *each, **memory(*each))[0] for each in settings))


if __name__ == "__main__":
    main()
