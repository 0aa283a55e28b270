"""Tests that a job that was stopped goes on where it was, and that other jobs do not mix with it."""

import json
import os
import shutil

import pytest
import torch
from full_disk import limited
from PIL import Image
from stand_in import Network, draw_image, picture, save_photos

from apcnet.bulk import manifest, predict_files
from apcnet.data.files import read_mask
from apcnet.inference import Protocol
from apcnet.inference.prediction import predict

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 5


class Killed(BaseException):
    """Imitates the end of a process: nothing after it may be needed for a job to go on."""


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "photos", COUNT)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def states(out) -> dict:
    """Returns the inode and the time of change of every file but the manifest, which a new write would change."""
    return {
        path.relative_to(out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.rglob("*")
        if path.suffix != ".jsonl" and path.is_file()
    }


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()[1:]]


def test_what_is_finished_is_skipped(photos, out):
    network, calls = Network(), []
    assert predict_files(network, photos, out)[:3] == (COUNT, [], 0)
    before, seen = states(out), len(network.seen)
    assert predict_files(network, photos, out, progress=lambda *call: calls.append(call))[:3] == (COUNT, [], COUNT)
    assert states(out) == before and len(network.seen) == seen and calls == [(COUNT, COUNT)]
    assert sorted(line["source"] for line in lines(out)) == [str(photos / f"{number}.png") for number in range(COUNT)]
    picture(draw_image(9, 9)).save(photos / "new.png")
    assert predict_files(network, photos, out)[:3] == (COUNT + 1, [], COUNT)
    assert before.items() < states(out).items()


def test_what_has_changed_is_predicted_again(photos, out):
    """Tests new content, a new time, a file that was deleted, and a source whose former state has come back."""
    predict_files(Network(), photos, out)
    first = states(out)
    shutil.copy2(photos / "0.png", out.parent / "former.png")
    picture(draw_image(22, 24)).save(photos / "0.png")
    os.utime(photos / "1.png", ns=(0, 1))
    (out / "2_overlay.jpg").unlink()
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], 2)
    second = states(out)
    assert {name[0] for name in first if first[name] != second[name]} == {"0", "1", "2"}
    assert read_mask(out / "0.png").shape == (22, 24)
    shutil.copy2(out.parent / "former.png", photos / "0.png")
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], COUNT - 1)
    assert read_mask(out / "0.png").shape == (20, 24)
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], COUNT)


def test_the_same_name_in_another_folder_is_another_image(photos, out):
    predict_files(Network(), photos, out)
    shutil.copytree(photos, photos.with_name("other"))  # with the times of change
    assert predict_files(Network(), photos.with_name("other"), out).skipped == 0


def test_images_that_failed_are_tried_again(photos, out):
    whole = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(whole[:50])
    assert predict_files(Network(), photos, out).done == COUNT - 1
    report = predict_files(Network(), photos, out)
    assert (report.done, report.skipped, len(report.failures)) == (COUNT - 1, COUNT - 1, 1)
    (photos / "3.png").write_bytes(whole)
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], COUNT - 1)


def other_weights():
    network = Network()
    with torch.no_grad():
        network.near[0, 0, 0, 0] += 1e-6
    return network


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (other_weights, {}, r"holds predictions of another job, model: \w{16} → \w{16}\. Name another folder"),
        (Network, {"protocol": Protocol(flip=True)}, "another job, flip: False → True"),
        (Network, {"overlay": None, "confidence": True}, "overlay: jpg → None; confidence: False → True"),
        (Network, {"max_pixels": 99}, "max_pixels: 2200000 → 99"),
    ],
)
def test_another_job_does_not_mix(photos, out, network, options, message):
    predict_files(Network(), photos, out)
    before = states(out)
    with pytest.raises(manifest.AnotherJobError, match=message):
        predict_files(network(), photos, out, **options)
    assert states(out) == before
    assert predict_files(network(), photos, out, overwrite=True, **options)[:3] == (COUNT, [], 0)
    assert predict_files(network(), photos, out, **options)[:3] == (COUNT, [], COUNT)
    assert states(out)["0.png"] != before["0.png"]


