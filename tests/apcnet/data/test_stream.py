"""Tests that the stream of training depends on seed and position alone, for any workers, ranks and interruptions."""

import collections
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from counted import Counted, shifted
from hypothesis import given, settings
from hypothesis import strategies as st

from apcnet.data.sample import SampleError
from apcnet.data.stream import LARGEST_STORED, Batches, generator_at, loader, permutation, sample_index
from apcnet.keys import ORDER, hashes, keyed, mix, shuffled


def stream(n=10, batch_size=4, seed=5, dataset=None, transform=shifted, rank=0, world=1, start_step=0, workers=0):
    dataset = Counted(n) if dataset is None else dataset
    batches = Batches(dataset, transform, seed, batch_size, rank, world)
    return loader(batches, range(start_step, 1 << 30), workers)


def first(steps, batches):
    """Returns the first batches as plain lists, which can be compared."""
    taken = [(b.images.tolist(), b.masks.tolist(), b.names, b.positions) for b in itertools.islice(batches, steps)]
    assert len(taken) == steps
    return taken


def indices(batches, steps):
    return [int(image[0, 0, 0]) - 100 for batch in itertools.islice(batches, steps) for image in batch.images]


# what a position is


def test_keys_are_splitmix64():
    """Compares with the published generator's first numbers from seed 1234567, as scalars and as arrays."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert hashes(1234567, 4).tolist() == published
    assert mix(np.array([7, 2**64 - 1], np.uint64)).tolist() == [mix(7), mix(2**64 - 1)]


def test_keys_depend_on_every_number():
    numbers = [(0,), (0, 0), (0, 1), (1, 0), (-1, 0), (2**63, 0), (0, 0, 0), (0, 2**40)]
    assert len({keyed(*given) for given in numbers}) == len(numbers)


def test_the_order_is_the_same_everywhere():
    """Compares with a written order, which must not change with PyTorch or numpy, or runs could not be resumed."""
    assert [sample_index(5, position, 10) for position in range(20)] == [
        *(1, 2, 9, 6, 8, 5, 3, 4, 7, 0),
        *(7, 9, 5, 0, 1, 8, 6, 3, 2, 4),
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257])
def test_an_epoch_is_a_permutation(n):
    for epoch in range(3):
        assert sorted(sample_index(0, epoch * n + offset, n) for offset in range(n)) == list(range(n))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(permutation(seed, epoch, 50)) for seed in (0, 1, 2**40, -1) for epoch in range(3)}
    assert len(orders) == 12


def test_every_sample_stands_everywhere_equally_often():
    counts = np.zeros((5, 5), int)
    for epoch in range(2000):
        counts[np.arange(5), permutation(3, epoch, 5)] += 1
    assert abs(counts - 400).max() < 90  # five standard deviations


def test_generators_differ_between_positions_and_seeds():
    draws = {float(torch.rand(1, generator=generator_at(seed, position))) for seed in (0, 1) for position in range(50)}
    assert len(draws) == 100


# the order of millions, which is computed


@pytest.mark.parametrize("sizes", [range(1, 400), pytest.param(range(400, 2001), marks=pytest.mark.slow)])
def test_a_computed_order_is_a_permutation(sizes):
    for n in sizes:
        assert sorted(shuffled(n, index, n) for index in range(n)) == list(range(n))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20_000), key=st.integers(0, 2**64 - 1))
def test_a_computed_order_is_a_permutation_for_any_key(n, key):
    assert len({shuffled(key, index, n) for index in range(n)} & set(range(n))) == n


@settings(deadline=None, max_examples=200)
@given(n=st.integers(2**20, 2**40), key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40))
def test_a_computed_order_repeats_no_index(n, key, start):
    offsets = {(start + i) % n for i in range(50)}
    taken = {shuffled(key, offset, n) for offset in offsets}
    assert len(taken) == len(offsets) and min(taken) >= 0 and max(taken) < n


def test_the_computed_order_is_the_same_everywhere():
    """Compares with a written order, which must not change, or runs could not be resumed."""
    n = 10_000_000
    assert [sample_index(5, position, n) for position in (0, 1, n - 1, n, 10**15)] == [
        *(3731363, 1093235, 3224353, 3314198, 5956333)
    ]
    assert sample_index(5, n + 3, n) == shuffled(keyed(5, ORDER, 1), 3, n)


def test_the_order_of_fewer_is_stored():
    n = LARGEST_STORED
    assert [sample_index(5, position, n) for position in range(5)] == permutation(5, 0, n)[:5].tolist()
    assert permutation(5, 0, n).nbytes == 8 << 20


def test_every_computed_order_occurs_equally_often():
    counts = collections.Counter(tuple(shuffled(keyed(key), i, 4) for i in range(4)) for key in range(24_000))
    assert len(counts) == 24 and abs(np.array([*counts.values()]) - 1000).max() < 160  # five standard deviations


@pytest.mark.parametrize("n", [10_000_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (2**20 + 1, 2**24))])
def test_the_computed_order_looks_random(n):
    """Tests uniformity, the independence of neighbours and of epochs, and fixed points, each to five deviations."""
    count, cells = 40_000, 100
    starts = np.array([0, n // 3, n - count // 4, n // 2])
    offsets = np.concatenate([np.arange(start, start + count // 4) for start in starts])
    first, second = (np.array([shuffled(keyed(1, ORDER, epoch), int(i), n) for i in offsets]) for epoch in (0, 1))
    expected = count / cells
    for values in (first, second, first % cells * (n / cells) + n / cells / 2, (first - second) % n):
        chi = ((np.histogram(values, cells, (0, n))[0] - expected) ** 2 / expected).sum()
        assert abs(chi - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5
    for one, other in ((first[:-1], first[1:]), (first, second), (first, offsets)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / count**0.5
    places = (np.stack([first[:-1], first[1:]]) * 10 // n).reshape(2, -1)  # pairs of neighbours, in 100 cells
    pairs = np.bincount(places[0] * 10 + places[1], minlength=100)
    assert abs(((pairs - expected) ** 2 / expected).sum() - 99) < 5 * (2 * 99) ** 0.5
    assert (first == offsets).sum() < 6  # one on average among all n


# batches


def test_a_batch_is_its_positions():
    batch = Batches(Counted(), shifted, seed=5, batch_size=4)[3]
    assert batch.positions == [12, 13, 14, 15]
    assert batch.names == [f"picture {sample_index(5, position, 10)}" for position in batch.positions]
    assert batch.images.shape == (4, 3, 2, 2) and batch.images.dtype == torch.uint8
    alone = shifted(Counted()[sample_index(5, 14, 10)], generator_at(5, 14))
    assert torch.equal(batch.images[2], alone[0]) and torch.equal(batch.masks[2], alone[1])


def test_batches_cross_the_borders_of_epochs():
    seen = indices(stream(n=10, batch_size=4), 5)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (3, 8)])
def test_batches_larger_than_the_dataset(n, batch_size):
    seen = indices(stream(n=n, batch_size=batch_size), 3)
    whole = len(seen) // n * n
    assert sorted(seen[:whole]) == sorted(list(range(n)) * (whole // n))
    assert len(seen) == 3 * batch_size


def test_seeds_decide_order_and_transforms():
    one, same, other = (stream(n=1, batch_size=1, seed=seed) for seed in (5, 5, 6))
    masks = [first(6, batches) for batches in (one, same, other)]
    assert masks[0] == masks[1] != masks[2]
    assert len({str(batch[1]) for batch in masks[0]}) == 6  # one sample, six ways


@pytest.mark.parametrize("step", [1, 7, 10**9])
def test_a_resumed_stream_is_the_tail(step):
    """Tests that a resumed run reads from its next step on, and nothing before it."""
    read = []
    far = first(3, stream(start_step=step, transform=lambda s, g: (read.append(s.name), shifted(s, g))[1]))
    assert len(read) == 12 and far[0][3] == list(range(4 * step, 4 * step + 4))
    if step < 100:
        assert far == first(step + 3, stream())[step:]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks(world):
    """Tests that the batches of all ranks, step by step, form the stream of a single process in its order."""
    ranks = [first(6, stream(rank=rank, world=world)) for rank in range(world)]
    for step, whole in enumerate(first(6, stream())):
        parts = [rank[step] for rank in ranks]
        for kind in range(4):
            assert [one for each in zip(*(part[kind] for part in parts), strict=True) for one in each] == whole[kind]


# workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers(workers):
    assert first(8, stream(workers=workers)) == first(8, stream())


def test_workers_on_a_rank_after_a_resume():
    given = {"rank": 1, "world": 2, "start_step": 5}
    assert first(4, stream(workers=2, **given)) == first(4, stream(**given))


def test_spawned_workers():
    usual = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("spawn", force=True)
        assert first(3, stream(workers=1)) == first(3, stream())
    finally:
        multiprocessing.set_start_method(usual, force=True)


def test_workers_work_ahead(tmp_path):
    """Tests that the next batch is begun before the current one arrives."""
    batches = stream(transform=Recorded(tmp_path), workers=1)
    next(batches)
    for _ in range(500):
        if len(list(tmp_path.iterdir())) >= 8:
            break
        time.sleep(0.01)
    assert len(list(tmp_path.iterdir())) >= 8


class Recorded:
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, sample, generator):
        mask = torch.randint(0, 2**31, sample.mask.shape, generator=generator)
        (self.folder / str(int(mask.flatten()[0]))).touch()
        return sample.image, mask


def test_workers_share_the_keys():
    """Tests that two workers return the items of an evaluation in the order of the keys."""
    items = list(loader(Identified(), range(1, 7, 2), workers=2))
    assert [key for key, _ in items] == [1, 3, 5] and {worker for _, worker in items} == {0, 1}


class Identified:
    def __getitem__(self, key):
        return key, torch.utils.data.get_worker_info().id


def test_interrupts_are_the_parents_to_handle():
    """Tests that workers continue after Ctrl-C, which reaches them too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it from the start
    try:
        handlers = list(loader(Handlers(), range(1), workers=1))
        assert handlers == [(signal.SIG_IGN, signal.SIG_IGN)]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


