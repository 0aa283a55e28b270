"""Tests jobs whose processes are killed at any moment: nothing is lost, written twice or seen before it is whole."""

import json
import random
import time

import pytest
import torch
from predicting import Watcher, started
from stand_in import Network, draw_image, picture

from apcnet.bulk import predict_files
from apcnet.data.files import read_mask
from apcnet.inference.prediction import predict


def make_photos(folder, count):
    folder.mkdir()
    for number in range(count):
        picture(draw_image(24 + number % 7, 32)).save(folder / f"{number:03}.png")


def lines(out) -> list[dict]:
    text = "".join(path.read_text().partition("\n")[2] for path in out.glob("manifest*.jsonl"))
    return [json.loads(line) for line in text.splitlines()]


def count_lines(out) -> int:
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in out.glob("manifest*.jsonl"))


@pytest.mark.parametrize(("images", "kills"), [(40, 3), pytest.param(500, 10, marks=pytest.mark.slow)])
def test_a_job_that_is_killed_goes_on(tmp_path, images, kills):
    photos, out, chance = tmp_path / "photos", tmp_path / "out", random.Random(images)
    make_photos(photos, images)
    in_between = 0
    with Watcher(out) as watcher:
        for kill in range(kills):
            process = started(photos, out)
            until = 0 if kill == 0 else chance.randrange(images * (kill + 1) // (kills + 1))
            while process.is_alive() and count_lines(out) < until:
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.02)
            process.kill()
            process.join()
            in_between += 0 < count_lines(out) < images
        process = started(photos, out)
        process.join()
        assert process.exitcode == 0
    assert in_between >= kills // 2, "the job was over before it was killed"
    assert watcher.problems == [] and watcher.looks > kills
    assert set(watcher.files) == {f"{number:03}{end}.png" for number in range(images) for end in ("", "_overlay")}
    assert sorted(line["files"][0] for line in lines(out)) == sorted(f"{number:03}.png" for number in range(images))
    assert not list(out.glob(".*")), "a hidden file is left"
    for number in range(0, images, 7):
        seen = predict(Network(), photos / f"{number:03}.png")
        assert torch.equal(read_mask(out / f"{number:03}.png"), seen.labels)
    assert predict_files(Network(), photos, out, overlay="png")[:3] == (images, [], images)


def test_shards_in_processes_of_their_own(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    make_photos(photos, 21)
    with Watcher(out) as watcher:
        processes = [started(photos, out, (index, 2)) for index in (1, 2)]
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0] and watcher.problems == []
    assert sorted(line["files"][0] for line in lines(out)) == [f"{number:03}.png" for number in range(21)]
    parts = [(out / f"manifest-{index}-of-2.jsonl").read_text().count("\n") - 1 for index in (1, 2)]
    assert parts == [11, 10]
