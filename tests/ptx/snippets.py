"""Builds and runs kernels of a few lines, for the tests of the machine itself."""

import numpy as np
import ptx
import torch

THREADS = 1024


def kernel(name: str, lines: list[str], parameters: int = 1, shared: int = 0, target: str = "sm_80") -> str:
    """Returns the PTX of a kernel whose parameters p0, p1, ... are addresses, with a static buffer called `buffer`."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    buffer = [f".shared .align 16 .b8 buffer[{shared}];"] if shared else []
    head = [".version 8.0", f".target {target}", ".address_size 64", f".visible .entry {name}({declared})", "{"]
    registers = [".reg .pred %p<9>;", ".reg .b16 %h<99>;", ".reg .b32 %r<199>;", ".reg .b64 %d<99>;"]
    return "\n".join([*head, *registers, *buffer, *lines, "ret;", "}", ""])


def launch(text: str, tensors: list, threads: int, *, inputs=(), unwritten=(), blocks: int = 1, **options) -> dict:
    """Runs a module's one kernel on tensors. It may write all but `inputs`, and has yet to write `unwritten`."""
    (name,) = ptx.parse(text).kernels
    memory = ptx.Memory()
    for i, tensor in enumerate(tensors):
        memory.add(f"t{i}", tensor, written=i not in inputs, read=i not in unwritten)
    memory.place()
    packed = ptx.pack(ptx.parse(text).parameters(name), [memory.address(t) for t in tensors])
    try:
        return ptx.launch(text, name, memory, (blocks,), threads, options.pop("shared", 0), packed, **options)
    finally:
        memory.copy_back()


def width(kind: str) -> int:
    """Returns the bits that a value of a type takes in memory."""
    return 16 if kind == "pred" else max(16, int("".join(c for c in kind if c.isdigit())))


def apply(form: str, kinds: list[str], result: str, operands: list[np.ndarray]) -> np.ndarray:
    """Returns the bits that a form gives for each thread's operands, bits too, of the given types."""
    lines = ["ld.param.u64 %d0, [p0];", "mov.u32 %r0, %tid.x;", "mul.wide.u32 %d1, %r0, 8;", "add.s64 %d0, %d0, %d1;"]

    def name(kind: str, i: int) -> str:
        return {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[width(kind)] + str(i) if kind != "pred" else f"%p{i}"

    for i, kind in enumerate(kinds, 2):
        at = f"[%d0+{8 * THREADS * (i - 2)}]"
        if kind == "pred":
            lines += [f"ld.global.b16 %h{i}, {at};", f"setp.ne.b16 %p{i}, %h{i}, 0;"]
        else:
            lines.append(f"ld.global.b{width(kind)} {name(kind, i)}, {at};")
    place = name(result, 8 if result == "pred" else 9)
    lines.append(f"{form} {', '.join([place, *(name(kind, i) for i, kind in enumerate(kinds, 2))])};")
    if result == "pred":
        lines.append("selp.b16 %h9, 1, 0, %p8;")
        place = "%h9"
    lines.append(f"st.global.b{width(result)} [%d0+{8 * THREADS * len(kinds)}], {place};")
    memory = torch.zeros(len(kinds) + 1, THREADS, dtype=torch.int64)
    for row, values in zip(memory, operands, strict=False):
        row[: len(values)] = torch.from_numpy(values.astype(np.uint64).view(np.int64))
    launch(kernel("form", lines), [memory], THREADS)
    return memory[-1].numpy().view(np.uint64)[: len(operands[0])]
