"""Joins the processes of a distributed run, and shares values and batch statistics between them."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from secrets import token_hex

import torch
from torch import nn

from apcnet.watch import PATIENCE as WATCHED
from apcnet.watch import Watch, connect

GLOO_THREADS = 2  # that execute calls
PATIENCE = 5  # seconds in which torchrun ends the other processes of a run that failed


_watch: Watch | None = None  # of the group that this process has joined


@contextmanager
def process_group(device: str | None = None, timeout: float = WATCHED) -> Iterator[torch.device]:
    """Joins the other processes, if torchrun has started several, until the block ends; gives this one's device.

    Args:
        device: cpu or cuda; by default cuda if there is a GPU. Each process takes the GPU of its local rank.
        timeout: The seconds without progress of any process after which this one exits, and names those behind.
    """
    global _watch
    if not timeout > 0:
        raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected cpu, since PyTorch finds no GPU, got {device!r}")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if kind.index is None and local >= torch.cuda.device_count():
            raise ValueError(
                f"device: expected a GPU for each process, got {torch.cuda.device_count()} for process {local}"
            )
        kind = torch.device("cuda", local if kind.index is None else kind.index)
        torch.cuda.set_device(kind)
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized()
    if joins:
        longer = timedelta(seconds=max(1800, 2 * timeout))  # the watch tells more than a library's timeout
        torch.distributed.init_process_group("nccl" if kind.type == "cuda" else "gloo", timeout=longer)
        _watch = Watch(connect(gather(token_hex(8))[0]), rank(), world_size(), timeout)
    try:
        yield kind
        if joins:
            settle()
    except Exception as error:
        if _watch is None or not joins:
            raise
        if not lost_process(error):
            _watch.fail(" ".join(str(error).split()))
            raise
        # The process that ended tells the reason. torchrun ends this one meanwhile; another launcher may not.
        time.sleep(PATIENCE)
        known = _watch.failure or "another process of the run has ended: its message tells the reason"
        raise ConnectionError(known) from None
    finally:
        if joins:
            if _watch is not None:
                _watch.close()
                _watch = None
            torch.distributed.destroy_process_group()


def reached(step: int | None = None) -> None:
    """Records that this process has reached a step of the run, or without one that it goes on in the same step."""
    if _watch is not None:
        _watch.reached(step)


def lost_process(error: BaseException | None) -> bool:
    """Tells whether an error says that the connection to another process was lost."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def rank() -> int:
    """Returns the rank of this process; a single process has rank 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(value: object) -> list:
    """Collects a value that can be pickled from every process, and returns all of them in the order of ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
        settle()
    return values


def share_state(module: nn.Module) -> None:
    """Copies weights and buffers of the first process to all others; every process of a group must call it."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
        settle()


def settle() -> None:
    """Waits until gloo's threads have let go of the tensors of all calls before; every process of a group must call it.

    They do so some time after a call has returned, and need Python's global lock. If this process forks or exits just
    then, the new process hangs or this one aborts.
    """
    if torch.distributed.get_backend() != "gloo":
        return
    for _ in range(2 * GLOO_THREADS):  # so that each of them has taken a call, and so has finished the calls before
        tensor = torch.zeros(1)
        references = sys.getrefcount(tensor)
        torch.distributed.all_reduce(tensor)
        for _ in range(1000):
            time.sleep(0.001)  # without the lock
            if sys.getrefcount(tensor) <= references:
                break


def synchronise_batch_norms(model: nn.Module) -> None:
    """Replaces the batch norms in a model by SyncBatchNorm, if several processes train on GPUs.

    Otherwise it changes nothing: PyTorch's SyncBatchNorm takes no CPU tensors, and a single process has nothing to
    share.
    """
    if world_size() > 1 and next(model.parameters()).device.type == "cuda":
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        if "timm" in sys.modules:  # timm's batch norms may include an activation, which PyTorch's function would drop
            from timm.layers import convert_sync_batchnorm as convert
        convert(model)  # in place, but for a model that is itself a batch norm
