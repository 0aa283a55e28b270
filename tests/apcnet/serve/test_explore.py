"""Tests what the page of `apcnet explore` is told: the numbers of public functions, and nothing else."""

import json
import re
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
from explored import explored_model
from serving import SIZES, ask, encoded, photo, post, running

import apcnet
import apcnet.export
from apcnet.commands import serving
from apcnet.config import Protocol
from apcnet.data.augment import view
from apcnet.serve import Limits, Served, create_app, explore, explore_page
from apcnet.zoo import create

HEADS = {"apcnet": "affinities", "pspnet": "similarities", "upernet": "similarities", "encnet": "assignments"}


@pytest.fixture(scope="module")
def models():
    return {"first": Served(explored_model()), "second": Served(explored_model("encnet", 7, seed=1))}


@pytest.fixture(scope="module")
def port(models):
    app = create_app(models, Limits(max_bytes=300_000, max_pixels=1 << 20, timeout=20.0), pages=explore_page.pages())
    with running(app) as port:
        yield port


def picture(size: tuple[int, int] = SIZES[2], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.array(photo(size, seed))).permute(2, 0, 1).contiguous()


def unpacked(content: bytes) -> dict:
    """Reads a record as the page does."""
    (length,) = struct.unpack_from("<Q", content)

    def read(value: dict) -> object:
        if "dtype" not in value:
            return value
        count = int(np.prod(value["shape"]))
        flat = np.frombuffer(content, value["dtype"], count, 8 + length + value["start"])
        return torch.from_numpy(flat.reshape(value["shape"]).copy())

    return json.loads(content[8 : 8 + length], object_hook=read)


@pytest.mark.parametrize("side", [0, 40, 96])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_are_those_of_predict(models, size, side):
    image = picture(size)
    record = explore.see(list(models.values()), image, side)
    assert (record["height"], record["width"]) == size and max(record["input"]) == (side or max(size))
    for served, found in zip(models.values(), record["models"], strict=True):
        protocol = Protocol(test_scale=(side, side)) if side else Protocol()
        seen = apcnet.predict(served.prepared, image, protocol, confidence=True)
        assert torch.equal(found["labels"], seen.labels)
        assert torch.equal(found["confidence"], (seen.confidence * 255).round().to(torch.uint8))
        assert found["seconds"] > 0


def test_a_large_picture_is_seen_smaller():
    image = torch.zeros(3, 20, 3000, dtype=torch.uint8)
    (record,) = [explore.see([Served(explored_model())], image)]
    assert record["input"] == (7, 1024) and record["models"][0]["labels"].shape == (20, 3000)


@pytest.mark.parametrize(
    "size, longest", [((96, 96), 512), ((1024, 2048), 2097), ((400, 300), 1600), ((5, 9000), 36000)]
)
def test_the_largest_input_is_seen_whole(size, longest):
    assert explore.largest_side(torch.zeros(3, *size, dtype=torch.uint8)) == longest


@pytest.mark.parametrize("name, kind", HEADS.items())
@pytest.mark.parametrize("side", [0, 40])
def test_context_is_that_of_the_public_function(name, kind, side):
    served, image = Served(explored_model(name)), picture()
    (record,) = explore.look_inside([served], image, side)["models"]
    input_size = explore.see([served], image, side)["input"]
    images = view(image, input_size, served.model.mean, served.model.std)[None]
    maps = served.prepared.context_maps(images)
    assert record["kind"] == kind and record["size"] == maps.size
    rows, columns = maps.places(image.shape[1:])
    assert torch.equal(record["rows"], rows.int()) and torch.equal(record["columns"], columns.int())
    if kind == "assignments":
        assert torch.equal(record["codewords"], maps.assignments[0]) and record["scales"] == []
        assert maps.assignments.std(dim=(2, 3)).min() > 1e-4  # else any two positions could be exchanged
        return
    for scale, part, expected in zip(maps.scales, record["scales"], getattr(maps, kind), strict=True):
        assert part["scale"] == scale and part["boxes"] == maps.boxes(scale)
        assert torch.equal(part["maps"], expected[0]) and expected.std(dim=(2, 3)).min() > 1e-3


def test_a_head_without_context_has_none():
    assert explore.look_inside([Served(explored_model("fcn"))], picture()) == {"models": [None]}


def test_models_differ_where_the_names_of_their_classes_do(models):
    """Tests classes in another order, and one that only the second model knows."""
    first = Served(explored_model())
    second = Served(explored_model())
    second.classes = ("thing 1", "thing 0", "thing 2", "another", "thing 4")
    record = explore.see([first, second], picture())
    (labels, _), differs = (found["labels"] for found in record["models"]), record["differs"]
    expected = torch.isin(labels.long(), torch.tensor([0, 1, 3]))
    assert 0 < expected.float().mean() < 1
    assert torch.equal(differs["mask"].bool(), expected)
    assert differs["share"] == pytest.approx(expected.double().mean().item())
    assert explore.see([first], picture())["differs"] is None


