"""Fixes and describes what else than the config the bits of a run depend on; a resumed run tells a difference."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apc_kernels import info
from apcnet.config import Config
from apcnet.data.sample import Dataset
from apcnet.data.shards import Pairs
from apcnet.distributed import world_size

PACKAGES = ("torch", "numpy", "pillow")
VARIABLES = (  # by these, libraries choose their kernels
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
)


@contextmanager
def reproducible(config: Config, device: torch.device) -> Iterator[None]:
    """Seeds and configures PyTorch for a run, and afterwards restores its random state and settings."""
    settings: Any = torch.utils.deterministic  # type checkers do not see its one property
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms)
            torch.backends.cudnn.benchmark = cudnn
            settings.fill_uninitialized_memory = fill


def environment(device: torch.device, data: Dataset, val_data: Dataset) -> dict[str, str | int]:
    """Returns versions, hardware, the kernels that serve this process, variables, and digests of the data."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        **info.kernels(device.type),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        **{name: os.environ.get(name, "unset") for name in VARIABLES},
        "training files": files_digest(data),
        "validation files": files_digest(val_data),
    }


def changes(before: dict[str, str | int], now: dict[str, str | int]) -> list[str]:
    """Lists the differences between two environments, as lines such as 'threads: 2 → 4'."""
    names = [name for name in now if before.get(name) != now[name]]
    return [f"{name}: {before.get(name, 'unknown')} → {now[name]}" for name in names]


def names_digest(data: Dataset) -> str:
    """Returns a digest of the names of a data set's samples, in their order; shards hold it."""
    if isinstance(pairs := getattr(data, "pairs", None), Pairs):
        return pairs.names_digest
    return _digest("\n".join(data.names))


def files_digest(data: Dataset) -> str:
    """Returns a digest of the names and file sizes of a data set's samples; generated scenes have no files."""
    pairs = getattr(data, "pairs", ())
    if isinstance(pairs, Pairs):
        return pairs.digest
    paths = [path for pair in pairs for path in (pair.image, pair.mask)]
    return _digest("\n".join([*data.names, *(str(_size(path)) for path in paths)]))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it is reported when it is read
        return -1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def _processor() -> str:
    """Returns the processor's model, and the instructions that PyTorch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"