class Handlers:
    def __getitem__(self, key):
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def test_no_keys_need_no_workers():
    """Tests that a run that has finished, which has no step left, opens its stream without an error."""
    assert list(loader(Identified(), range(0), workers=2)) == []


def test_workers_end_with_the_process_that_uses_them():
    """Tests that workers end even if a traceback keeps the stream alive until the end."""
    program = (
        "from apcnet.data.stream import loader\n"
        "items = loader(list(range(9)), range(9), workers=1)\n"
        "print(next(items), items.gi_frame.f_locals['iterator']._workers[0].pid)\n"
    )
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and time.monotonic() - began < 30, run.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout.split()[1]), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(workers):
    """Tests that batches do not depend on global random state, and leave it unchanged."""
    taken = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        taken.append(first(4, stream(workers=workers)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert taken[0] == taken[1]


# what goes wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_named(workers):
    dataset = Counted(broken=3)
    position = next(p for p in range(10) if sample_index(5, p, 10) == 3)
    batches = stream(dataset=dataset, workers=workers)
    message = rf"'picture 3' \(number 3\), position {position} of the stream: OSError: image file is truncated"
    before = first(position // 4, batches)
    with pytest.raises(SampleError, match=message):
        next(batches)
    assert before == first(position // 4, stream())


def test_fewer_workers_than_none():
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        next(stream(workers=-1))
