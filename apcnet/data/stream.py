"""The order of training: an endless stream in which everything about a sample follows from the seed and its position.

Position p of the stream is sample permutation(p mod n) of epoch p div n, and transforms draw from a generator of its
own. The global batch of step t is the positions t·B to t·B + B − 1, whatever the number of processes; rank r of w
takes those that leave r when divided by w. A batch is thus a function of (seed, step, rank), computed wherever a
worker is free: any number of workers gives the same batches, and to resume at step t is to ask for step t, nothing is
replayed. No global random state is read or written, here or in PyTorch's loader, which gets a generator of its own.
"""

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from apcnet.data.sample import Sample, SampleError
from apcnet.keys import AUGMENTATION, ORDER, hashes, keyed

Transform = Callable[[Sample, torch.Generator], tuple[Tensor, Tensor]]


@functools.lru_cache(maxsize=4)  # a batch may lie across the border of two epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n samples in an epoch."""
    return np.argsort(hashes(keyed(seed, ORDER, epoch), n))


def sample_index(seed: int, position: int, n: int) -> int:
    """Which of n samples stands at a position of the stream."""
    epoch, offset = divmod(position, n)
    return int(permutation(seed, epoch, n)[offset])


def generator_at(seed: int, position: int) -> torch.Generator:
    """What the sample at a position is transformed with.

    PyTorch's generator keeps the lower 32 bits of its seed: among a million positions about a hundred pairs draw alike.
    """
    return torch.Generator().manual_seed(keyed(seed, AUGMENTATION, position))


class Batch(NamedTuple):
    """What one rank gets for one step: images and masks as the transform gives them, stacked."""

    images: Tensor
    masks: Tensor
    names: list[str]
    positions: list[int]


@dataclass(frozen=True)
class Batches:
    """The stream of one rank: batches[step], for every step there may ever be; `loader` takes them from any step on."""

    dataset: Sequence[Sample]
    transform: Transform  # of a Sample and a torch.Generator makes image and mask, in one batch all of one size
    seed: int  # of order and transforms
    batch_size: int  # of the global batch, all ranks together
    rank: int = 0  # which process this is, of how many
    world: int = 1

    def __getitem__(self, step: int) -> Batch:
        start = step * self.batch_size
        positions = list(range(start + self.rank, start + self.batch_size, self.world))
        samples = [self.sample(position) for position in positions]
        images, masks, names = zip(*samples, strict=True)
        return Batch(default_collate(images), default_collate(masks), list(names), positions)

    def sample(self, position: int) -> tuple[Tensor, Tensor, str]:
        """Image, mask and name of the sample at a position."""
        index = sample_index(self.seed, position, len(self.dataset))
        try:
            sample = self.dataset[index]
            image, mask = self.transform(sample, generator_at(self.seed, position))
        except Exception as error:
            what = f"sample {self.dataset.names[index]!r} (number {index}), position {position} of the stream"
            raise SampleError(f"{what}: {type(error).__name__}: {error}") from error
        return image, mask, sample.name


def loader(items, keys: Sequence[int], workers: int = 0, pin_memory: bool = False) -> Iterator:
    """items[key] for every one of the keys, in their order.

    PyTorch's loader with a generator of its own, nothing collated and nothing drawn. A SampleError arrives as it is.

    Args:
        items: batches of a stream, or samples.
        keys: steps of a stream, or indices of samples.
        workers: processes that make items ahead, of keys as many at most; 0 makes each when it is asked for.
        pin_memory: hand out items in page-locked memory, for asynchronous copies to a GPU.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    iterator = iter(
        DataLoader(
            Caught(items),
            batch_size=None,
            sampler=keys,
            num_workers=min(workers, len(keys)),
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            pin_memory=pin_memory,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
    )
    if workers:
        atexit.register(_kill, iterator._workers)  # they are deaf to the signals that Python would end them by
    try:
        for item in iterator:
            if isinstance(item, SampleError):
                iterator = None  # the workers end now, and not when the traceback goes
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SampleError(f"a process that makes samples was ended from outside; was memory short? {error}") from None


class Caught:
    """items[key], or its SampleError: raised in a worker it would arrive wrapped in the worker's traceback."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, key):
        try:
            return self.items[key]
        except SampleError as error:
            return error


def _as_it_is(item):
    return item


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach all processes; the parent may want one batch more before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill(workers: list[multiprocessing.Process]) -> None:
    """What is left of them when the parent exits; they end by themselves when it is killed."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
