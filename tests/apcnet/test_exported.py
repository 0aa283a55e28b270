"""Tests exported files as models: labels equal the model's in every protocol, and what a file cannot do is an error."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import TRACED, pixels_of, small
from ties import assert_same_but_ties

import apcnet
import apcnet.draw
from apcnet import exported as reading
from apcnet import inference
from apcnet.bulk import predict_files
from apcnet.export import export
from apcnet.inference.protocol import WHOLE, Protocol
from apcnet.training.folder import BEST

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [TRACED, (65, 97), (41, 57), (131, 72)]
PROTOCOLS = {
    "whole": WHOLE,
    "two resizes": Protocol(test_scale=(120, 90)),
    "one resize": Protocol(test_scale=(120, 90), single_resize=True),
    "windows": Protocol(window=(48, 56), stride=(32, 40)),
    "scales and flips": Protocol(ratios=(0.75, 1.25), flip=True),
}
NEEDED = {".pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime"), ".xml": ("onnx", "onnxscript", "openvino")}


class Labelled(list):
    """Holds pairs of an image and its mask as a data set."""

    classes = tuple("abcdefg")


@pytest.fixture(scope="module")
def model():
    model = small("fcn")
    model.classes = tuple("abcdefg")
    model.palette = tuple((10 * i, 20 * i, 30 * i) for i in range(7))
    model.mean, model.std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    return model


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Returns a function that exports the model, once for the same options."""
    folder, files = tmp_path_factory.mktemp("written"), {}

    def write(suffix, output="logits", normalise=False, **options):
        for name in NEEDED[suffix]:
            pytest.importorskip(name)
        key = (suffix, output, normalise, *options.items())
        if key not in files:
            files[key] = folder / f"{len(files)}{suffix}"
            export(model, files[key], output=output, normalise=normalise, **{"size": TRACED, **options})
        return files[key]

    return write


def compare(model, loaded, protocol, size):
    """Checks the labels of an image of this size, its classes and its colours."""
    image = pixels_of(1, *size)[0]
    actual, expected = apcnet.predict(loaded, image, protocol), apcnet.predict(model, image, protocol)
    assert (actual.classes, actual.palette) == (model.classes, model.palette)
    sizes = [(round(size[0] * ratio), round(size[1] * ratio)) for ratio in protocol.ratios]
    if protocol.test_scale:
        sizes = [apcnet.data.augment.keep_ratio_size(size, protocol.test_scale)]
    views = [apcnet.data.augment.view(image, each, model.mean, model.std)[None] for each in sizes]
    scores = inference.probabilities(model, views, protocol, size=size)[0].log()
    assert_same_but_ties(actual.labels, expected.labels, scores)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_onnx_gives_the_labels_of_the_model(model, written, protocol):
    loaded = apcnet.load(written(".onnx"))
    for size in SIZES:
        compare(model, loaded, PROTOCOLS[protocol], size)


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True], ids=["images", "pixels"])
@pytest.mark.parametrize("output", ["logits", "upsampled", "labels"])
@pytest.mark.parametrize("suffix", NEEDED)
def test_every_format_and_output(model, written, suffix, output, normalise):
    loaded = apcnet.load(written(suffix, output, normalise))
    for name, protocol in PROTOCOLS.items():
        refused = (output == "labels" and protocol != WHOLE) or (output == "upsampled" and name == "one resize")
        for size in SIZES:
            if not refused:
                compare(model, loaded, protocol, size)
                continue
            for most in ({}, {"max_pixels": 2000}):
                with pytest.raises(ValueError, match=rf"model: expected logits .* apcnet export \S+ \S+\{suffix}$"):
                    apcnet.predict(loaded, pixels_of(1, *size)[0], protocol, **most)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apcnet", "pspnet", "encnet", "semantic_fpn", "upernet"])
def test_every_model(tmp_path, name):
    model = small(name)
    for suffix, packages in NEEDED.items():
        for package in packages:
            pytest.importorskip(package)
        export(model, tmp_path / f"model{suffix}", size=TRACED)
        loaded = apcnet.load(tmp_path / f"model{suffix}")
        for size in SIZES:
            image = pixels_of(1, *size)[0]
            with torch.no_grad():
                logits = inference.whole_logits(model, apcnet.data.augment.normalise(image)[None])[0]
            assert_same_but_ties(apcnet.predict(loaded, image).labels, apcnet.predict(model, image).labels, logits)


