"""Counts what compiled kernels do, beside the least that their files state: `python tests/ptx/report.py`.

The floors follow from counts alone, and they are no measurements: the time that the schedulers of an H200 take to
issue so many instructions, and its memory to move every tensor once (132 multiprocessors of 4 schedulers at 1.8 GHz,
copies at 4.1 TB/s). No cache, latency, clock or ptxas has a part in them, and PTX instructions are not the GPU's. Sizes
are small; both floors grow with them.

least bytes, operations: as the first lines of the kernel's file state them. counted: additions, multiplications and
exponentials of float numbers, those of tensor cores too, with what tiles are filled up with.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of that kind run on CPU tensors
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "support")]

import cuda_calls  # noqa: E402
import least  # noqa: E402
import ptx_cuda  # noqa: E402
import ptx_triton  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from cases import channels_last, draw_context, nchw  # noqa: E402

import apc_kernels  # noqa: E402

ISSUED_PER_SECOND = 132 * 4 * 1.8e9  # multiprocessors, schedulers of each, clock
BYTES_PER_SECOND = 4.1e12  # of measured copies
SMALL = ("pack", "merge")  # how kernels begin that do not see the maps
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


def least_bytes(kernel: str, tensors: Mapping[str, int]) -> int:
    moves = set(least.least()[least.plain(kernel)].moves)
    return sum(size for name, size in tensors.items() if moves & set(name.split("/")))


def row(kernel: str, result: dict, letters: Mapping[str, int]) -> list:
    """Returns the columns of a launch: what it executed and moved, what its file states, the floors in nanoseconds."""
    stated, tensors = least.least()[least.plain(kernel)], touched(result)
    fewest_bytes = least_bytes(kernel, tensors)
    warps = {opcode: n for opcode, (n, _) in result["opcodes"].items()}
    total = sum(warps.values())
    kinds = [sum(n for opcode, n in warps.items() if opcode.startswith(names)) for names in KINDS.values()]
    moved = result["global_read_bytes"] + result["global_written_bytes"]
    sectors = result["global_read_sectors"] + result["global_written_sectors"]
    numbers = [result["blocks"], total, *kinds, fewest_bytes, moved, sectors]
    numbers += [result["bank_conflicts"], result["barriers"]]
    numbers += [stated.operations(letters, tensors), least.operations(result["opcodes"])]
    return [*numbers, total / ISSUED_PER_SECOND * 1e9, fewest_bytes / BYTES_PER_SECOND * 1e9]


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


class Counted(NamedTuple):
    """Holds what a launch executed, and how many times that is what it executes in a batch of APCNet's maps."""

    kernel: str
    result: dict
    times: int

    def floors(self) -> tuple[float, float]:
        """Returns the microseconds in which a GPU issues the instructions, and moves every tensor once."""
        instructions = sum(n for n, _ in self.result["opcodes"].values())
        moved = least_bytes(self.kernel, touched(self.result))
        return tuple(1e6 * self.times * n for n in (instructions / ISSUED_PER_SECOND, moved / BYTES_PER_SECOND))


def head_launches(layout, dtype: torch.dtype, scales: tuple[int, ...] = (1, 2, 3, 6)) -> list[Counted]:
    """Returns the CUDA kernels' launches on maps of APCNet's size.

    Counted are parts that are repeated: a quarter of an image, in which every tile of positions costs the same; 64
    channels of one image for the pooling; for the kernels that do not see the maps, all that they do.
    """
    head = dataclasses.replace(cuda_calls.HEAD, scales=scales)
    blocks, pooled = cuda_calls.HEAD_BLOCKS, cuda_calls.HEAD_MAP

    def counted(calls: Callable, *arguments, times: int = 1, alone: tuple[str, ...] | None = None) -> list[Counted]:
        counts = []
        calls(ptx_cuda.Kernels(counts=counts, alone=alone), *arguments)
        return [Counted(kernel, result, times) for kernel, result in counts]

    stripe = dataclasses.replace(head, batch=1, size=(16, 64))
    channels = dataclasses.replace(pooled, shape=(1, 64, *pooled.shape[2:]), scales=scales)
    of_tiles = counted(cuda_calls.context_calls, layout, dtype, stripe, blocks // 32, times=32)
    return [
        *counted(cuda_calls.pooling_calls, layout, dtype, channels, times=8 * pooled.shape[1] // 64),
        *(launch for launch in of_tiles if not least.plain(launch.kernel).startswith(SMALL)),
        *counted(cuda_calls.small_calls, dtype, head, blocks, alone=SMALL),
    ]


def triton_head_launches(arch: int, layout, dtype: torch.dtype, scales: tuple[int, ...]) -> list[Counted]:
    """Returns the launches of Triton's kernels on affinities, on a quarter of an image as in head_launches."""
    counts, stripe = [], dataclasses.replace(cuda_calls.HEAD, batch=1, size=(16, 64), scales=scales)
    ptx_triton.serve(Patch, arch, counts=counts)
    t = draw_context(stripe, layout, dtype)
    leaves = x, regions, weight, bias, shift, center = [
        t[name].requires_grad_() for name in ("x", "regions", "weight", "bias", "shift", "center")
    ]
    with apc_kernels.backend("triton"):
        z = apc_kernels.adaptive_context(x, regions, weight, bias, scales, shift=shift, residual=True, center=center)
        torch.autograd.grad(z, leaves, t["grad"])
        apc_kernels.affinity_moments(x.detach(), weight.detach(), bias.detach(), scales)
    return [Counted(kernel, result, times=32) for kernel, result in counts]


def print_floors(title: str, launches: list[Counted]) -> None:
    print(f"\n## {title}\n\n| kernel | instructions | issue, µs | memory, µs | ratio |\n|---|{'---:|' * 4}")
    for launch in launches:
        issue, memory = launch.floors()
        instructions = launch.times * sum(n for n, _ in launch.result["opcodes"].values())
        cells = f"{instructions} | {issue:.2f} | {memory:.2f} | {issue / memory:.2f}"
        print(f"| {least.plain(launch.kernel)} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=80, help="Compile Triton's kernels for this architecture.")
    parser.add_argument("--nchw", action="store_true", help="Count with NCHW maps; by default they are channels_last.")
    parser.add_argument("--head", action="store_true", help="Count the CUDA kernels alone, on maps of APCNet's size.")
    parser.add_argument("--triton", action="store_true", help="Count Triton's kernels on affinities with --head.")
    parser.add_argument("--dtype", default="bfloat16", help="Count with maps of float32, float16 or bfloat16.")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 2, 3, 6], help="Count --head with these scales.")
    arguments = parser.parse_args()
    layout, dtype = nchw if arguments.nchw else channels_last, getattr(torch, arguments.dtype)
    print(__doc__.split("\n\n", 1)[1])
    if arguments.head:
        backend = f"Triton, sm_{arguments.arch}" if arguments.triton else "CUDA, sm_80"
        scales = tuple(arguments.scales)
        title = f"{backend}, {arguments.dtype}, {layout.__name__}, {cuda_calls.HEAD_MAP}, scales {scales}"
        if arguments.triton:
            print_floors(title, triton_head_launches(arguments.arch, layout, dtype, scales))
        else:
            print_floors(title, head_launches(layout, dtype, scales))
        return
    for workload, case in workloads.CASES.items():
        launches = triton_launches(workload, arguments.arch, layout, dtype)
        print_rows(f"Triton, sm_{arguments.arch}, {arguments.dtype}, {workload.__name__}, {case}", launches)
    print_rows(f"CUDA, sm_80, {arguments.dtype}", cuda_launches(layout, dtype))


if __name__ == "__main__":
    main()
