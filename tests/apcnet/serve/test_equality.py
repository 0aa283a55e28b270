"""Tests that a server gives the labels of the model it serves: with both resizes, and from exported files."""

import pytest
import torch
from serving import SIZES, encoded, labels_of, photo, post, running, small_model
from ties import assert_same_but_ties

import apcnet
from apcnet.config import Protocol
from apcnet.data.augment import view, view_sizes
from apcnet.data.files import levels_of
from apcnet.export import export
from apcnet.inference.protocol import WHOLE
from apcnet.serve import Served, create_app

PROTOCOLS = {
    "two resizes": Protocol(test_scale=(90, 70)),
    "one resize": Protocol(test_scale=(90, 70), single_resize=True),
}
NEEDED = {".pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime"), ".xml": ("onnx", "onnxscript", "openvino")}


def compare(port, path, model, protocol=WHOLE):
    """Compares the labels of images of four sizes with those that `apcnet.predict` gives without a server."""
    for size in SIZES:
        picture = photo(size)
        found = torch.from_numpy(labels_of(post(port, path, encoded(picture))).copy())
        (shape,), levels = view_sizes(size, protocol.ratios, protocol.test_scale), levels_of(photo(size))
        views = view(levels, shape, model.mean, model.std)[None]
        scores = apcnet.inference.probabilities(model, views, protocol, size=size)[0].log()
        assert_same_but_ties(found, apcnet.predict(model, picture, protocol).labels, scores)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("head", ["apcnet", "encnet"])
def test_a_server_gives_the_labels_of_predict(head, protocol):
    model, protocol = small_model(name=head), PROTOCOLS[protocol]
    with running(create_app({"one": Served(model, protocol)})) as port:
        compare(port, "/labels", model, protocol)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", NEEDED)
def test_a_server_gives_the_labels_of_the_model_that_was_exported(suffix, tmp_path):
    for name in NEEDED[suffix]:
        pytest.importorskip(name, reason=f"needs the package {name}")
    model = small_model()
    any_size, one_size = tmp_path / f"any{suffix}", tmp_path / f"one{suffix}"
    export(model, any_size, size=(64, 80))
    export(model, one_size, size=SIZES[0], dynamic=False)
    app = create_app({"any": Served(apcnet.load(any_size)), "one": Served(apcnet.load(one_size))})
    with running(app) as port:
        compare(port, "/labels", model)
        assert post(port, "/labels?model=one", encoded(photo(SIZES[0]))).status == 200
        refused = post(port, "/predict?model=one", encoded(photo(SIZES[1])))
    assert refused.status == 422 and "the only size that the model takes" in refused.json["error"]
    assert str(tmp_path) not in refused.json["error"]