def test_an_exported_file_is_known_by_its_content(photos, out):
    """Tests a model that runs a file, and has no weights itself (apcnet.exported)."""
    network = Network()
    network.path = out.parent / "model.xml"
    for suffix in ("xml", "bin"):
        for other in ("xml", "bin"):
            network.path.with_suffix(f".{other}").write_text("as it was")
        predict_files(network, photos, out, overwrite=True)
        assert predict_files(network, photos, out).skipped == COUNT
        network.path.with_suffix(f".{suffix}").write_text("another one")
        with pytest.raises(manifest.AnotherJobError, match="another job, model: "):
            predict_files(network, photos, out)


def test_half_a_line_is_dropped(photos, out):
    predict_files(Network(), photos, out)
    before, text = states(out), (out / "manifest.jsonl").read_text()
    for cut in (3, len(text.splitlines()[-1]) - 1):
        (out / "manifest.jsonl").write_text(text[:-cut])
        assert predict_files(Network(), photos, out)[:3] == (COUNT, [], COUNT - 1)
    after = states(out)
    last = json.loads(text.splitlines()[-1])["files"]  # threads write, in no order
    assert sorted(name for name in before if before[name] != after[name]) == sorted(last)
    (out / "manifest.jsonl").write_text(text[:20])  # before the first line was whole
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], 0)


HEAD = '{"manifest": "apcnet predict"}\n'
LINE = {"source": "a.png", "stamp": [1, 2], "files": ["a.png"], "token": "0123abcd", "time": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        *(
            '{"a": 1}\n',
            "no JSON\n",
            "[]\n",
            "\xff\n",
            HEAD + '{"source": 1}\n',
            HEAD + "half\n" + json.dumps(LINE) + "\n",
        ),
        *(
            f"{HEAD}{json.dumps(LINE | changed)}\n"
            for changed in (
                *({"files": []}, {"files": ["../a.png"]}, {"files": ["/a.png"]}, {"files": 1}, {"token": "../../a"}),
                *({"stamp": [1e999, 0]}, {"stamp": [1]}, {"time": None}),
            )
        ),
    ],
)
def test_a_damaged_manifest_is_named(photos, out, content):
    out.mkdir()
    (out / "manifest.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.jsonl: expected the manifest of a prediction, got something else"):
        predict_files(Network(), photos, out)
    assert predict_files(Network(), photos, out, overwrite=True).done == COUNT
    assert predict_files(Network(), photos, out).skipped == COUNT


