"""Runs the CUDA kernels as compiled code: nvcc's PTX, executed by the machine of ptx.py.

nvcc compiles the launches of the emulation (tests/emulation) as CUDA; a runtime of our own
(cuda/runtime.cpp) takes the launches and the PTX from what it compiled.
"""

import ctypes
import functools
import re
import subprocess
from pathlib import Path
from types import ModuleType

import least
import native_modules
import numpy as np
import ptx

from apc_kernels import build

# The arguments of every function, by name; those in capitals are results.
ARGUMENTS = {
    "pyramid_pool": "x dtype scales OUT seed",
    "pyramid_pool_backward": "grad dtype scales GRAD_X seed",
    "adaptive_context": "x dtype regions weight bias scales shift residual center Z seed",
    "adaptive_context_backward_regions": "grad x dtype regions weight bias scales shift center "
    "GRAD_REGIONS GRAD_SHIFT GRAD_BIAS SLOPE SLOPE_MOMENTS blocks seed",
    "adaptive_context_backward_x": "grad x dtype regions weight bias scales shift residual center "
    "linear quadratic constant GRAD_X GRAD_WEIGHT GRAD_BIAS blocks seed",
    "affinity_moments": "x dtype weight bias scales MEAN COVARIANCE blocks seed",
}


def bindings() -> ModuleType:
    return native_modules.cuda_kernels("ptx_cuda")


@functools.cache
def texts() -> dict[str, str]:
    """Returns the PTX of every kernel as a module of its own."""
    return kernels_of(bindings().texts())


def library_texts(arch: int, folder: Path) -> dict[str, str]:
    """Returns the same of the files that the library is linked from, compiled as for the library."""
    texts = []
    for source in sorted(build.SOURCES.rglob("*.cu")):
        target = folder / f"{source.stem}.ptx"
        flags = [*build.nvcc_flags(), f"-arch=compute_{arch}", "-ptx"]
        subprocess.run([build.find_nvcc(), *flags, source, "-o", target], check=True, capture_output=True)
        texts.append(target.read_text())
    return kernels_of(texts)


def kernels_of(texts: list[str]) -> dict[str, str]:
    """Cuts files into kernels: each with what its file declares."""
    kernels = {}
    for text in texts:
        files = "".join(re.findall(r"^\t*\.file.*\n", text, flags=re.MULTILINE))
        head, *entries = re.split(r"^(?=(?:\.visible |\.weak )?\.entry )", text, flags=re.MULTILINE)
        for entry in entries:
            body, _ = re.split(r"^}\n", entry, maxsplit=1, flags=re.MULTILINE)
            kernels[re.search(r"\.entry (\w+)", entry)[1]] = f"{head}{body}}}\n{files}"
    return kernels


class Kernels:
    """Has the functions of the emulation's module, on compiled code; changed(kernel, text) makes another text of it.

    alone: how the names of the kernels begin that run; the others do not, and leave zeros in the workspace.
    """

    def __init__(
        self,
        changed=lambda kernel, text: text,
        counts: list | None = None,
        seed: int = 0,
        alone: tuple[str, ...] | None = None,
    ) -> None:
        self.changed, self.counts, self.seed, self.alone = changed, counts, seed, alone

    def __getattr__(self, name: str):
        if name not in ARGUMENTS:
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, function: str, *arguments) -> None:
        memory, placed = ptx.Memory(), []
        for name, argument in zip(ARGUMENTS[function].split(), arguments, strict=True):
            is_array = isinstance(argument, np.ndarray)
            placed.append(memory.place_array(name.lower(), argument, name.isupper()) if is_array else argument)

        def launch(kernel, grid, threads, shared, parameters, seed):
            if self.alone is not None and not least.plain(kernel).startswith(self.alone):
                return
            text = self.changed(kernel, texts()[kernel])
            size = max((offset + size for offset, size in ptx.parse(text).parameters(kernel)), default=0)
            packed = ctypes.string_at(parameters, size)
            counting = self.counts is not None
            result = ptx.launch(text, kernel, memory, grid, threads, shared, packed, seed + self.seed, counting)
            if counting:
                self.counts.append((kernel, result))

        bindings().connect(launch, functools.partial(memory.place_scratch, written=self.alone is not None))
        getattr(bindings(), function)(*placed)
        memory.copy_arrays_back()
