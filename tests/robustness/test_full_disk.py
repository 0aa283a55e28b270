"""Tests every writer of the package on a full disk: one error names the file, and the file before it is intact.

A battery, see tests/support/battery.py: PyTorch's own writer ends the process where a write fails.
"""

import functools
import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from battery import judged
from full_disk import judge_writer, limited
from PIL import Image

import apcnet
from apcnet import draw, hub
from apcnet.bulk import predict_files
from apcnet.commands.data import check
from apcnet.confusion import ConfusionMatrix
from apcnet.data import prepare
from apcnet.data.synthetic import Synthetic
from apcnet.export import export
from apcnet.files import write_json
from apcnet.inference import submission
from apcnet.inference.prediction import predict
from apcnet.interop import mmseg
from apcnet.interop.convert import convert

NOISE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)


@functools.cache
def model():
    torch.manual_seed(0)
    return apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8).eval()


def write_conversion(path: Path) -> None:
    source = path.parent / "source.pth"
    if not source.exists():
        torch.save(mmseg.state_dict(model()), source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(source, path, align_corners=False)


def write_prediction(path: Path) -> None:
    source = path.parent / "source" / "predicted.png"
    if not source.exists():
        source.parent.mkdir()
        Image.fromarray(NOISE).save(source)
    os.utime(source, ns=(0, time.time_ns()))  # a file that has changed is predicted again
    predict_files(model(), source, path.parent, overlay="png" if "overlay" in path.name else None)


def write_check(path: Path) -> None:
    root = path.parent / "data"
    if not root.exists():
        for kind in ("images", "masks"):
            (root / kind / "train").mkdir(parents=True)
            Image.fromarray(NOISE[..., 0] % 3).save(root / kind / "train" / "a.png")
        (root / "classes.txt").write_text("a\nb\nc\n")
    with io.StringIO() as out:
        before, sys.stdout = sys.stdout, out
        try:
            check("folder", root, splits=("train",), json=path, workers=0)
        except SystemExit:
            pass
        finally:
            sys.stdout = before


def write_download(path: Path) -> None:
    before = hub.urlopen
    hub.urlopen = lambda *_, **__: Response(NOISE.tobytes())
    try:
        hub.download(f"https://localhost/{path.name}", path.parent)
    finally:
        hub.urlopen = before


class Response(io.BytesIO):
    """Imitates an answer to a request."""

    headers = MappingProxyType({"Content-Length": str(NOISE.size)})


def write_submission(path: Path) -> None:
    labels = torch.from_numpy(NOISE[..., 0] % 3)
    submission.writer("synthetic", Synthetic("val", size=(64, 80)), path.parent)(path.stem, labels)


WRITERS = {
    "a.json": lambda path: write_json(path, NOISE.tolist()),
    "a.png": lambda path: draw.save(Image.fromarray(NOISE), path),
    "a.jpg": lambda path: draw.save(Image.fromarray(NOISE), path),
    "labels.png": lambda path: predict(model(), NOISE).save(path),
    "a.npy": lambda path: ConfusionMatrix(30).save(path),
    "a.safetensors": lambda path: model().save(path),
    "converted.safetensors": write_conversion,
    "predicted.png": write_prediction,
    "predicted_overlay.png": write_prediction,
    "checked.json": write_check,
    "downloaded.bin": write_download,
    "submitted.png": write_submission,
    "mask.png": lambda path: prepare._write(path, lambda: NOISE[..., 0]),
    "list.txt": lambda path: prepare._write(path, lambda: ["name"] * 9000),
    "a.pt2": lambda path: export(model(), path, size=(64, 64)),
}
if find_spec("onnx") and find_spec("onnxscript"):
    WRITERS["a.onnx"] = lambda path: export(model(), path, size=(64, 64))
SLOW = ("a.pt2", "a.onnx")


def writers(count: int, seed: int) -> Iterator[tuple[str, Callable[[Path], str]]]:
    """Lets each writer fail at its first byte, at its last and between."""
    cases = [
        (file, share) for share in (0.5, 0, 0.999, 0.1, 0.9) for file in WRITERS if share == 0.5 or file not in SLOW
    ]
    cases.remove(("predicted_overlay.png", 0))  # the labels fail before it
    cases.sort(key=lambda case: case[0] in SLOW)  # a short sample is of the others
    for file, share in cases[:count]:
        yield f"{file} at {share}", functools.partial(judge_writer, WRITERS[file], file, share)


KINDS = {"full disks": writers}


@pytest.mark.parametrize("count", [len(WRITERS), pytest.param(1000, marks=pytest.mark.slow)])
def test_each_writer_names_the_full_disk(count):
    (verdicts,) = judged(__file__, count).values()
    print(dict(verdicts))
    assert verdicts == {"named": len(list(writers(count, 0)))}


def test_the_limit_is_one(tmp_path):
    with limited(10), pytest.raises(OSError, match="File too large"):
        (tmp_path / "a").write_bytes(bytes(11))
    (tmp_path / "a").write_bytes(bytes(11))


def test_output_to_a_full_device_is_one_line():
    with Path("/dev/full").open("w") as full:
        run = [sys.executable, "-m", "apcnet", "presets"]
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "apcnet: [Errno 28] No space left on device\n")
