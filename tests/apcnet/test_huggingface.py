"""Tests that a pushed model comes back with the same bits, and that its card tells what the run did and no more."""

import importlib
import json
import shutil
import socket
import time

import pytest
import small_runs
import torch

import apcnet
from apcnet.cli import main
from apcnet.config import Config

huggingface_hub = pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")  # huggingface_hub brings it
hub_server = pytest.importorskip("hub_server")


@pytest.fixture
def server(tmp_path, monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # files go over plain HTTP
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serving() as server:
        hub_at(monkeypatch, server.url)
        yield server


def hub_at(monkeypatch, url: str) -> None:
    """Makes a server the Hub."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains for a step, on a folder of this machine."""
    from apcnet.training import train

    root = tmp_path_factory.mktemp("runs")
    config = small_runs.small(small_runs.write_images(root / "data"), steps=1, eval_every=1, save_every=1)
    train(config, root / "first", workers=0)
    return root / "first"


def push(run, name="user/first", **options):
    model = apcnet.load(run / "final.safetensors")
    return model.push_to_hub(name, run=run, license="apache-2.0", token=hub_server.TOKEN, **options)


def test_a_pushed_model_comes_back_with_the_same_bits(server, run):
    assert push(run) == f"{server.url}/user/first"
    assert sorted(server.files("user/first")) == ["README.md", "config.json", "model.safetensors", "preview.png"]
    model, images = apcnet.load("hf:user/first"), torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), apcnet.load(run / "final.safetensors")(images))
    assert model.classes and model.palette
    before = len(server.requests)
    apcnet.load("hf:user/first")
    assert not [line for line in server.requests[before:] if line.startswith("GET")]  # the file is kept


def test_a_revision_is_that_commit(server, run):
    model = apcnet.create("fcn", "tiny", num_classes=3, channels=8, auxiliary_channels=0)
    model.push_to_hub("user/first", token=hub_server.TOKEN)
    push(run)
    assert apcnet.load(f"hf:user/first@{1:040x}").num_classes == 3
    assert apcnet.load("hf:user/first").num_classes == apcnet.load(run / "final.safetensors").num_classes


def test_the_card_tells_the_scores_and_no_path(server, run):
    push(run, private=True)
    assert server.private == {"user/first"}
    files = server.files("user/first")
    text, scores = files["README.md"].decode(), json.loads((run / "metrics.json").read_text())
    assert str(run.parent) in (run / "config.json").read_text()
    assert str(run.parent) not in text + files["config.json"].decode()
    stored = json.loads(files["config.json"])
    assert stored["data"]["root"] == "DATA" and Config.from_json(stored).steps == 1
    about = yaml.safe_load(text.split("---")[1])
    assert about["license"] == "apache-2.0" and about["library_name"] == "apcnet" and "apcnet" in about["tags"]
    result = huggingface_hub.ModelCard(text).data.eval_results
    assert [(one.metric_type, one.metric_value) for one in result] == [
        ("mean_iou", scores["miou"]),
        ("mean_accuracy", scores["macc"]),
        ("accuracy", scores["aacc"]),
    ]
    for name, iou in scores["iou"].items():
        assert f"| {name} | {'–' if iou is None else format(100 * iou, '.2f')} |" in text
    assert (
        "apcnet train folder --backbone tiny" in text
        and "--root DATA" in text
        and 'apcnet.load("hf:user/first")' in text
    )
    assert files["preview.png"] == (run / "preview" / "000001.png").read_bytes()


def test_scores_of_another_model_are_refused(server, run, tmp_path):
    model = apcnet.load(run / "final.safetensors")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"run: expected the run whose final\.safetensors this model is"):
        model.push_to_hub("user/first", run=run, token=hub_server.TOKEN)
    shutil.copytree(run, tmp_path / "open")
    (tmp_path / "open" / "final.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"final\.safetensors"):
        apcnet.load(run / "final.safetensors").push_to_hub("user/first", run=tmp_path / "open", token=hub_server.TOKEN)
    assert not server.commits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:user/other", "hf:user/other: there is no such repository, or it is private: type hf auth login"),
        ("hf:user/first@v2", "expected a branch, tag or commit after the @, found no v2"),
        ("hf:user/empty", r"expected model\.safetensors in it, as model\.push_to_hub writes it, found none"),
        ("hf:user/first/more", "expected hf:user/model"),
        ("hf:", "expected hf:user/model"),
        ("hf:first", "hf:first: expected hf:user/model"),
    ],
)
def test_a_wrong_name_gets_an_error_that_helps(server, run, name, message):
    server.commits |= {"user/first": [{"model.safetensors": b""}], "user/empty": [{}]}
    with pytest.raises(ValueError, match=message):
        apcnet.load(name)


def test_a_wrong_token_and_a_server_that_is_not_there(server, run):
    model = apcnet.load(run / "final.safetensors")
    with pytest.raises(ValueError, match=r"the upload failed: .*hf auth login"):
        model.push_to_hub("user/first", token="hf_wrong")
    for name in ("user/first/more", "first"):
        with pytest.raises(ValueError, match=f"name: expected user/model, got {name}"):
            model.push_to_hub(name, token=hub_server.TOKEN)
    server.commits["user/first"] = [{"model.safetensors": b"not a model"}]
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        apcnet.load("hf:user/first")


def test_a_push_without_a_network_is_one_error(server, run, monkeypatch):
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"^user/first: the upload failed: .*refused"):
        push(run)


def test_without_a_network_only_earlier_downloads_are_there(server, run, monkeypatch):
    push(run)
    apcnet.load("hf:user/first")
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    apcnet.load("hf:user/first")
    message = rf"^hf:user/second: {server.url} cannot be reached \(HF_HUB_OFFLINE is set\), .* download; unset it"
    with pytest.raises(ValueError, match=message):
        apcnet.load("hf:user/second")


def test_a_hub_that_cannot_be_reached_is_told_at_once(server, run, monkeypatch, tmp_path, caplog):
    push(run)
    apcnet.load("hf:user/first")
    monkeypatch.setattr("apcnet.huggingface.TIMEOUT", 0.2)
    with socket.socket() as silent:  # takes connections, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port, reason in ((1, "refused"), (silent.getsockname()[1], "timed out")):
            hub_at(monkeypatch, url := f"http://127.0.0.1:{port}")
            message = rf"^hf:user/second: {url} cannot be reached \(.*{reason}.*\), and there is no copy .*; try again"
            start = time.monotonic()
            with pytest.raises(ValueError, match=message):
                apcnet.load("hf:user/second")
            apcnet.load("hf:user/first")
            assert time.monotonic() - start < 5 and not caplog.records


def test_the_command_pushes_a_run(server, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    main(["push", str(run), "user/second", "--license", "mit", "--private"])
    assert server.url in capsys.readouterr().out and server.private == {"user/second"}
    assert 'license: "mit"' in server.files("user/second")["README.md"].decode()
    main(
        [
            "predict",
            "hf:user/second",
            str(next(run.parent.glob("data/images/val/*"))),
            "--out",
            str(run.parent / "seen"),
        ]
    )
    assert "1 image\n" in capsys.readouterr().out