def test_a_file_of_one_size_and_of_labels(model, written, tmp_path):
    """Tests an ExportedProgram: batches pass one by one, tiles and other sizes are errors, evaluation counts labels."""
    path = written(".pt2", "labels", True, dynamic=False)
    loaded, pixels = apcnet.load(path), pixels_of(3, *TRACED)
    images = torch.stack([apcnet.data.augment.normalise(image, model.mean, model.std) for image in pixels])
    found, expected = inference.labels(loaded, images), inference.labels(model, images)
    for actual, other, scores in zip(found, expected, inference.whole_logits(model, images).detach(), strict=True):
        assert_same_but_ties(actual, other, scores)
    target = torch.randint(7, (3, *TRACED), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target[:, :9] = 255
    difference = inference.confusion(loaded, images, target) - inference.confusion(model, images, target)
    assert difference.abs().sum() <= 2 * int((found != expected).sum()) and len(target.unique()) == 8
    message = (
        r"images: expected a height and width of 64 and 80, .* got 41 and 57; export a file for every size: apcnet "
    )
    with pytest.raises(ValueError, match=message + rf"export MODEL.safetensors {path} --dynamic"):
        apcnet.predict(loaded, pixels_of(1, 41, 57)[0])
    for options in ({"max_pixels": 999}, {"confidence": True}):
        with pytest.raises(ValueError, match=r"model: expected logits for tiles, .* confidence and loss"):
            apcnet.predict(loaded, pixels[0], **options)
    apcnet.draw.save(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), tmp_path / "0.png")
    for protocol in (apcnet.inference.Protocol(flip=True), apcnet.inference.Protocol(window=(64, 64), stride=(32, 32))):
        with pytest.raises(
            ValueError, match=r"model: expected logits for tiles, .* confidence and loss"
        ):  # once, at first
            predict_files(loaded, tmp_path / "0.png", tmp_path / "out", protocol)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"model: expected logits for tiles, .* confidence and loss"):
        inference.assess(loaded, images, target, loss=True)
    with pytest.raises(ValueError, match=r"precision: expected float32 for the exported file .*\.pt2, got another"):
        apcnet.predict(loaded, pixels[0], precision="bfloat16")
    with pytest.raises(ValueError, match="images: expected normalised levels of 0 to 255, because"):
        inference.labels(loaded, torch.randn(1, 3, *TRACED))
    with pytest.raises(ValueError, match="model: expected one that can be trained, got the exported file"):
        loaded.train()
    with pytest.raises(ValueError, match=r"model: expected the model that .*\.pt2 was exported from, got that file"):
        export(loaded, path)
    with pytest.raises(ValueError, match=r"num_classes: expected 7, those of the exported .*, got 8"):
        apcnet.load(path, num_classes=8)


def test_metadata_that_are_missing_or_wrong(written, tmp_path):
    onnx = pytest.importorskip("onnx")
    file = onnx.load(written(".onnx"))
    about = json.loads(file.metadata_props[0].value)
    assert [entry.key for entry in file.metadata_props] == ["apcnet"]
    path = tmp_path / "model.onnx"
    cases = [
        (None, r'expected metadata under "apcnet" .* apcnet export MODEL.safetensors \S+model.onnx'),
        ("{", r'expected JSON under "apcnet"'),
        ([], "expected output, normalise, align_corners, num_classes"),
        ({key: value for key, value in about.items() if key != "align_corners"}, "expected align_corners under"),
        (about | {"output": "scores", "num_classes": 0}, "expected output, num_classes under"),
        (about | {"mean": [1.0]}, "mean: expected 3 numbers"),
        (about | {"classes": ["a"]}, "classes: expected 7 names"),
        (about | {"palette": [[0, 0, 300]] * 7}, "palette: expected 7 RGB colours"),
    ]
    for content, message in cases:
        del file.metadata_props[:]
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            onnx.helper.set_model_props(file, {"apcnet": text})
        onnx.save(file, path)
        with pytest.raises(ValueError, match=rf"model\.onnx: {message}"):
            apcnet.load(path)
    onnx.helper.set_model_props(
        file, {"apcnet": json.dumps(about | {"num_classes": 6, "classes": None, "palette": None})}
    )
    onnx.save(file, path)
    with pytest.raises(
        ValueError, match=r"model\.onnx: expected it to return \('B', 6, 'h', 'w'\), got \(1, 7, 9, 10\)"
    ):
        apcnet.predict(path, pixels_of(1, 65, 80)[0])


