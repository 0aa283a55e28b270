"""Tests damaged run folders: the same command ends with the same bits, or its error names the folder."""

import functools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_runs
import torch
from judge import verdict
from small_runs import digest, small

from apcnet.training import train

Damage = Callable[[Path], None]  # damages a copy of the folder of a finished run

FILES = ("config.json", "environment.json", "log.jsonl", "metrics.json", "last.pt", "previous.pt", "preview")
WRONG = (None, True, -1, 7, 1.5, float("nan"), "x", b"x", [], [[]], {}, {"x": 1}, torch.ones(2), 10**30)
TEXTS = ("", "{}", "[]", "null", "1", '"x"', "{", "\0" * 99, "[" * 100_000, "9" * 5000, '{"step": "x"}', "\ufeff{}")


def cases(seed: int, count: int | None = None) -> Iterator[tuple[str, Damage]]:
    """Yields a name and a damage for each case: all that are written down if no count is given, or a random sample.

    A random sample ends with as many random changes of bytes.
    """
    written, draws = list(_written()), random.Random(seed)
    yield from written if count is None else draws.sample(written, count)
    for _ in range(len(written) if count is None else count):
        file, number = draws.choice(("config.json", "log.jsonl", "last.pt", "previous.pt")), draws.getrandbits(32)
        yield f"{file}, bytes changed by {number}", functools.partial(_change_bytes, file, number)


def _written() -> Iterator[tuple[str, Damage]]:
    for file in FILES:
        for way in (_nothing, _folder, _circle, _pipe):
            yield f"{file}: {way.__name__[1:]}", functools.partial(_replace, file, way)
    for file in ("config.json", "environment.json", "log.jsonl", "metrics.json"):
        for text in TEXTS:
            yield f"{file}: {text[:20]!r}", functools.partial(_write, file, text)
    for text in TEXTS:
        yield f"log.jsonl: {text[:20]!r} in the middle", functools.partial(_insert_line, text)
    for path in _paths(small(Path("data")).to_json()):
        for value in ("x", [], {}, -1, [[[1]]], 1e400, None):
            yield f"config.json: {path} is {value}", functools.partial(_set_json, "config.json", path, value)
    for entry in (
        "step",
        "evaluated",
        "best",
        "waited",
        "objects",
        "config",
        "images",
        "sample_names",
        "class_weights",
        "environment",
    ):
        yield from _entries((entry,), WRONG)
    for entry in ("model", "average", "optimizer", "scaler"):
        yield from _entries((entry,), WRONG)
    for path in (
        ("best", "miou"),
        ("best", "step"),
        ("config", "steps"),
        ("config", "model"),
        ("environment", "torch"),
    ):
        yield from _entries(path, WRONG)
    tensors = (torch.ones(2), torch.ones(1, dtype=torch.int32), torch.eye(2).to_sparse(), torch.ones(2, device="meta"))
    for path in (("model", "backbone.stem.0.weight"), ("optimizer", 0), ("optimizer", 0, "momentum_buffer")):
        yield from _entries(path, (*WRONG, *tensors))
    for path in (("model", "another"), ("optimizer", 999), ("optimizer", "0"), ("scaler", "scale")):
        yield from _entries(path, (*WRONG, *tensors))
    for path in (("model", "backbone.stem.0.weight"), ("optimizer", 0, "momentum_buffer")):
        for value in (float("nan"), float("inf")):
            yield from _entries(path, (value,), fill=True)


def _entries(path: tuple, values: tuple, fill: bool = False) -> Iterator[tuple[str, Damage]]:
    for value in (..., *values) if not fill else values:
        for previous in ("whole", "the same", "none"):
            name = "missing" if value is ... else repr(value)
            damage = functools.partial(_set_entry, path, value, previous, fill)
            yield f"last.pt: {path} is {name}, previous.pt is {previous}", damage


def _paths(content: dict, above: tuple = ()) -> Iterator[tuple]:
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _set(content: dict, path: tuple, value: object) -> None:
    *above, last = path
    for key in above:
        content = content[key]
    if value is ...:
        content.pop(last, None)
    else:
        content[last] = value


