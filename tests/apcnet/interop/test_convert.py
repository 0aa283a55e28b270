"""Tests that converted checkpoints of mmsegmentation 0.x and 1.x compute what the originals do."""

import functools
import hashlib
import sys
import types
from collections import OrderedDict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import parity
import pytest
import torch
from safetensors.torch import save_file

import apcnet
from apcnet import hub
from apcnet.interop import mmseg
from apcnet.interop.convert import convert
from apcnet.models import build

SMALL = {"width": 8, "stem_width": 16}
CLASSES, PALETTE = ("road", "sky", "car"), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
MODELS = {
    "apcnet": {"channels": 16, "scales": (1, 2), "auxiliary_channels": 8},
    "pspnet": {"channels": 16, "scales": (1, 2, 3, 6), "auxiliary_channels": 8},
    "encnet": {"channels": 16, "codes": 4, "auxiliary_channels": 8},
    "semantic_fpn": {"channels": 16, "neck_channels": 8},
    "fcn": {"channels": 16, "auxiliary_channels": 8},
    "upernet": {"channels": 16, "scales": (1, 2, 3, 6), "auxiliary_channels": 8},
}


@functools.cache
def small(name):
    """Builds a small model with random weights, its images and logits."""
    torch.manual_seed(0)
    model = build(name, "resnet18", num_classes=3, **SMALL, **MODELS[name])
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        return model, images, model.eval()(images)


def config_text(stride=8, align_corners=False):
    strides, dilations = {8: ((1, 2, 1, 1), (1, 1, 2, 4)), 32: ((1, 2, 2, 2), (1, 1, 1, 1))}[stride]
    return f"""
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', strides={strides}, dilations={dilations}, contract_dilation=True),
    decode_head=dict(align_corners={align_corners}, dropout_ratio=0.1),
    auxiliary_head=dict(align_corners={align_corners}, dropout_ratio=0.1))
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
"""


class HistoryBuffer:
    def __init__(self):
        self.history = np.arange(3.0)


def save(checkpoint, path, zipped=True):
    """Saves a checkpoint as a process with mmengine does."""
    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
    try:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    finally:
        for name in names:
            del sys.modules[name]
    return path


def old(model, **text):
    """Writes a checkpoint as mmsegmentation 0.x does."""
    meta = {"mmcv_version": "1.3.0", "CLASSES": CLASSES, "PALETTE": PALETTE, "config": config_text(**text), "iter": 9}
    weights = OrderedDict((f"module.{name}", tensor) for name, tensor in mmseg.state_dict(model).items())
    return {"meta": meta, "state_dict": weights, "optimizer": {"param_groups": [{"lr": 0.01}]}}


def new(model, **text):
    """Writes a checkpoint as mmsegmentation 1.x does in training."""
    meta = {"cfg": config_text(**text), "dataset_meta": {"classes": CLASSES, "palette": PALETTE}, "seed": np.int64(1)}
    scalars = OrderedDict({"train/loss": HistoryBuffer()})
    weights = OrderedDict(mmseg.state_dict(model))
    return {"meta": meta, "state_dict": weights, "message_hub": {"log_scalars": scalars}, "param_schedulers": []}


@pytest.mark.parametrize(("checkpoint", "zipped"), [(old, False), (old, True), (new, True)], ids=["0.x", "zip", "1.x"])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_the_same(tmp_path, name, checkpoint, zipped):
    model, images, logits = small(name)
    path = save(checkpoint(model, stride=32 if name in ("semantic_fpn", "upernet") else 8), tmp_path / "a.pth", zipped)
    given = convert(path, tmp_path / "a.safetensors")
    loaded = apcnet.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), logits) and torch.equal(given.eval()(images), logits)
    assert loaded.architecture["model"] == name and loaded.architecture["backbone"] == "resnet18"
    for found in (given, loaded):
        assert found.classes == CLASSES and found.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
        assert found.mean == (1.0, 2.0, 3.0) and found.std == (4.0, 5.0, 6.0)


