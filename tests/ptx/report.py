"""Counts what compiled kernels do, beside the least that a GPU would need: `python tests/ptx/report.py`.

The floors follow from counts alone: instructions that the schedulers of an H200 have to issue, and the distinct bytes
of its tensors that a launch reads and writes, each moved once. They are no measurements: no cache, latency, clock or
ptxas has a part in them, and PTX instructions are not the machine's. Sizes are small; both floors grow with the size.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of that kind run on CPU tensors
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "support")]

import ptx_cuda  # noqa: E402
import ptx_triton  # noqa: E402
import torch  # noqa: E402
from cases import channels_last, nchw  # noqa: E402
from cuda_calls import cuda_calls  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

import apc_kernels  # noqa: E402

ISSUED_PER_SECOND = 132 * 4 * 1.8e9  # multiprocessors, schedulers of each, clock
BYTES_PER_SECOND = 4.1e12  # of measured copies
KINDS = {
    "products": ("mma.", "wgmma.mma"),
    "memory": ("ld.global", "st.global", "atom.", "cp.async.c"),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "float": ("add.f", "sub.f", "mul.f", "fma.", "div.", "ex2.", "rcp.", "max.f", "min.f", "cvt."),
    "shuffles": ("shfl.", "redux."),
    "branches": ("bra",),
}


class Patch:
    """Stands in for pytest's monkeypatch, which ptx_triton.serve takes."""

    @staticmethod
    def setattr(owner, name, value) -> None:
        setattr(owner, name, value)


def rows(counts: list[tuple[str, dict]]) -> list[tuple]:
    """Returns a row for each launch: what it executed and moved, and the two floors in nanoseconds."""
    result = []
    for kernel, c in counts:
        warps = {opcode: n for opcode, (n, _) in c["opcodes"].items()}
        total = sum(warps.values())
        kinds = [sum(n for opcode, n in warps.items() if opcode.startswith(names)) for names in KINDS.values()]
        moved = c["distinct_bytes"], c["global_read_bytes"] + c["global_written_bytes"]
        sectors = c["global_read_sectors"] + c["global_written_sectors"]
        floors = total / ISSUED_PER_SECOND * 1e9, c["distinct_bytes"] / BYTES_PER_SECOND * 1e9
        numbers = (c["blocks"], total, *kinds, *moved, sectors, c["bank_conflicts"], c["barriers"])
        result.append((kernel, *numbers, *floors))
    return result


def print_rows(title: str, counts: list[tuple[str, dict]]) -> None:
    names = [
        "blocks",
        "instructions",
        *KINDS,
        "distinct bytes",
        "bytes",
        "sectors",
        "conflicts",
        "barriers",
        "issue ns",
        "memory ns",
    ]
    print(f"\n## {title}\n\n| kernel | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for kernel, *numbers in rows(counts):
        print(f"| {kernel} | {' | '.join(f'{n:.1f}' if isinstance(n, float) else str(n) for n in numbers)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=80, help="Compile Triton's kernels for this architecture.")
    parser.add_argument("--nchw", action="store_true", help="Count with NCHW maps; by default they are channels_last.")
    arguments = parser.parse_args()
    layout = nchw if arguments.nchw else channels_last
    print(__doc__.split("\n\n")[1])
    for workload in WORKLOADS:
        counts = []
        ptx_triton.serve(Patch, arguments.arch, counts=counts)
        with apc_kernels.backend("triton"):
            workload(layout, torch.bfloat16)
        print_rows(f"Triton, sm_{arguments.arch}, bfloat16, {workload.__name__}", counts)
    counts = []
    cuda_calls(ptx_cuda.Kernels(counts=counts), layout, torch.bfloat16)
    print_rows("CUDA, sm_80, bfloat16", counts)


if __name__ == "__main__":
    main()