def _set_json(file: str, path: tuple, value: object, run: Path) -> None:
    content = json.loads((run / file).read_text())
    _set(content, path, value)
    (run / file).write_text(json.dumps(content))


def _set_entry(path: tuple, value: object, previous: str, fill: bool, run: Path) -> None:
    for name in ("last.pt", "previous.pt") if previous == "the same" else ("last.pt",):
        state = torch.load(run / name, weights_only=True)
        filled = torch.full_like(functools.reduce(lambda part, key: part[key], path, state), value) if fill else value
        if path[0] == "best" and state["best"] is None:  # before the first evaluation
            state["best"] = {"miou": 0.5, "dice": 0.6, "step": 0}
        _set(state, path, filled)
        (run / name).unlink()  # the two may be hard links to the same bytes
        torch.save(state, run / name)
    if previous == "none":
        (run / "previous.pt").unlink()


def _write(file: str, text: str, run: Path) -> None:
    (run / file).write_text(text, encoding="utf-8")


def _insert_line(text: str, run: Path) -> None:
    first, *others = (run / "log.jsonl").read_text().splitlines(keepends=True)
    _write("log.jsonl", "".join([first, text + "\n", *others]), run)


def _replace(file: str, way: Damage, run: Path) -> None:
    path = run / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    way(path)


def _nothing(path: Path) -> None:
    pass


def _folder(path: Path) -> None:
    path.mkdir()


def _circle(path: Path) -> None:
    path.symlink_to(path)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _change_bytes(file: str, seed: int, run: Path) -> None:
    draws, data = random.Random(seed), bytearray((run / file).read_bytes())
    at, to = sorted(draws.randrange(len(data)) for _ in range(2))
    match draws.randrange(4):
        case 0:
            data[at] ^= 1 << draws.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at:to]
        case 3:
            data[at:at] = draws.randbytes(draws.randrange(1, 99))
    (run / file).unlink()
    (run / file).write_bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trains two steps; returns the config, the folder, and the scores."""
    folder = tmp_path_factory.mktemp("finished")
    config = small(small_runs.write_images(folder / "data"), steps=2, save_every=1, eval_every=2)
    return config, folder / "run", train(config, folder / "run")


@pytest.mark.parametrize("count", [6, pytest.param(None, marks=pytest.mark.slow)])
def test_a_damaged_folder_ends_with_the_same_bits_or_is_named(finished, tmp_path, monkeypatch, count):
    config, whole, scores = finished
    small_runs.without_pictures(monkeypatch)
    expected, wrong, verdicts = digest(whole / "final.safetensors"), [], []
    for number, (name, damage) in enumerate(cases(0, count)):
        run = tmp_path / f"run-{number}"
        shutil.copytree(whole, run)
        damage(run)

        def is_right(result, run=run) -> bool:
            return result == scores and digest(run / "final.safetensors") == expected

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdicts.append(verdict(lambda run=run: train(config, run), is_right, run.name))
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        shutil.rmtree(run)
    print(f"{len(verdicts)} cases: {verdicts.count('right')} right, {verdicts.count('named')} named")
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong)
    assert {"right", "named"} <= set(verdicts)


@pytest.mark.parametrize("names", [["last.pt"], pytest.param(None, marks=pytest.mark.slow)])
def test_a_full_disk_names_the_file_and_the_run_resumes(finished, tmp_path, names):
    """Tests limits for the size of files, each a tenth below the size of a file of the run: a report's may vary."""
    resource = pytest.importorskip("resource")
    config, whole, _ = finished
    written = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    files = written if names is None else [Path(name) for name in names]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, file in enumerate(files):
        run, limit = tmp_path / f"run-{number}", (whole / file).stat().st_size * 9 // 10

        def limited(run=run, limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                return train(config, run)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert verdict(limited, lambda scores: False, run.name, seconds=60) == "named", file
        assert not list(run.rglob("*.tmp")), file
        train(config, run)
        assert digest(run / "final.safetensors") == digest(whole / "final.safetensors"), file
    print(f"{len(files)} full disks")
