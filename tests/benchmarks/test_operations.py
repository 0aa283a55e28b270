"""Tests that every entry of the table of operations is checked, timed and counted, on a small case."""

import itertools
from dataclasses import replace

import pytest

from benchmarks import heads, models, run, timing
from benchmarks.run import OPERATIONS, Row
from benchmarks.setting import LAYOUTS


@pytest.fixture
def small(monkeypatch, threads):
    """Reduces networks, the machine's rates and repetitions, and invents the memory."""
    threads(1)
    for name, value in (("CHANNELS", 16), ("WIDTH", 8)):
        monkeypatch.setattr(heads, name, value)
    monkeypatch.setattr(models, "SIZES", {"depth": 18, "width": 8, "channels": 8})
    monkeypatch.setattr(timing, "COPIED", 2**20)
    monkeypatch.setattr(timing, "MATRIX", 64)
    monkeypatch.setattr(run, "paired", lambda *calls, **_: timing.paired(*calls, seconds=0, rounds=1))
    monkeypatch.setattr(run, "peaks", lambda *_, **sides: {"memory_mib": 1.0, "other_memory_mib": 2.0})
    caches = models.built, timing.copy_bandwidth, timing.matrix_rate
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].cases])
def test_every_operation_is_measured(name, small):
    operation = OPERATIONS[name]
    if name in (
        "load_head",
        "accelerate",
        "model",
    ):  # counted on meta tensors, which torch.empty does not make in tests
        operation = replace(operation, counts=lambda case, t, backward: (1, 1))
    backend = "reference" if operation.kernel else operation.backend  # the checkout need not have a compiled library
    others = {row.other for row, _ in run.rows(operation)}
    for layout, direction, other in itertools.product(LAYOUTS, operation.directions, others):
        row, ours = run.measure(Row(operation, operation.small, layout, direction, backend, other))
        ours()
        assert (row["operation"], row["other"], row["backend"]) == (name, other, backend)
        assert row["case"].startswith(direction) and row["bytes"] > 0 and row["ratio"] > 0
        assert ("memory_mib" in row) == operation.memory and ("operations" in row) == (name != "augment")
        assert ("kept_mib" in row) == (name == "pyramid_conv" and direction != "forward")
        assert ("images_per_s" in row) == (name == "model")


def test_what_is_wrong_is_not_timed(monkeypatch):
    operation = OPERATIONS["encode"]
    row = Row(operation, operation.small, "nchw", "forward", "PyTorch", "residuals written out")
    run.sides(row)
    with pytest.raises(AssertionError, match="2x8x6x6-3, result 0: error"):
        run.sides(replace(row, operation=replace(operation, ours=lambda *given: 1.01 * operation.ours(*given))))


def test_every_kernel_is_watched():
    watched = {(row.operation.name, row.layout, row.direction) for row in run.SMALL}
    kernels = [entry for entry in OPERATIONS.values() if entry.kernel]
    assert watched == {(entry.name, layout, way) for entry in kernels for layout in LAYOUTS for way in entry.directions}
    row = next(row for row in run.SMALL if row.operation.name == "pyramid_pool")
    run.check_kernels(row)
    wrong = replace(row.operation, ours=lambda *given: 1.01 * row.operation.ours(*given))
    with pytest.raises(AssertionError, match="result 0: error"):
        run.check_kernels(replace(row, operation=wrong))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_row_has_a_name_of_its_own(name):
    rows = [row.joined() for row, _ in run.rows(OPERATIONS[name])]
    assert len(rows) == len(set(rows))
    assert name == "accelerate" or not all(long for _, long in run.rows(OPERATIONS[name]))
