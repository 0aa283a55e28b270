"""The upsample_* operations beside F.interpolate and what follows it, which is the reference their tests use.

    python -m benchmarks.upsample              the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move: the logits are read, the labels read (int64) or written (uint8), the probabilities read and
written; the loss writes one float for each pixel, and its backward reads logits, labels and those floats and writes
the gradient. PyTorch moves the upsampled logits, K floats for each pixel, several times on top.
Operations, for each pixel and class, an exponential counted as one: 2 of the interpolation, and then 3 of the loss, 1
of the argmax, 4 of the softmax; the loss's backward has its 5 again, and 4 more to give the result to source pixels.
Memory is what a call needs at its peak beyond its arguments, results included.
"""

from collections.abc import Callable

import pytest
import stock
import torch
from accuracy import assert_accurate
from upsample_cases import LARGE_UPSAMPLES, UpsampleCase, assert_labels, draw_upsample

import apc_kernels
from benchmarks import setting
from benchmarks.memory import peak_here, peaks
from benchmarks.scaling import BATCHES, THREADS, Point, points, scaled
from benchmarks.setting import DEVICE, DTYPE, LAYOUTS, USUAL, here, name_of
from benchmarks.timing import paired, result_row

BACKENDS = here(("cpp",), ("triton",), ("triton",))
MEASURED = here(
    LARGE_UPSAMPLES,
    [UpsampleCase(8, 150, (64, 64), (512, 512)), *LARGE_UPSAMPLES],
    [UpsampleCase(1, 5, (4, 5), (9, 12))],
)
CASES = {str(case): case for case in MEASURED}
OTHERS = {
    "upsample_cross_entropy": "F.interpolate, F.cross_entropy",
    "upsample_argmax": "F.interpolate, argmax",
    "upsample_confusion": "F.interpolate, argmax, bincount",
    "upsample_softmax": "F.interpolate, softmax, add_",
}
LOSS, LOSS_AND_GRADIENT = "upsample_cross_entropy, forward", "upsample_cross_entropy, forward+backward"
OPERATIONS = {LOSS: 5, LOSS_AND_GRADIENT: 14, "upsample_argmax": 3, "upsample_confusion": 3, "upsample_softmax": 6}
TASKS = tuple(OPERATIONS)
CLASSES, SIDES = here((19, 60, 150), (19, 60, 150), ()), here((32, 64, 96), (32, 64, 128), ())
SCALING = [
    *points(MEASURED[0], batch=BATCHES[:3], classes=CLASSES, threads=THREADS),
    *(Point("size", n, UpsampleCase(MEASURED[0].batch, 150, (n, n), (8 * n, 8 * n))) for n in SIDES),
]


def bytes_moved(case: UpsampleCase, task: str) -> int:
    pixels = case.batch * case.size[0] * case.size[1]
    logits = case.batch * case.classes * case.source[0] * case.source[1] * DTYPE.itemsize
    return {
        "upsample_cross_entropy, forward": logits + pixels * (8 + 4),
        "upsample_cross_entropy, forward+backward": 3 * logits + 2 * pixels * (8 + 4),
        "upsample_argmax": logits + pixels,
        "upsample_confusion": logits + 8 * pixels,
        "upsample_softmax": logits + 2 * 4 * case.classes * pixels,
    }[task]


def step(module, task: str, tensors: dict, backend: str = "auto", compiled: bool = False):
    """A call of a task by the functions of a module: ours, or the stock ones."""
    operation, _, direction = task.partition(", ")
    function, logits, target = getattr(module, operation), tensors["logits"], tensors["target"]
    function = setting.compile_anew(function) if compiled else function

    def run():
        if operation == "upsample_cross_entropy":
            loss = function(logits, target)
            return loss if direction == "forward" else torch.autograd.grad(loss, logits)[0]
        if operation == "upsample_confusion":
            return function(logits, target)
        if operation == "upsample_argmax":
            return function(logits, target.shape[1:])
        return function(logits, target.shape[1:], out=tensors["out"])

    return setting.on(backend, run)


