"""Orders the samples of training in an endless stream, in which the seed and the position decide everything.

Position p of the stream is sample permutation(p mod n) of epoch p div n, and its transform draws from a generator of
its own. The global batch of step t holds the positions t·B to t·B + B − 1, for any number of processes; rank r of w
takes every w-th of them, from the r-th on. So a batch is a function of (seed, step, rank): any number of workers gives
the same batches, and a run resumes at step t by asking for step t, without replaying the steps before it. Global random
state is neither read nor written; PyTorch's loader, too, gets a generator of its own.
"""

import atexit
import functools
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils import signal_handling

from apcnet.data.sample import Dataset, Sample, SampleError
from apcnet.keys import AUGMENTATION, ORDER, hashes, keyed, shuffled

Transform = Callable[[Sample, torch.Generator], tuple[Tensor, Tensor]]


LARGEST_STORED = 1 << 20  # samples whose order is stored, in 8 MiB; the order of more is computed, place by place


@functools.lru_cache(maxsize=4)  # a batch may span two epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of n samples in an epoch, as a permutation of their indices."""
    return np.argsort(hashes(keyed(seed, ORDER, epoch), n))


def sample_index(seed: int, position: int, n: int) -> int:
    """Returns the index, among n samples, of the one at a position of the stream."""
    epoch, offset = divmod(position, n)
    if n > LARGEST_STORED:
        return shuffled(keyed(seed, ORDER, epoch), offset, n)
    return int(permutation(seed, epoch, n)[offset])


def generator_at(seed: int, position: int) -> torch.Generator:
    """Makes the generator that the transform of the sample at a position draws from.

    PyTorch's generator keeps the lower 32 bits of its seed: among a million positions, about a hundred pairs share one.
    """
    return torch.Generator().manual_seed(keyed(seed, AUGMENTATION, position))


class Batch(NamedTuple):
    """Holds what one rank trains on in one step: the transformed images and masks, stacked."""

    images: Tensor
    masks: Tensor
    names: list[str]
    positions: list[int]


@dataclass(frozen=True)
class Batches:
    """Makes the batches of one rank: `batches[step]`, for any step; `loader` reads them ahead from any step on."""

    dataset: Dataset
    transform: Transform  # makes image and mask from a Sample and a torch.Generator; one size in all of a batch
    seed: int  # decides the order and the transforms
    batch_size: int  # the size of the global batch, all ranks together
    rank: int = 0
    world: int = 1  # the number of ranks

    def __getitem__(self, step: int) -> Batch:
        start = step * self.batch_size
        positions = list(range(start + self.rank, start + self.batch_size, self.world))
        samples = [self.sample(position) for position in positions]
        images, masks, names = zip(*samples, strict=True)
        return Batch(default_collate(images), default_collate(masks), list(names), positions)

    def sample(self, position: int) -> tuple[Tensor, Tensor, str]:
        """Returns the transformed image, the mask and the name of the sample at a position."""
        index = sample_index(self.seed, position, len(self.dataset))
        try:
            sample = self.dataset[index]
            image, mask = self.transform(sample, generator_at(self.seed, position))
        except Exception as error:
            what = f"sample {self.dataset.names[index]!r} (number {index}), position {position} of the stream"
            raise SampleError(f"{what}: {type(error).__name__}: {error}") from error
        return image, mask, sample.name


def loader(items, keys: Sequence[int], workers: int = 0, pin_memory: bool = False) -> Iterator:
    """Yields items[key] for every key, in order, computed ahead by worker processes.

    Uses PyTorch's loader with a generator of its own; nothing is collated, and a SampleError arrives unchanged.

    Args:
        items: The batches of a stream, or a data set.
        keys: Steps of a stream, or indices of samples.
        workers: The number of processes that compute items ahead, at most one for each key; 0 computes each item on
            demand, in this process.
        pin_memory: Return items in page-locked memory, for asynchronous copies to a GPU.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    workers = min(workers, len(keys))
    iterator = iter(
        DataLoader(
            _ErrorsAsItems(items),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            collate_fn=_identity,
            generator=torch.Generator(),
            pin_memory=pin_memory,
            worker_init_fn=_ignore_interrupts,
        )
    )
    processes = iterator._workers if workers else []
    if workers:
        # PyTorch would raise an error for a killed worker wherever this process is; the iterator finds it out as well
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        atexit.register(_kill, processes)  # they ignore the signals by which Python would end them
    try:
        for item in iterator:
            if isinstance(item, SampleError):
                iterator = None  # ends the workers now, and not when the traceback is freed
                raise item
            yield item
    except (RuntimeError, OSError, EOFError):
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
        if not ended:
            raise
        killed = next(process for process in processes if process.sentinel == ended[0])
        killed.join()
        raise SampleError(
            f"a worker process was killed (exit status {killed.exitcode}), perhaps because memory ran out; "
            "try fewer workers"
        ) from None


class _ErrorsAsItems:
    """Returns a SampleError as an item, because PyTorch would wrap a raised one in the worker's traceback."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, key):
        try:
            return self.items[key]
        except SampleError as error:
            return error


def _identity(item):
    return item


def _ignore_interrupts(worker: int) -> None:
    """Ignores the signals that reach all processes of a run: the parent may need one more batch."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _kill(workers: list[multiprocessing.Process]) -> None:
    """Kills the workers that still run when the parent exits; they end by themselves when the parent is killed."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