@pytest.mark.slow
def test_a_model_beside_its_exported_file(tmp_path):
    """Tests that the two agree, at another size too, and that a file, which has no head, is described without one."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx: onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the extra onnx: onnxscript")
    model = explored_model()
    apcnet.export.export(model, tmp_path / "street.onnx", size=(64, 64))
    both = [Served(model), Served(apcnet.load(tmp_path / "street.onnx"))]
    for side in (0, 96):
        assert explore.see(both, picture(), side)["differs"]["share"] < 0.001
        own, none = explore.look_inside(both, picture(), side)["models"]
        assert own["kind"] == "affinities" and none is None
    assert explore.about("street", both[1])["text"] == "Exported"


def test_records_survive_packing():
    arrays = [torch.arange(5, dtype=torch.uint8), torch.rand(2, 3), torch.tensor([[-1]], dtype=torch.int32)]
    record = {"name": "é", "size": [1, 2], "none": None, "parts": [{"values": array} for array in arrays]}
    content = explore.pack(record)
    found = unpacked(content)
    assert found["name"] == "é" and found["size"] == [1, 2] and found["none"] is None and len(content) % 8 == 0
    for part, array in zip(found["parts"], arrays, strict=True):
        assert part["values"].dtype == array.dtype and torch.equal(part["values"], array)
    with pytest.raises(TypeError, match="record: expected tensors"):
        explore.pack({"what": {1, 2}})


def test_about_a_model():
    model = create("apcnet", "tiny", 3, width=8, channels=8).eval()
    model.classes, model.palette = ("background", "cat", "dog"), ((0, 0, 0), (200, 0, 0), (0, 200, 0))
    about = explore.about("best", Served(model))
    assert about["text"].startswith("apcnet · tiny · 0.0")
    assert about["clear"] == [0] and about["classes"] == ("background", "cat", "dog")


def test_one_or_two_models():
    with pytest.raises(ValueError, match=r"models: expected at most two, got 3; .*: apcnet explore a b$"):
        serving.explore((Path("a"), Path("b"), Path("c")))
    with pytest.raises(ValueError, match="models: expected one or more of different names, got x-a, x-a"):
        serving.explore((Path("x/a.safetensors"), Path("x/a.safetensors")))


# Over HTTP


def test_answers_are_the_records(port, models):
    image = encoded(photo())
    for path, compute in (("view", explore.see), ("context", explore.look_inside)):
        found = unpacked(post(port, f"/explore/{path}?side=48", image).body)
        expected = unpacked(explore.pack(compute(list(models.values()), picture(SIZES[0]), 48)))
        for part in found["models"] + expected["models"]:
            part.pop("seconds", None)
        assert explore.pack(found) == explore.pack(expected)
    shown = ask(port, "GET", "/explore/models").json
    assert [model["name"] for model in shown["models"]] == list(models) and shown["samples"] == len(explore.SAMPLES)
    for index in range(shown["samples"]):
        assert ask(port, "GET", f"/explore/samples/{index}").body.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "path, status, error",
    [
        ("view?side=x", 422, "side: expected a whole number from 0 to 65536, got x"),
        ("view?side=-1", 422, "side: expected a whole number"),
        ("context?side=99999999999999999999999", 422, "side: expected a whole number"),
        ("view?size=64", 422, "query: expected parameters of side, got size"),
        ("samples/8", 405, "method: expected"),
    ],
)
def test_wrong_requests(port, path, status, error):
    answer = post(port, f"/explore/{path}", encoded(photo()))
    assert answer.status == status and answer.json["error"].startswith(error)


def test_what_is_no_image_or_no_file(port):
    assert post(port, "/explore/view", b"hello").json["status"] == 422
    assert ask(port, "GET", "/explore/samples/8").status == 404
    for name in ("../explore.html", "none.js", "explore.html"):
        assert ask(port, "GET", f"/web/{name}").status == 404


def test_the_page_needs_nothing_else(port):
    """Tests that files are served with their type and name no other host, and that a browser would refuse one."""
    page = ask(port, "GET", "/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    text, named = page.body.decode(), set()
    for name in explore_page.FILES:
        answer = ask(port, "GET", f"/web/{name}")
        assert answer.headers["Content-Type"].startswith("text/css" if name.endswith("css") else "text/javascript")
        text += answer.body.decode()
    named |= set(re.findall(r'(?:href|src)="web/([\w.]+)"', text)) | set(re.findall(r'from "\./([\w.]+)"', text))
    assert named == set(explore_page.FILES)
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w+/|@import|url\(", text)


@pytest.mark.slow
def test_the_command(tmp_path):
    """Tests that it names its models and address, serves the page, and ends at Ctrl-C."""
    explored_model().save(tmp_path / "street.safetensors")
    process = small_runs.start("explore", tmp_path / "street.safetensors", "--port", 0)
    try:
        found = re.fullmatch(r"street: http://127\.0\.0\.1:(\d+), Ctrl-C ends it", process.stdout.readline().strip())
        assert found, process.stderr.read()
        assert "apcnet explore" in ask(int(found[1]), "GET", "/").body.decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