def arguments(case: UpsampleCase, layout, task: str) -> dict:
    tensors = draw_upsample(case, layout, DTYPE, DEVICE)
    if task == "upsample_softmax":
        tensors["out"] = torch.zeros(case.batch, case.classes, *case.size, device=DEVICE)
    tensors["logits"].requires_grad_(task.endswith("backward"))
    return tensors


def functions(case: UpsampleCase, layout, task: str, backend: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    tensors = arguments(case, layout, task)
    ours, other = step(apc_kernels, task, tensors, backend), step(stock, task, tensors, compiled=compiled)
    _check(case, task, tensors, ours, other)
    return ours, other


def _check(case: UpsampleCase, task: str, tensors: dict, ours, other) -> None:
    if task == "upsample_argmax":
        return assert_labels(ours(), tensors["logits"], case)
    if task == "upsample_confusion":
        prediction = apc_kernels.upsample_argmax(tensors["logits"], case.size)
        assert torch.equal(ours(), stock.confusion(prediction, tensors["target"], case.classes))
        return None
    wide = tensors | {"logits": tensors["logits"].detach().double().requires_grad_(tensors["logits"].requires_grad)}
    if task == "upsample_softmax":
        results = []
        for function in (ours, other, step(stock, task, wide | {"out": tensors["out"].double()})):
            tensors["out"].zero_()
            results.append(function().clone())
        actual, pytorch, exact = results
    else:
        actual, pytorch, exact = ours(), other(), step(stock, task, wide)()
    return assert_accurate(actual, exact, pytorch, f"{case} {task}")


def measure(
    case: UpsampleCase, layout, task: str, backend: str, compiled: bool = False, **more: float
) -> tuple[dict, Callable]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, task, backend, compiled)
    operation, _, direction = task.partition(", ")
    name = ", ".join(filter(None, (direction, str(case), layout.__name__, name_of(DTYPE))))
    counts = bytes_moved(case, task), OPERATIONS[task] * case.batch * case.classes * case.size[0] * case.size[1]
    beside = OTHERS[operation] + (" in torch.compile" if compiled else "")
    return result_row(operation, name, backend, beside, paired(ours, other), *counts, **more), ours


def memory(case: UpsampleCase, layout, task: str, backend: str, compiled: bool = False) -> dict[str, float]:
    return peaks("benchmarks.upsample", str(case), layout.__name__, task, ours=backend, compiled=compiled)


def _parameters():
    """Of the first case everything is telling, of the others what targets name."""
    for case in MEASURED:
        for task in TASKS:
            telling = case is MEASURED[0] or (not setting.ON_GPU and task in (LOSS_AND_GRADIENT, "upsample_argmax"))
            yield pytest.param(case, task, marks=() if telling else setting.long, id=f"{case}-{task}")


@setting.compiled
@pytest.mark.parametrize("backend", BACKENDS)
@setting.usual_layout_first
@pytest.mark.parametrize(("case", "task"), list(_parameters()))
def bench_upsample(benchmark, case, layout, task, backend, compiled):
    setting.need(backend, task.partition(",")[0])
    given = case, layout, task, backend, compiled
    setting.record(benchmark, *measure(*given, **memory(*given)))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, USUAL, LOSS_AND_GRADIENT, BACKENDS[0])
        setting.record(benchmark, point.row(row), ours)


def peak_of(name: str, layout: str, task: str, which: str) -> int:
    """Of a call on a backend, or of PyTorch's composition where `which` says stock."""
    module, backend = (stock, "auto") if which.startswith("stock") else (apc_kernels, which)
    compiled = which.endswith("compiled")
    call = step(module, task, arguments(CASES[name], LAYOUTS[layout], task), backend, compiled)
    small = arguments(UpsampleCase(1, 3, (4, 4), (8, 8)), LAYOUTS[layout], task)
    first = call if compiled else step(module, task, small, backend)
    first()
    return peak_here(call)


def main() -> None:
    tasks = [(MEASURED[0], USUAL, task, BACKENDS[0]) for task in TASKS]
    setting.print_rows("upsample_*", (measure(*each, **memory(*each))[0] for each in tasks))


if __name__ == "__main__":
    main()