@pytest.mark.parametrize("renamed", [0, 1])
def test_killed_after_a_line(photos, out, monkeypatch, renamed):
    """Tests that files whose line is written get their names at the next start, and are not computed again."""
    reveal, names = manifest.Manifest._reveal, []

    def killed(self, line):
        if line.files[0] == "2.png":
            names.extend(line.files)
            reveal(self, line._replace(files=line.files[:renamed]))
            raise Killed
        reveal(self, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(manifest.Manifest, "_reveal", killed)
        patch.setattr(manifest.Manifest, "discard", lambda *_: None)
        predict_files(Network(), photos, out)
    hidden = {path.name.split(".", 2)[2]: path.stat().st_ino for path in out.glob(".*")}
    assert set(names[renamed:]) == set(hidden) and not (out / names[1]).exists()
    network = Network()
    report = predict_files(network, photos, out)
    assert report.done == COUNT and report.skipped >= 3 and len(network.seen) == COUNT - report.skipped
    assert {name: states(out)[name][0] for name in hidden} == hidden
    assert len(lines(out)) == COUNT and not list(out.glob(".*"))


def test_killed_before_a_line(photos, out, monkeypatch):
    """Tests that hidden files without a line are removed, and no file is visible."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(manifest.Manifest, "commit", killed)
        patch.setattr(manifest.Manifest, "discard", lambda *_: None)
        predict_files(Network(), photos, out)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {"manifest.jsonl"}
    assert list(out.glob(".*.0.png"))
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], 0)
    assert not list(out.glob(".*")) and len(lines(out)) == COUNT


def test_a_line_that_finds_no_room_leaves_no_half(photos, out):
    """Tests a disk that is full in the middle of a line."""
    predict_files(Network(), photos, out, overlay=None)
    before, size = states(out), (out / "manifest.jsonl").stat().st_size
    for number in range(3):
        picture(draw_image(9, 9 + number)).save(photos / f"new{number}.png")
    with limited(size + 30), pytest.raises(OSError, match=r"No space left on device: .*manifest\.jsonl|File too large"):
        predict_files(Network(), photos, out, overlay=None)
    assert states(out) == before and (out / "manifest.jsonl").stat().st_size == size
    assert predict_files(Network(), photos, out, overlay=None)[:3] == (COUNT + 3, [], COUNT)


def test_two_processes_do_not_write_to_one_folder(photos, out):
    held = manifest.Manifest(out, (1, 1), {}, False)
    with pytest.raises(ValueError, match=r"out: another process is predicting into .*out; wait for it, name another"):
        predict_files(Network(), photos, out)
    with pytest.raises(ValueError, match=r"another process is predicting into .*out as manifest\.jsonl; wait for it"):
        predict_files(Network(), photos, out, shard=(1, 2))
    held.close()
    assert predict_files(Network(), photos, out, overwrite=True).done == COUNT


def test_names_that_are_not_utf8(tmp_path, out):
    folder = os.fsencode(tmp_path / "photos")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xff.png"), "wb") as file:
        picture(draw_image(9, 9)).save(file, "PNG")
    for skipped in (0, 1):
        assert predict_files(Network(), tmp_path / "photos", out)[:3] == (1, [], skipped)


def test_shards(photos, out):
    """Tests that shards are disjoint and complete, and that all manifests count when the split changes."""
    whole = out.with_name("whole")
    predict_files(Network(), photos, whole)
    reports = [predict_files(Network(), photos, out, shard=(index, 3)) for index in (3, 1, 2)]
    assert [report.done for report in reports] == [1, 2, 2] and states(out).keys() == states(whole).keys()
    for name in states(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert len(list(out.glob("manifest-*-of-3.jsonl"))) == 3
    assert predict_files(Network(), photos, out)[:3] == (COUNT, [], COUNT)
    with pytest.raises(ValueError, match="shard: expected 1 of N to N of N, got 3 of 2"):
        predict_files(Network(), photos, out, shard=(3, 2))
    before = states(out)
    report = predict_files(Network(), photos, out, shard=(1, 2), overwrite=True)
    assert report[:3] == (3, [], 0) and {path.name for path in out.glob("*.jsonl")} == {"manifest-1-of-2.jsonl"}
    assert {name[0] for name in before if before[name] != states(out)[name]} == {"0", "2", "4"}


def test_labels_equal_those_of_single_images(tmp_path, out):
    """Tests several sizes, at once and in groups, with tiles, windows and several views."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(12):
        picture(draw_image(*((20, 30), (40, 28), (64, 64), (33, 21))[number % 4])).save(folder / f"{number:02}.png")
    for protocol, pixels in [
        (Protocol(), 5000),
        (Protocol(), 900),
        (Protocol(flip=True, ratios=(0.5, 1.0)), 3000),
        (Protocol(window=(16, 16), stride=(12, 12)), 5000),
        (Protocol(test_scale=(40, 40), single_resize=True), 5000),
    ]:
        for batch_size in (1, 4):
            network = Network()
            options = {"max_pixels": pixels, "batch_size": batch_size, "overlay": None, "overwrite": True}
            assert predict_files(network, folder, out, protocol, **options).done == 12
            sizes = {shape[0] for shape in network.seen}
            assert max(sizes) <= batch_size and (batch_size == 1 or protocol.window or pixels < 5000 or max(sizes) > 1)
            for path in folder.iterdir():
                seen = predict(Network(), path, protocol, max_pixels=pixels)
                with Image.open(out / path.name) as labels:
                    assert labels.size == (seen.labels.shape[1], seen.labels.shape[0])
                assert torch.equal(read_mask(out / path.name), seen.labels), (path, protocol, batch_size)
