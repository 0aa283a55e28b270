"""Tests that an exported file computes what the model computes, at every size, without this package."""

import copy
import json
import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from small_models import TRACED, pixels_of, small

import apc_kernels
from apcnet import export as exporting
from apcnet.export import export

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet"]
VARIANTS = [
    ("apcnet", {"plain": True, "scales": (1, 4), "align_corners": True}),
    ("encnet", {"lateral": True, "presence": False}),
    pytest.param("apcnet", {"guide": False, "fusion": False}, marks=pytest.mark.slow),
    pytest.param("pspnet", {"align_corners": True, "output_stride": 16}, marks=pytest.mark.slow),
    pytest.param("semantic_fpn", {"neck_norm": True}, marks=pytest.mark.slow),
]
OTHERS = [(1, 65, 97), (3, 41, 56), (2, 131, 72)]  # images, height and width that were not traced

onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


def images_of(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


def assert_close(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


ELSEWHERE = """
import sys, torch
sys.modules["apc_kernels"] = sys.modules["apcnet"] = None  # importing them is an error
torch.set_num_threads(1)
results = {}
for path in sys.argv[1:]:
    program = torch.export.load(path)
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    namespaces = {target.namespace for target in operators if isinstance(target, torch._ops.OpOverload)}
    model = program.module()
    with torch.no_grad():
        results[path] = namespaces, [model(images) for images in torch.load("images.pt")]
torch.save(results, "results.pt")
"""


@pytest.mark.parametrize(
    "names",
    [
        ["apcnet"],  # the largest head; tests below export encnet and fcn
        pytest.param(["pspnet", "encnet", "semantic_fpn", "fcn", "upernet"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_exported_program(tmp_path, names):
    """Tests files in a process without this package: its operators are PyTorch's, and the results the model's."""
    differences = {name: export(small(name), tmp_path / f"{name}.pt2", size=TRACED) for name in names}
    torch.save([images_of(*shape) for shape in OTHERS], tmp_path / "images.pt")
    command = [sys.executable, "-c", ELSEWHERE, *(f"{name}.pt2" for name in names)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "results.pt")
    for name in names:
        assert list(differences[name]) == [TRACED, (49, 101)] and max(differences[name].values()) <= 1e-5
        namespaces, results = found[f"{name}.pt2"]
        assert namespaces == {"aten"}
        model = small(name)
        for actual, shape in zip(results, OTHERS, strict=True):
            with torch.no_grad():
                assert_close(actual, model(images_of(*shape)))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_options_of_the_models(tmp_path, name, options):
    differences = export(small(name, **options), tmp_path / "model.pt2", size=TRACED)
    assert list(differences) == [TRACED, (49, 101)] and max(differences.values()) <= 1e-5


@pytest.mark.parametrize(("output", "align_corners"), [("upsampled", True), ("labels", False)])
def test_pixels_in_and_an_output_of_their_size(tmp_path, output, align_corners):
    model, path = small("fcn", align_corners=align_corners), tmp_path / "model.pt2"
    model.mean, model.std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    export(model, path, size=TRACED, output=output, normalise=True)
    exported = torch.export.load(path).module()
    for shape in OTHERS:
        pixels = pixels_of(*shape)
        with torch.no_grad():
            logits, actual = model((pixels - mean) / std), exported(pixels)
        if output == "labels":
            expected = apc_kernels.upsample_argmax(logits, shape[1:], align_corners=align_corners)
            assert actual.dtype == expected.dtype and (actual != expected).double().mean() <= 1e-3
        else:
            assert_close(actual, F.interpolate(logits, shape[1:], mode="bilinear", align_corners=align_corners))


def test_a_fixed_size_and_what_the_file_says(tmp_path):
    model, path = small("fcn"), tmp_path / "model.pt2"
    model.classes, model.palette = ("sky", "road"), ((1, 2, 3), (4, 5, 6))
    assert list(export(model, path, size=(40, 56), dynamic=False)) == [(40, 56)]
    said = {"apcnet": ""}
    exported, images = torch.export.load(path, extra_files=said).module(), images_of(1, 40, 56)
    with torch.no_grad():
        assert_close(exported(images), model(images))
        with pytest.raises((AssertionError, RuntimeError), match="40"):
            exported(images_of(1, 41, 56))
    assert json.loads(said["apcnet"]) == {
        "classes": ["sky", "road"],
        "palette": [[1, 2, 3], [4, 5, 6]],
        "mean": list(model.mean),
        "std": list(model.std),
        "num_classes": 7,
        "align_corners": False,
        "output": "logits",
        "normalise": False,
    }


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    traced = exporting._traced

    def wrong(deployed, size, dynamic):
        deployed = copy.deepcopy(deployed)
        deployed.model.head.classifier.conv.bias += 1e-2
        return traced(deployed, size, dynamic)

    monkeypatch.setattr(exporting, "_traced", wrong)
    path = tmp_path / "model.pt2"
    path.write_text("what was there before")
    with pytest.raises(RuntimeError, match=r"for images of \(64, 80\) the file's logits differ by .* nothing was"):
        export(small("fcn"), path, size=TRACED)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "what was there before"


def test_wrong_arguments(tmp_path, monkeypatch):
    model, path = small("fcn"), tmp_path / "model.pt2"
    with pytest.raises(ValueError, match=r"model: .* call model.eval\(\) first"):
        export(small("fcn").train(), path)
    with pytest.raises(ValueError, match=r"model: expected float32, got torch.bfloat16 .* call model.float\(\) first"):
        export(small("fcn").bfloat16(), path)
    with pytest.raises(TypeError, match=r"model: expected a model of apcnet\.create or apcnet\.load, got Linear"):
        export(torch.nn.Linear(2, 2).eval(), path)
    with pytest.raises(
        ValueError, match="format: expected one of exportedprogram, onnx, openvino, got 'onx'; did you mean 'onnx'"
    ):
        export(model, path, format="onx")
    with pytest.raises(
        ValueError, match=r"path: expected a name that ends in \.pt2, \.onnx, \.xml, or a format as well, got"
    ):
        export(model, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"output: .* did you mean 'labels'"):
        export(model, path, output="label")
    with pytest.raises(TypeError, match=r"size: expected two integers \(H, W\), got 64"):
        export(model, path, size=64)
    with pytest.raises(ValueError, match=r"size: expected a height and width of 33 pixels or more, got \(32, 64\)"):
        export(model, path, size=(32, 64))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export(model, tmp_path / "nowhere" / "model.pt2")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    message = r"format: onnx needs onnx and onnxscript: pip install 'apc_kernels\[onnx\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


# ONNX


@onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx(tmp_path, name, caplog, recwarn):
    import onnx
    import onnxruntime

    model, path = small(name), tmp_path / "model.onnx"
    differences = export(model, path, size=TRACED)
    assert list(differences) == [TRACED, (49, 101)] and max(differences.values()) <= 1e-5
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned and not recwarn.list  # of the converter, about its own code
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert {node.domain for node in file.graph.node} == {""}  # ONNX's own operators
    assert [size.dim_param for size in file.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "height",
        "width",
    ]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in OTHERS:
        images = images_of(*shape)
        with torch.no_grad():
            assert_close(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), model(images))


@onnx
def test_onnx_of_pixels_to_labels(tmp_path):
    import onnxruntime

    model, path = small("encnet"), tmp_path / "model.onnx"
    model.classes = ("sky", "road")
    export(model, path, size=TRACED, output="labels", normalise=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["apcnet"])["classes"] == ["sky", "road"]
    export(model, tmp_path / "model.pt2", size=TRACED, output="labels", normalise=True)
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for shape in OTHERS:
        pixels = pixels_of(*shape)
        labels = torch.from_numpy(session.run(["labels"], {"images": pixels.numpy()})[0])
        assert labels.dtype == torch.uint8 and (labels != exported(pixels)).double().mean() <= 1e-3


@onnx
def test_onnx_without_onnxruntime_says_that_nothing_was_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.warns(UserWarning, match="onnxruntime is not installed: the ONNX file was not checked"):
        assert export(small("fcn"), tmp_path / "model.onnx", size=TRACED, dynamic=False) == {}
    assert (tmp_path / "model.onnx").is_file()