@pytest.mark.parametrize("name", ["apcnet", "encnet", "fcn", "pspnet", "semantic_fpn", "upernet"])
def test_mmsegmentations_own_models(tmp_path, name):
    case = parity.load(f"model_{name}")
    text = f"model = {case.about['model']!r}"
    torch.save({"meta": {"cfg": text}, "state_dict": case.under("state/")}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    with torch.no_grad():
        logits = apcnet.inference.whole_logits(apcnet.load(tmp_path / "a.safetensors"), case.tensors["input"])
    assert parity.distance(logits, case.tensors["eval.logits"]) < 1e-5


def test_align_corners_of_the_config_and_of_the_flag(tmp_path):
    model, _, _ = small("pspnet")
    out = tmp_path / "a.safetensors"
    path = save(old(model, align_corners=True), tmp_path / "a.pth")
    assert convert(path, out).align_corners is apcnet.load(out).align_corners is True
    torch.save(mmseg.state_dict(model), path)
    with pytest.raises(ValueError, match="align_corners: expected True or False, got none"):
        convert(path, out)
    assert convert(path, out, align_corners=True, output_stride=16).align_corners is True
    assert apcnet.load(out).architecture["output_stride"] == 16


def test_safetensors_and_bare_weights_are_sources_too(tmp_path):
    model, images, logits = small("apcnet")
    save_file(mmseg.state_dict(model), tmp_path / "theirs.safetensors")
    given = convert(tmp_path / "theirs.safetensors", tmp_path / "a.safetensors", align_corners=False, output_stride=8)
    with torch.no_grad():
        assert torch.equal(given.eval()(images), logits)
    assert given.classes is given.palette is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decode_head.bottleneck.bn.bias"), r"missing: decode_head\.bottleneck\.bn\.bias"),
        (lambda w: w.update({"backbone.layer1.0.se": torch.ones(2)}), r"not in the model: backbone\.layer1\.0\.se"),
        (
            lambda w: w.update({"decode_head.bottleneck.bn.bias": torch.ones(2)}),
            r"bn\.bias: expected \(16,\), got \(2,\)",
        ),
        (
            lambda w: w.update({"decode_head.aspp.weight": torch.ones(2)}),
            "decode_head holds acm_modules, aspp, bottlen",
        ),
        (
            lambda w: w.update(epoch=3),
            "expected a dict of weights, alone or under state_dict or model, got others: epoch",
        ),
        (lambda w: w.clear(), "alone or under state_dict or model, got an empty dict"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, change, message):
    weights = mmseg.state_dict(small("apcnet")[0])
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors", align_corners=False, output_stride=8)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("classes", "palette", "expected"),
    [
        (CLASSES, None, (CLASSES, None)),
        (CLASSES[:2], PALETTE[:2], (None, None)),
        (CLASSES, np.array(PALETTE), (CLASSES, None)),
        ("abc", PALETTE, (None, None)),
    ],
    ids=["no colours", "other classes", "an array", "a string"],
)
def test_names_that_are_not_of_these_classes_are_left_out(tmp_path, classes, palette, expected):
    checkpoint = new(small("apcnet")[0])
    checkpoint["meta"]["dataset_meta"] = {"classes": classes, "palette": palette}
    model = convert(save(checkpoint, tmp_path / "a.pth"), tmp_path / "a.safetensors")
    assert (model.classes, model.palette) == expected


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serves a checkpoint whose name ends in its hash; gives its path, its URL, and the paths that were asked for."""
    monkeypatch.setenv("no_proxy", "*")
    path = save(old(small("apcnet")[0]), tmp_path / "a.pth")
    path = path.rename(tmp_path / f"a-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    handler, requests = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path), []
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda self, *_: requests.append(self.path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield path, f"http://127.0.0.1:{server.server_address[1]}/{path.name}", requests
        server.shutdown()


def test_a_url_is_downloaded_and_checked(tmp_path, served):
    path, url, _ = served
    convert(url, tmp_path / "a.safetensors", folder=tmp_path / "cache")
    assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    assert apcnet.load(tmp_path / "a.safetensors").classes == CLASSES


def test_published_weights_are_loaded_by_name_and_kept(tmp_path, served, monkeypatch):
    path, url, requests = served
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(hub.TRAINED, "apcnet-r50-ade20k-160k", url)
    _, images, logits = small("apcnet")
    for name in ("apcnet-r50-ade20k-160k", "apcnet-r50-ade20k"):
        assert torch.equal(apcnet.load(name)(images), logits)
    assert len(requests) == 1
    kept = tmp_path / "hub" / "checkpoints" / path.name
    kept.unlink()
    kept.with_suffix(".safetensors").unlink()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="expected a file with SHA-256"):
        apcnet.load("apcnet-r50-ade20k")
    assert list(kept.parent.iterdir()) == []
    with pytest.raises(ValueError, match=r"apcnet-r50-ade20k-16k; did you mean apcnet-r50-ade20k-160k"):
        apcnet.load("apcnet-r50-ade20k-16k")


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        (
            "apcnet_r50-d8_512x1024_40k_city",
            "a.safetensors",
            "published weights, got .* did you mean apcnet_r50-d8_512x1024_4",
        ),
        ("none.pth", "a.safetensors", r"expected a file, a URL or the name of published weights, got none\.pth"),
        ("a.pth", "a.pth", r"out: expected NAME\.safetensors in an existing folder, got .*a\.pth"),
        ("a.pth", "none/a.safetensors", "out: expected"),
    ],
)
def test_wrong_sources_and_targets(tmp_path, source, out, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / out)