@pytest.mark.parametrize("suffix", NEEDED)
def test_damaged_files_and_missing_packages(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(FileNotFoundError, match=r"path: expected a file of apcnet export, got .* no such file"):
        apcnet.load(path)
    path.write_bytes(b"nothing of the kind")
    package, extra = reading.PACKAGES[suffix]
    if find_spec(package) is not None:
        with pytest.raises(ValueError, match=rf"model\{suffix}: {package} cannot read it: "):
            apcnet.load(path)
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"expected the package {package}: pip install 'apc_kernels\[{extra}\]'"
    ):
        apcnet.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", NEEDED)
def test_windows_of_the_only_size_of_a_file(model, written, suffix):
    loaded = apcnet.load(written(suffix, normalise=True, dynamic=False))
    assert loaded.size == TRACED
    with pytest.raises(ValueError, match=r"got 90 and 131; slide a window .* --window 64 80 --stride 43 54, or export"):
        apcnet.predict(loaded, pixels_of(1, 90, 131)[0])
    compare(model, loaded, Protocol(window=TRACED, stride=(43, 54)), (90, 131))


@pytest.mark.slow
def test_an_ir_that_ovc_made_keeps_what_the_file_says(model, written, tmp_path):
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "model.xml"
    openvino.save_model(openvino.convert_model(written(".onnx")), path, compress_to_fp16=False)
    compare(model, apcnet.load(path), WHOLE, (65, 97))


@pytest.fixture(scope="module")
def onnx_file(written):
    """Returns the model in ONNX; the exporter warns, which the fixture `run` makes an error."""
    return written(".onnx")


def test_predict_and_evaluate_take_files(model, onnx_file, tmp_path, run):
    model.save(tmp_path / "model.safetensors")
    for i, size in enumerate(SIZES[:2]):
        apcnet.draw.save(Image.fromarray(pixels_of(1, *size)[0].permute(1, 2, 0).numpy()), tmp_path / f"{i}.png")
    for name, file in (("one", onnx_file), ("other", tmp_path / "model.safetensors")):
        status, _, errors = run("predict", file, tmp_path / "0.png", tmp_path / "1.png", "--out", tmp_path / name)
        assert (status, errors) == (0, "")
    for i in range(2):
        one, other = (np.array(Image.open(tmp_path / name / f"{i}.png")) for name in ("one", "other"))
        assert (one != other).mean() <= 0.01 and len(np.unique(other)) > 1
    target = torch.randint(7, (2, *TRACED), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dataset = Labelled(zip(pixels_of(2, *TRACED), target, strict=True))
    found, expected = (apcnet.evaluate(each, dataset).matrix for each in (apcnet.load(onnx_file), model))
    assert found.sum() == target.numel() and (found - expected).abs().sum() <= 0.01 * target.numel()


def test_export_takes_the_folder_of_a_run(model, tmp_path, run, monkeypatch):
    exports = []
    monkeypatch.setattr("apcnet.export.export", lambda model, out, **options: exports.append((model, out)) or {})
    model.save(tmp_path / BEST)
    assert run("export", tmp_path, tmp_path / "model.pt2")[0] == 0
    ((given, out),) = exports
    assert torch.equal(given.head.classifier.conv.weight, model.head.classifier.conv.weight)
    assert out == tmp_path / "model.pt2"
    status, _, errors = run("export", tmp_path / "nowhere", tmp_path / "model.pt2")
    assert status == 2 and "there is no such file" in errors
