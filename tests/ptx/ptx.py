"""Runs compiled GPU code on the CPU: places tensors between red zones, launches kernels, and raises what was found.

The machine itself is C++ (machine.h); this file builds it, and translates tensors into memory that it watches.
"""

import functools
import hashlib
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import native_modules
import numpy as np
import torch
from torch import Tensor

from apc_kernels import build

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "ptx"
# Neither contraction nor fast math: the interpreter rounds exactly where PTX does.
FLAGS = ["-march=native", "-ffp-contract=off"]
COLD = {"module"}  # what runs once a launch: compiling it fast is worth more than running it fast
RED_ZONE = 4096  # bytes in front of every tensor and behind it
ALIGNMENT = 512  # of what a GPU's allocator returns
LAUNCH_SEED = 0


class FaultError(AssertionError):
    """Holds what the checks found in a launch, and says it in a few lines each."""

    def __init__(self, findings: list[dict]) -> None:
        super().__init__("\n".join(map(described, findings)))
        self.findings = findings


@functools.cache
def machine() -> ModuleType:
    """Returns the interpreter, built where a source has changed."""
    sources = sorted(HERE.glob("*.cpp"))
    lines = [
        *native_modules.rules([*FLAGS, f"-DAPC_CPU='\"{_cpu()}\"'"]),  # another processor builds anew
        *(
            f"build {source.stem}.o: cxx {build.escape(source)}\n  optimize = {'-O0' if source.stem in COLD else '-O2'}"
            for source in sources
        ),
        f"build ptx_machine.so: link {' '.join(f'{source.stem}.o' for source in sources)}",
    ]
    return native_modules.build_module(FOLDER, lines, "ptx_machine")


