"""Counts what compiled kernels do, beside the least that their files state: `python tests/ptx/report.py`.

The floors follow from counts alone, and they are no measurements: the time that the schedulers of an H200 take to
issue so many instructions, and its memory to move every tensor once (132 multiprocessors of 4 schedulers at 1.8 GHz,
copies at 4.1 TB/s). No cache, latency, clock or ptxas has a part in them, and PTX instructions are not the GPU's. Sizes
are small; both floors grow with them.

least bytes, operations: as the first lines of the kernel's file state them. counted: additions, multiplications and
exponentials of float numbers, those of tensor cores too, with what tiles are filled up with.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of that kind run on CPU tensors
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "support")]

import cuda_calls  # noqa: E402
import least  # noqa: E402
import ptx_cuda  # noqa: E402
import ptx_triton  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from cases import channels_last, nchw  # noqa: E402

import apc_kernels  # noqa: E402

ISSUED_PER_SECOND = 132 * 4 * 1.8e9  # multiprocessors, schedulers of each, clock
BYTES_PER_SECOND = 4.1e12  # of measured copies
KINDS = {
    "products": ("mma.", "wgmma.mma"),
    "memory": ("ld.global", "st.global", "atom.", "red.", "cp.async.ca", "cp.async.cg"),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "float": ("add.f", "sub.f", "mul.f", "fma.", "div.", "ex2.", "rcp.", "max.f", "min.f", "cvt."),
    "shuffles": ("shfl.", "redux."),
    "branches": ("bra",),
}
COLUMNS = ["blocks", "instructions", *KINDS, "least bytes", "bytes", "sectors", "conflicts", "barriers"]
COLUMNS += ["operations", "counted", "issue ns", "memory ns"]


class Patch:
    """Stands in for pytest's monkeypatch, which ptx_triton.serve takes."""

    @staticmethod
    def setattr(owner, name, value) -> None:
        setattr(owner, name, value)


def touched(result: dict) -> dict[str, int]:
    """Returns the bytes of each tensor that a launch accessed; of a workspace, those that it accessed."""
    tensors = {name: (size, read + written) for name, (size, read, written) in result["tensors"].items()}
    return {name: n if name == "workspace" else size for name, (size, n) in tensors.items() if n}


def row(kernel: str, result: dict, letters: Mapping[str, int]) -> list:
    """Returns the columns of a launch: what it executed and moved, what its file states, the floors in nanoseconds."""
    stated = least.least()[least.plain(kernel)]
    tensors = touched(result)
    least_bytes = sum(size for name, size in tensors.items() if set(name.split("/")) & set(stated.moves))
    warps = {opcode: n for opcode, (n, _) in result["opcodes"].items()}
    total = sum(warps.values())
    kinds = [sum(n for opcode, n in warps.items() if opcode.startswith(names)) for names in KINDS.values()]
    moved = result["global_read_bytes"] + result["global_written_bytes"]
    sectors = result["global_read_sectors"] + result["global_written_sectors"]
    numbers = [result["blocks"], total, *kinds, least_bytes, moved, sectors]
    numbers += [result["bank_conflicts"], result["barriers"]]
    numbers += [stated.operations(letters, tensors), least.operations(result["opcodes"])]
    return [*numbers, total / ISSUED_PER_SECOND * 1e9, least_bytes / BYTES_PER_SECOND * 1e9]


def print_rows(title: str, launches: list[tuple[str, dict, Mapping[str, int]]]) -> None:
    print(f"\n## {title}\n\n| kernel | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    for kernel, result, letters in launches:
        cells = [f"{n:.1f}" if isinstance(n, float) else str(n) for n in row(kernel, result, letters)]
        print(f"| {least.plain(kernel)} | {' | '.join(cells)} |")


def triton_launches(workload, arch: int, layout, dtype: torch.dtype) -> list[tuple[str, dict, Mapping[str, int]]]:
    """Returns kernel, counts and the letters of the sizes for each launch."""
    counts = []
    ptx_triton.serve(Patch, arch, counts=counts)
    with apc_kernels.backend("triton"):
        workload(layout, dtype)
    return [(kernel, result, workloads.letters(workloads.CASES[workload])) for kernel, result in counts]


def cuda_launches(layout, dtype: torch.dtype) -> list[tuple[str, dict, Mapping[str, int]]]:
    counts, launches = [], []
    kernels = ptx_cuda.Kernels(counts=counts)
    cuda_calls.pooling_calls(kernels, layout, dtype)
    launches += [(kernel, result, workloads.letters(cuda_calls.MAP)) for kernel, result in counts]
    for case in cuda_calls.contexts(dtype):
        counts.clear()
        cuda_calls.context_calls(kernels, layout, dtype, case)
        launches += [(kernel, result, workloads.letters(case)) for kernel, result in counts]
    return launches


def head_launches(layout, dtype: torch.dtype) -> list[tuple[str, dict, Mapping[str, int]]]:
    """Returns the CUDA kernels' launches on maps of APCNet's size (cuda_calls.HEAD)."""
    counts = []
    kernels = ptx_cuda.Kernels(counts=counts)
    cuda_calls.context_calls(kernels, layout, dtype, cuda_calls.HEAD, cuda_calls.HEAD_BLOCKS)
    return [(kernel, result, workloads.letters(cuda_calls.HEAD)) for kernel, result in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=80, help="Compile Triton's kernels for this architecture.")
    parser.add_argument("--nchw", action="store_true", help="Count with NCHW maps; by default they are channels_last.")
    parser.add_argument("--head", action="store_true", help="Count the CUDA kernels alone, on maps of APCNet's size.")
    arguments = parser.parse_args()
    layout = nchw if arguments.nchw else channels_last
    print(__doc__.split("\n\n", 1)[1])
    if arguments.head:
        print_rows(f"CUDA, sm_80, bfloat16, {cuda_calls.HEAD}", head_launches(layout, torch.bfloat16))
        return
    for workload, case in workloads.CASES.items():
        launches = triton_launches(workload, arguments.arch, layout, torch.bfloat16)
        print_rows(f"Triton, sm_{arguments.arch}, bfloat16, {workload.__name__}, {case}", launches)
    print_rows("CUDA, sm_80, bfloat16", cuda_launches(layout, torch.bfloat16))


if __name__ == "__main__":
    main()
