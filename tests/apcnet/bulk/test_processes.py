"""Tests `apcnet predict` as a command: one process, parts of a job, and processes that torchrun starts."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from stand_in import draw_image, picture

import apcnet
from apcnet.bulk.processes import parse_shard
from apcnet.cli import main
from apcnet.data.files import read_mask

COUNT = 7


@pytest.fixture
def job(tmp_path, monkeypatch, threads):
    """Makes a model and images, one of them broken, in the current folder."""
    threads(1)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    apcnet.create("apcnet", "tiny", 5, width=8, channels=8).save("model.safetensors")
    (tmp_path / "photos").mkdir()
    for number in range(COUNT):
        picture(draw_image(32, 40 + number)).save(f"photos/{number}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    return tmp_path


def run(capsys, command: str) -> tuple[int, str, str]:
    status = 0
    try:
        main(shlex.split(command)[1:])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_same_command_goes_on_and_another_one_is_refused(job, capsys):
    command = "apcnet predict model.safetensors 'photos/*.png' --out seen --device cpu"
    status, out, err = run(capsys, command)
    assert status == 1 and out == f"seen: {COUNT} images\n" and "broken.png" in err and err.count("\n") == 1
    (job / "photos" / "broken.png").unlink()
    assert run(capsys, command) == (0, f"seen: {COUNT} images, {COUNT} of them finished before\n", "")
    status, out, err = run(capsys, f"{command} --flip")
    again = f"{command} --flip --overwrite"
    assert status == 2 and "holds predictions of another job, flip: False → True. Name another folder" in err
    assert err.endswith(f"To predict everything again: {again}\n")
    assert run(capsys, again) == (0, f"seen: {COUNT} images\n", "")


def test_parts_and_lists(job, capsys):
    """Tests labels and probabilities of images that go through the network together, in two parts."""
    for number in range(COUNT):
        picture(draw_image(32, 40 + number % 2)).save(f"photos/{number}.png")
    (job / "list.txt").write_text("\n".join(f"photos/{number}.png" for number in range(COUNT)))
    for part, count in ("1/2", 4), ("2/2", 3):
        command = f"apcnet predict model.safetensors @list.txt --out seen --device cpu --shard {part} --probabilities"
        command += " --batch-size 2"
        assert run(capsys, command) == (0, f"seen: {count} images\n", "")
    model = apcnet.load("model.safetensors")
    for number in range(COUNT):
        seen = apcnet.predict(model, f"photos/{number}.png")
        shares = np.load(f"seen/photos/{number}_probabilities.npy").astype(np.float32)
        labels = read_mask(f"seen/photos/{number}.png")
        own = np.take_along_axis(shares, seen.labels[None].long().numpy(), 0)[0]
        equal, ties = (labels == seen.labels).numpy(), np.abs(shares.max(0) - own) < 1e-3
        assert (equal | ties).all() and equal.mean() > 0.999 and len(np.unique(labels)) > 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/", "-1/2"])
def test_wrong_parts(text):
    with pytest.raises(ValueError, match=f"shard: expected I/N with I from 1 to N, such as 1/4, got {text}"):
        parse_shard(text)


@pytest.mark.slow
def test_torchrun(job):
    """Tests that processes split a part, wait for each other in spite of a broken image, and report together."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "apcnet"]
    predict = ["predict", "model.safetensors", "photos", "--out", "seen", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for before in ("", f", {COUNT} of them finished before"):
        run = subprocess.run([*torchrun, *predict], env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 1 and run.stdout == f"seen: {COUNT} images{before}\n", run.stderr
        line, end = "photos/broken.png: expected an image", "cannot predict everything, see the lines above: "
        assert run.stderr.count(f"apcnet: {line}") == 1
        assert run.stderr.count(f"{end}{line}") == 1 and "To enable traceback" not in run.stderr  # torchrun's report
    texts = [(job / "seen" / f"manifest-{part}-of-2.jsonl").read_text() for part in (1, 2)]
    lines = [[json.loads(line) for line in text.splitlines()[1:]] for text in texts]
    names = [sorted(line["files"][0] for line in part) for part in lines]
    assert names == [["0.png", "2.png", "4.png", "6.png"], ["1.png", "3.png", "5.png"]]
    (job / "photos" / "broken.png").unlink()
    run = subprocess.run([*torchrun, *predict], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout == f"seen: {COUNT} images, {COUNT} of them finished before\n", run.stderr
