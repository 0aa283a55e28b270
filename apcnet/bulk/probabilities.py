"""Writes the probabilities of all classes to .npy files, a few rows at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from apcnet.inference.protocol import Keep

TYPE = np.dtype("<f2")


@contextmanager
def probability_files(paths: Sequence[Path], shape: tuple[int, int, int]) -> Iterator[Keep | None]:
    """Gives the function that writes the probabilities of each image to its file; None for no files.

    A block that fails removes the files.
    """
    files: list[ProbabilityFile] = []
    try:
        files += (ProbabilityFile(path, shape) for path in paths)
        yield (lambda image, top, band: files[image].write(top, band)) if files else None
        for file in files:
            file.close()
    except BaseException:
        for file in files:
            file.remove()
        raise


class ProbabilityFile:
    """Writes an array (K, H, W) of float16 to a .npy file, which `numpy.load(path, mmap_mode="r")` reads in parts."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path, self.shape = path, shape
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("wb")
        header = {"descr": TYPE.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.start = self.file.tell()

    def write(self, top: int, band: Tensor) -> None:
        """Writes rows of all classes, (K, rows, W), from the row `top` on."""
        _, height, width = self.shape
        for number, rows in enumerate(band.cpu().numpy().astype(TYPE)):
            self.file.seek(self.start + (number * height + top) * width * TYPE.itemsize)
            self.file.write(rows.tobytes())

    def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        """Removes the file, which may be on a full disk: then closing it fails."""
        with suppress(OSError):
            self.file.close()
        self.path.unlink(missing_ok=True)
