"""encode beside the residuals written out, which is what EncNet's peers do and the reference its tests use.

    python -m benchmarks.encode                the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written). The residuals are
as many maps as there are codewords. Memory is what a call needs at its peak beyond its arguments, results included.
"""

import argparse

import pytest
import stock
import torch
from accuracy import assert_accurate
from cases import channels_last, nchw
from head_cases import ENCODER, CodeCase, draw_code

import apc_kernels
from benchmarks.memory import peak, peak_here
from benchmarks.timing import paired, result_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASE = CodeCase(8, ENCODER.channels, ENCODER.size, ENCODER.codewords) if DEVICE == "cuda" else ENCODER
LAYOUTS = {layout.__name__: layout for layout in ((channels_last,) if DEVICE == "cuda" else (nchw, channels_last))}
COMPILED = (False, True) if DEVICE == "cuda" else (False,)  # PyTorch's side, in torch.compile as well
DIRECTIONS = ("forward", "forward+backward")
LEAVES = ("x", "codewords", "scale")


def step(function, t: dict, direction: str):
    leaves = [t[name].requires_grad_(direction != "forward") for name in LEAVES]

    def run():
        result = function(*leaves)
        return [result] if direction == "forward" else torch.autograd.grad(result, leaves, t["grad"])

    return run


def functions(layout, direction: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_code(CASE, layout, DTYPE, DEVICE)
    wide = {name: tensor.double() for name, tensor in t.items()}
    other = torch.compile(stock.encode) if compiled else stock.encode
    ours, other = step(apc_kernels.encode, t, direction), step(other, t, direction)
    for actual, exact, own in zip(ours(), step(stock.encode, wide, direction)(), other(), strict=True):
        assert_accurate(actual, exact.detach(), own, direction)
    return ours, other


def measure(layout, direction: str, compiled: bool = False, seconds: float = 2.0) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(layout, direction, compiled)
    case = ", ".join((direction, str(CASE), layout.__name__, str(DTYPE)[len("torch.") :]))
    moved = CASE.batch * CASE.channels * CASE.size[0] * CASE.size[1] * DTYPE.itemsize
    moved *= 1 if direction == "forward" else 3
    memory = {
        f"{prefix}memory_mib": peak("benchmarks.encode", layout.__name__, direction, side) / 2**20
        for prefix, side in (("", "ours"), ("other_", "stock"))
    }
    beside = "residuals written out" + (", torch.compile" if compiled else "")
    pair = paired(ours, other, DEVICE, seconds)
    return result_row("encode", case, "PyTorch", beside, pair, moved, DEVICE, **memory), ours


@pytest.mark.parametrize("compiled", COMPILED, ids=("eager", "compile")[: len(COMPILED)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def bench_encode(benchmark, layout, direction, compiled):
    row, ours = measure(layout, direction, compiled)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=5)


def _peak(layout: str, direction: str, side: str) -> int:
    function = stock.encode if side == "stock" else apc_kernels.encode
    step(function, draw_code(CodeCase(1, 4, (4, 4), 3), LAYOUTS[layout], DTYPE, DEVICE), direction)()
    return peak_here(step(function, draw_code(CASE, LAYOUTS[layout], DTYPE, DEVICE), direction), DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=3, metavar=("LAYOUT", "DIRECTION", "SIDE"), help="prints bytes, no more")
    peak_of = parser.parse_args().peak
    if peak_of:
        print(_peak(*peak_of))
        return
    print(f"encode, {CASE}, {str(DTYPE)[6:]}, on {DEVICE}; beside the residuals written out\n")
    print(f"{'':<36}{'ours ms':>9}{'PyTorch ms':>12}{'times':>7}{'ours MiB':>10}{'PyTorch MiB':>13}")
    for layout in LAYOUTS.values():
        for direction in DIRECTIONS:
            row, _ = measure(layout, direction, seconds=1.0)
            print(
                f"{layout.__name__ + ', ' + direction:<36}{row['ours_ms']:>9.2f}{row['other_ms']:>12.2f}"
                f"{row['ratio']:>7.1f}{row['memory_mib']:>10.1f}{row['other_memory_mib']:>13.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