def _cpu() -> str:
    """Returns what tells apart processors for which -march=native means different things."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=256)
def parse(text: str):
    return machine().parse(text)


class Memory:
    """Holds tensors as a GPU would: each in a copy of its own, aligned as by an allocator, between red zones.

    Tensors that share storage share their copy. Only the bytes of their elements may be touched: the gaps of a window
    belong to its red zone.
    """

    def __init__(self) -> None:
        self.core = machine().Memory()
        self._copies: dict[int, tuple[Tensor, Tensor, int]] = {}  # by the storage's address: original, copy, origin
        self._parts: dict[int, list[tuple[str, Tensor, bool, bool]]] = {}
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._arenas: list[np.ndarray] = []
        self._placed = False

    def add(self, name: str, tensor: Tensor, *, written: bool = False, read: bool = True) -> None:
        """Adds a tensor. written: launches may store there. read: what is there counts as written already."""
        self._parts.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor, written, read))

    def place(self) -> None:
        for key, parts in self._parts.items():
            storage = parts[0][1].untyped_storage()
            size = storage.nbytes()
            arena = torch.full((size + 2 * RED_ZONE + ALIGNMENT,), 0xFF, dtype=torch.uint8)
            begin = RED_ZONE + -(arena.data_ptr() + RED_ZONE) % ALIGNMENT
            original = torch.tensor([], dtype=torch.uint8).set_(storage)
            arena[begin : begin + size] = original
            self._arenas.append(arena.numpy())
            self._copies[key] = (original, arena, begin)
            flags = np.zeros(arena.numel(), np.uint8)
            for _, tensor, written, read in parts:
                flags[begin + _bytes_of(tensor)] |= 1 | 2 * written | 4 * read
            first = min(tensor.storage_offset() * tensor.element_size() for _, tensor, _, _ in parts)
            is_output = any(written for _, _, written, _ in parts)
            names = "/".join(dict.fromkeys(name for name, *_ in parts))
            self.core.add(names, arena.data_ptr(), arena.data_ptr() + begin + first, flags, is_output)
        self._placed = True

    def address(self, tensor: Tensor) -> int:
        assert self._placed
        _, arena, begin = self._copies[tensor.untyped_storage().data_ptr()]
        return arena.data_ptr() + begin + tensor.storage_offset() * tensor.element_size()

    def place_array(self, name: str, array: np.ndarray, is_output: bool) -> np.ndarray:
        """Returns a copy with the same strides, aligned as the array is. What an output holds counts as unwritten."""
        strides = np.array(array.strides, np.int64)
        assert (strides >= 0).all()
        size = int(((np.array(array.shape) - 1) * strides).sum() + array.itemsize) if array.size else 0
        arena, begin = self._arena(size, array.ctypes.data % ALIGNMENT)
        copy = np.ndarray(array.shape, array.dtype, arena, begin, array.strides)
        copy[...] = array
        flags = np.zeros(arena.size, np.uint8)
        np.ndarray((*array.shape, array.itemsize), np.uint8, flags, begin, (*array.strides, 1))[...] = (
            1 | 2 if is_output else 1 | 4
        )
        self.core.add(name, arena.ctypes.data, arena.ctypes.data + begin, flags, is_output)
        if is_output:
            self._arrays.append((array, copy))
        return copy

    def place_scratch(self, size: int, written: bool = False) -> int:
        """Returns the address of memory that nobody has written. written: of zeros, where races go unnoticed."""
        arena, begin = self._arena(size, 0)
        flags = np.zeros(arena.size, np.uint8)
        flags[begin : begin + size] = 1 | 2 | 4 * written
        if written:
            arena[begin : begin + size] = 0
        self.core.add("workspace", arena.ctypes.data, arena.ctypes.data + begin, flags, not written)
        return arena.ctypes.data + begin

    def contents(self) -> list[np.ndarray]:
        """Returns a copy of all bytes, those of red zones too."""
        return [arena.copy() for arena in self._arenas]

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that makes everything as it is now: bytes, and what counts as written."""
        core, contents = self.core.copy(), self.contents()

        def restore() -> None:
            self.core = core.copy()
            for arena, saved in zip(self._arenas, contents, strict=True):
                arena[...] = saved

        return restore

    def copy_arrays_back(self) -> None:
        for array, copy in self._arrays:
            array[...] = copy

    def _arena(self, size: int, alignment: int) -> tuple[np.ndarray, int]:
        arena = np.full(size + 2 * RED_ZONE + 2 * ALIGNMENT, 0xFF, np.uint8)
        self._arenas.append(arena)
        return arena, RED_ZONE + (alignment - arena.ctypes.data - RED_ZONE) % ALIGNMENT

    def copy_back(self) -> None:
        for original, arena, begin in self._copies.values():
            original.copy_(arena[begin : begin + original.numel()])


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """Returns the offsets of a tensor's bytes in its storage."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    offsets = (offsets.reshape(-1) + tensor.storage_offset()) * tensor.element_size()
    return (offsets[:, None] + np.arange(tensor.element_size())).reshape(-1)


def launch(
    text: str,
    kernel: str,
    memory: Memory,
    grid: Sequence[int],
    threads: int,
    shared: int,
    parameters: bytes,
    seed: int | None = None,
    counting: bool = False,
    harmless: Collection[tuple[str, str, str]] = (),
    budget: int = 1 << 33,
    one_finding: bool = False,
) -> dict:
    """Runs one launch; raises FaultError with everything that its checks found.

    harmless: findings to pass over, as (kernel, kind, tensor). budget: instructions after which it counts as endless.
    one_finding: end with the first one; not with the kernels of `harmless`, which have others.
    """
    sizes = tuple(grid) + (1,) * (3 - len(grid))
    seed = LAUNCH_SEED if seed is None else seed
    one_finding = one_finding and all(kernel != other for other, _, _ in harmless)
    arguments = (sizes, (threads, 1, 1), shared, parameters, seed, counting, budget, one_finding)
    result = machine().launch(parse(text), kernel, memory.core, *arguments)
    faults = [f for f in result["findings"] if (f["kernel"], f["kind"], f["tensor"]) not in harmless]
    if faults:
        raise FaultError(faults)
    return result


def described(finding: dict) -> str:
    where = f"block {finding['block']}, warp {finding['warp']}, lane {finding['lane']}"
    at = f" of {finding['tensor']}" if finding["tensor"] else ""
    lines = [
        f"{finding['kernel']}: {finding['kind']}{at}, address {finding['address']:#x}, {where}",
        f"  line {finding['line']}: {finding['text']}",
    ]
    lines += [f"  {finding['detail']}"] if finding["detail"] else []
    lines += [f"  from {finding['source']}"] if finding["source"] else []
    return "\n".join(lines)


def pack(layout: Iterable[tuple[int, int]], values: Iterable[int]) -> bytes:
    """Returns parameters as bytes: integers and addresses where a kernel's layout (offset, size) wants them."""
    layout = list(layout)
    result = bytearray(max((offset + size for offset, size in layout), default=0))
    for (offset, size), value in zip(layout, values, strict=True):
        result[offset : offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(result)
