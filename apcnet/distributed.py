"""Several processes: how they start, which one this is, of how many, and where they share batch statistics."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """Joins the processes that torchrun has started, if it has, for as long as the block lasts; gives its device.

    Args:
        device: cpu or cuda; None: cuda where there is one. Of several GPUs each process takes the one of its number.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected cpu, this machine has no GPU that PyTorch sees; got {device!r}")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if kind.index is None and local >= torch.cuda.device_count():
            raise ValueError(f"device: process {local} has none, there are {torch.cuda.device_count()} GPUs")
        kind = torch.device("cuda", local if kind.index is None else kind.index)
        torch.cuda.set_device(kind)
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized()
    if joins:
        torch.distributed.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        yield kind
    finally:
        if joins:
            torch.distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 where it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gathered(value: object) -> list:
    """A value of every process, in their order; any that can be pickled."""
    values = [value] * world()
    if world() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def synchronised(model: nn.Module) -> nn.Module:
    """The model with its batch norms over all processes where that can run: CUDA, more than one process.

    Anywhere else it is given back as it is: PyTorch's SyncBatchNorm takes no CPU tensors, and alone there is nothing
    to share.
    """
    if world() == 1 or next(model.parameters()).device.type != "cuda":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
