"""The upsample_* operations beside F.interpolate and what follows it, which is the reference their tests use.

    python -m benchmarks.upsample              the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move: the logits are read, the labels read (int64) or written (uint8), the probabilities read and
written; the loss writes one float for each pixel, and its backward reads logits, labels and those floats and writes
the gradient. PyTorch moves the upsampled logits, K floats for each pixel, several times on top.
Memory is what a call needs at its peak beyond its arguments, results included.
"""

import argparse
from collections.abc import Callable

import pytest
import stock
import torch
from accuracy import assert_accurate
from cases import channels_last, nchw
from upsample_cases import LARGE_UPSAMPLES, UpsampleCase, assert_labels, draw_upsample

import apc_kernels
from benchmarks.memory import peak, peak_here
from benchmarks.timing import paired, result_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton",) if DEVICE == "cuda" else ("cpp",)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MEASURED = [UpsampleCase(8, 150, (64, 64), (512, 512)), *LARGE_UPSAMPLES] if DEVICE == "cuda" else LARGE_UPSAMPLES
CASES = {str(case): case for case in MEASURED}
COMPILED = (False, True) if DEVICE == "cuda" else (False,)  # PyTorch's side, in torch.compile as well
LAYOUTS = {layout.__name__: layout for layout in (nchw, channels_last)}
OTHERS = {
    "upsample_cross_entropy": "F.interpolate, F.cross_entropy",
    "upsample_argmax": "F.interpolate, argmax",
    "upsample_confusion": "F.interpolate, argmax, bincount",
    "upsample_softmax": "F.interpolate, softmax, add_",
}
TASKS = (
    "upsample_cross_entropy, forward",
    "upsample_cross_entropy, forward+backward",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_softmax",
)


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
    function = torch.compile(function) if compiled else function

    def run():
        with apc_kernels.backend(backend):
            if operation == "upsample_cross_entropy":
                loss = function(logits, target)
                return loss if direction == "forward" else torch.autograd.grad(loss, logits)[0]
            if operation == "upsample_confusion":
                return function(logits, target)
            if operation == "upsample_argmax":
                return function(logits, target.shape[1:])
            return function(logits, target.shape[1:], out=tensors["out"])

    return run


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
    case: UpsampleCase, layout, task: str, backend: str, compiled: bool = False, seconds: float = 2.0
) -> tuple[dict, Callable]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, task, backend, compiled)
    operation, _, direction = task.partition(", ")
    name = ", ".join(filter(None, (direction, str(case), layout.__name__, str(DTYPE)[len("torch.") :])))
    memory = {
        f"{prefix}memory_mib": peak("benchmarks.upsample", str(case), layout.__name__, task, which) / 2**20
        for prefix, which in (("", backend), ("other_", "stock"))
    }
    pair, moved = paired(ours, other, DEVICE, seconds), bytes_moved(case, task)
    beside = OTHERS[operation] + (" in torch.compile" if compiled else "")
    return result_row(operation, name, backend, beside, pair, moved, DEVICE, **memory), ours


@pytest.mark.parametrize("compiled", COMPILED, ids=("eager", "compile")[: len(COMPILED)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", MEASURED, ids=str)
def bench_upsample(benchmark, case, layout, task, backend, compiled):
    row, ours = measure(case, layout, task, backend, compiled)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=5)


def _peak(name: str, layout: str, task: str, which: str) -> int:
    """Of a call on a backend, or of PyTorch's composition where `which` is "stock"."""
    module, backend = (stock, "auto") if which == "stock" else (apc_kernels, which)
    small = UpsampleCase(1, 3, (4, 4), (8, 8))
    step(module, task, arguments(small, LAYOUTS[layout], task), backend)()  # libraries and threads are there
    return peak_here(step(module, task, arguments(CASES[name], LAYOUTS[layout], task), backend), DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=4, metavar=("CASE", "LAYOUT", "TASK", "WHICH"), help="prints bytes, no more")
    peak_of = parser.parse_args().peak
    if peak_of:
        print(_peak(*peak_of))
        return
    place = apc_kernels.dispatch.gpu() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"upsample_*, {str(DTYPE).removeprefix('torch.')}, {place}; beside F.interpolate and what follows it\n")
    print(f"{'':<80}{'ours ms':>9}{'PyTorch ms':>12}{'times':>7}{'ours MiB':>10}{'PyTorch MiB':>13}")
    for task in TASKS:
        row, _ = measure(MEASURED[0], nchw, task, BACKENDS[0], seconds=1.0)
        print(
            f"{row['operation'] + ', ' + row['case']:<80}{row['ours_ms']:>9.2f}{row['other_ms']:>12.2f}"
            f"{row['ratio']:>7.1f}{row['memory_mib']:>10.1f}{row['other_memory_mib']:>13.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
