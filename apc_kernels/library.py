"""Finds and loads the compiled libraries, or gives the reason why one is missing.

A checkout uses the libraries in its `build/native`. An installed package uses those in its own folder, or else those
that `python -m apc_kernels.build` has put into the user's cache. A library is loaded once, at its first use.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Library:
    """Describes a compiled library: the file that was loaded, or the reason why there is none."""

    path: Path | None
    reason: str  # what it was built with, or why it is missing
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self.path is not None


HOW_TO_BUILD = "python -m apc_kernels.build"


def _folders() -> list[Path]:
    from apc_kernels import build  # not above: `python -m apc_kernels.build` would find itself imported already

    if build.CHECKOUT:
        return [build.CHECKOUT / "build" / "native"]
    return [build.PACKAGE / "native", build.user_cache()]


def _load(device: str) -> Library:
    from apc_kernels import build

    file_name = build.CPU_LIBRARY if device == "cpu" else build.CUDA_LIBRARY
    missing = Library(None, f"never built (run {HOW_TO_BUILD})")
    for folder in _folders():
        if not (folder / build.RECORD).is_file():
            continue
        record = json.loads((folder / build.RECORD).read_text())
        if build.CHECKOUT and record["sources"] != build.source_hash():
            return Library(None, f"csrc has changed since the libraries were built (run {HOW_TO_BUILD})", record)
        if not record[device]["built"]:
            missing = Library(None, f"not built: {record[device]['reason']} (run {HOW_TO_BUILD} to try again)", record)
            continue
        if not (folder / file_name).is_file():
            missing = Library(None, f"{folder / file_name} was deleted (run {HOW_TO_BUILD})", record)
            continue
        try:
            torch.ops.load_library(str(folder / file_name))
        except (OSError, RuntimeError) as error:
            missing = Library(None, f"{folder / file_name} does not load: {error}", record)
            continue
        return Library(folder / file_name, record[device]["reason"], record)
    return missing


@functools.cache
def cpu() -> Library:
    return _load("cpu")


@functools.cache
def cuda() -> Library:
    if torch.version.cuda is None:  # it would not find libtorch_cuda.so
        kind = "for AMD GPUs" if torch.version.hip else "without CUDA"
        return Library(None, f"torch {torch.__version__} is a build {kind}")
    return _load("cuda")
