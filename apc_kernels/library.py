"""Finds and loads the compiled libraries, or says why not.

A checkout uses the libraries in its `build/native`, an installed package those beside it, and, failing that, those
that `python -m apc_kernels.build` put into the user's cache. They are loaded once, when first asked for.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Library:
    path: Path | None
    reason: str  # why it is there, or why not
    record: dict = field(default_factory=dict)

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
    missing = Library(None, f"never built ({HOW_TO_BUILD} does it)")
    for folder in _folders():
        if not (folder / build.RECORD).is_file():
            continue
        record = json.loads((folder / build.RECORD).read_text())
        if build.CHECKOUT and record["sources"] != build.source_hash():
            return Library(None, f"csrc has changed since the libraries were built ({HOW_TO_BUILD})", record)
        if not record[device]["built"]:
            missing = Library(None, f"not built: {record[device]['reason']} ({HOW_TO_BUILD} tries again)", record)
            continue
        if not (folder / file_name).is_file():
            missing = Library(None, f"{folder / file_name} is gone ({HOW_TO_BUILD} makes it again)", record)
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
        return Library(None, f"torch {torch.__version__} is a build without CUDA")
    return _load("cuda")
