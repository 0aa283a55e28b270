"""Tests packed data sets: what shards hold, how they are read over a bad network, and what goes wrong."""

import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import small_runs
import torch
from faulty_server import FAULTS, serving
from PIL import Image

import apcnet.data
from apcnet.data.doctor.check import check
from apcnet.data.sample import SampleError
from apcnet.data.shards import Member, checksum, store
from apcnet.data.shards.index import RECORD, block_checksums, write_index
from apcnet.data.shards.pack import UNFINISHED, pack
from apcnet.data.stream import Batches, loader
from apcnet.training.environment import names_digest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_runs.write_images(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def packed(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    assert pack("folder", out, root, samples=3) == ({"train": 7, "val": 5}, 5, 0)
    return out


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(store, "TIMEOUT", 0.6)  # less than a delay of the server


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.image, b.image) and a.image.dtype == b.image.dtype
        assert torch.equal(a.mask, b.mask) and a.name == b.name


# what shards hold


def test_shards_hold_the_same_samples(root, packed):
    for split in ("train", "val"):
        files, shards = (apcnet.data.open(*given, split) for given in (("folder", root), ("shards", packed)))
        assert_same(shards, files)
        names = shards.names
        assert names == files.names and names[2:4] == files.names[2:4] and names[-1] == files.names[-1]
        assert (shards.classes, shards.palette) == (files.classes, files.palette)
        assert names_digest(shards) == names_digest(files)


def test_the_same_data_give_the_same_bytes(root, packed, tmp_path):
    pack("folder", tmp_path / "again", root, samples=3, workers=2)
    assert {f.name: f.read_bytes() for f in packed.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


def test_images_are_the_packed_files_and_masks_hold_indices(root, packed):
    data = apcnet.data.open("folder", root, "train")
    with tarfile.open(packed / "train-000001.tar") as tar:
        names = tar.getnames()
        assert names == [f"00000000{i}{ending}" for i in (3, 4, 5) for ending in (".png", ".mask.png", ".json")]
        assert tar.extractfile(names[3]).read() == data.pairs[4].image.read_bytes()
        with Image.open(tar.extractfile(names[4])) as mask:
            assert mask.mode == "L" and np.array_equal(mask, data[4].mask)
        assert json.load(tar.extractfile(names[5])) == {"name": data.names[4], "height": 48, "width": 56}


def test_webdataset_reads_the_shards(root, packed):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(packed / f"train-{number:06}.tar") for number in range(3)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb").to_tuple("png", "mask.png", "json"))
    expected = apcnet.data.open("folder", root, "train")
    assert len(read) == len(expected)
    for (image, mask, metadata), sample in zip(read, expected, strict=True):
        assert np.array_equal(image, sample.image.permute(1, 2, 0)) and metadata["name"] == sample.name
        assert np.array_equal(np.asarray(mask)[..., 0], sample.mask)


def test_generated_scenes_are_packed(tmp_path):
    pack("synthetic", tmp_path / "out", samples=4, splits=("test",), size=(64, 72), length=5)
    scenes = apcnet.data.open("synthetic", split="test", size=(64, 72), length=5)
    assert_same(apcnet.data.open("shards", tmp_path / "out", "test"), scenes)
    assert list(check("shards", tmp_path / "out", workers=0).splits) == ["test"]


def test_labels_are_mapped_and_levels_are_kept(tmp_path):
    root = tmp_path / "root"
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    for name in ("a", "b"):
        Image.fromarray(levels).save(root / "images" / "train" / f"{name}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[:32] = 7
        Image.fromarray(mask).save(root / "masks" / "train" / f"{name}.png")
    (root / "classes.txt").write_text("one\ntwo\n")
    given = {"labels": {0: 0, 7: 1}}
    pack("folder", tmp_path / "out", root, splits=("train",), **given)
    shards = apcnet.data.open("shards", tmp_path / "out", "train")
    assert_same(shards, apcnet.data.open("folder", root, "train", **given))
    assert shards[0].image.dtype == torch.float32 and shards[0].mask.unique().tolist() == [0, 1]
    assert shards.pairs.statistics.range == ((0.0, 65520.0),)


def test_a_pack_that_was_stopped_goes_on(root, packed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    with pytest.raises(ValueError, match=r"out: expected a new or an empty folder, got .*out with files"):
        pack("folder", out, root, samples=3)
    shutil.rmtree(out)
    program = f"""
from apcnet.data.shards import pack
import os
write, done = pack._Shards._records, []
def records(self, number, path):
    done.append(number)
    if len(done) == 3:
        os._exit(9)
    return write(self, number, path)
pack._Shards._records = records
pack.pack("folder", {str(out)!r}, {str(root)!r}, samples=3)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert (out / UNFINISHED).exists() and not (out / "shards.json").exists()
    with pytest.raises(ValueError, match=r"out: .* holds an unfinished pack of other data"):
        pack("folder", out, root, samples=4)
    assert pack("folder", out, root, samples=3) == ({"train": 7, "val": 5}, 2, 3)
    assert {f.name: f.read_bytes() for f in packed.iterdir()} == {f.name: f.read_bytes() for f in out.iterdir()}


# reading


def test_a_member_is_read_as_a_path_is(root, packed):
    member = apcnet.data.open("shards", packed, "train").pairs[5].image
    path = apcnet.data.open("folder", root, "train").pairs[5].image
    assert isinstance(member, Member) and member.read_bytes() == path.read_bytes() == member.open().read()
    assert member.stat().st_size == path.stat().st_size
    assert str(member).startswith(f"{packed}/train-000001.tar: 000000005.png at byte ")
    assert member != apcnet.data.open("shards", packed, "val").pairs[5 - 5].image
    again = pickle.loads(pickle.dumps(member))
    assert again == member and again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_network_changes_nothing(root, packed, workers):
    with serving(packed, every=4) as server:
        shards = apcnet.data.open("shards", server.address, "train")
        batches = loader(Batches(shards, as_it_is, 3, 4), range(12), workers)
        expected = Batches(apcnet.data.open("folder", root, "train"), as_it_is, 3, 4)
        for step, batch in enumerate(batches):
            assert torch.equal(batch.images, expected[step].images) and batch.names == expected[step].names
        assert set(server.seen) == set(FAULTS)


def as_it_is(sample, generator):
    return sample.image, sample.mask


def test_a_sample_is_one_range(packed):
    with serving(packed) as server:
        shards = apcnet.data.open("shards", server.address, "train")
        shards[4]  # opens the first image for its form as well
        server.requests.clear()
        shards[5]
        record = shards.pairs.index.record(5)
        assert server.requests == [("train-000001.tar", record.start, record.size)]


def test_a_cache_keeps_the_beginning_within_its_limit(root, packed, tmp_path):
    sizes = {file.name: file.stat().st_size for file in packed.iterdir()}
    limit = sizes["train.index"] + sizes["val.index"] + sizes["train-000000.tar"] + 20_000
    with serving(packed) as server:

        def read(split):
            shards = apcnet.data.open(
                "shards", server.address, split, cache=tmp_path / "cache", cache_gib=limit / 2**30
            )
            assert_same(shards, apcnet.data.open("folder", root, split))

        def kept():
            return [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]

        read("train"), read("val")
        assert 30_000 < sum(file.stat().st_size for file in kept()) <= limit
        server.requests.clear()
        read("train")
        assert {name for name, *_ in server.requests} == {"shards.json", "train-000001.tar", "train-000002.tar"}
        for file in kept():
            file.write_bytes(file.read_bytes()[:-1])
        read("train")
        assert len(kept()) > 3 and {len(file.read_bytes()) for file in kept()} != {0}
        server.requests.clear()
        read("train")
        assert "train-000000.tar" not in {name for name, *_ in server.requests}, "damaged files were not replaced"


def test_fsspec_reads_other_addresses(root, packed):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/bucket/shards", recursive=True)
    assert_same(apcnet.data.open("shards", "memory://bucket/shards", "val"), apcnet.data.open("folder", root, "val"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_s3_is_read_through_faults(root, packed, workers, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    with serving(packed.parent, every=8) as server:
        for name, value in {"ENDPOINT_URL": server.address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        shards = apcnet.data.open("shards", f"s3://{packed.name}", "train")
        assert_same(list(loader(shards, range(len(shards)), workers)), apcnet.data.open("folder", root, "train"))
        assert server.seen


# training


@pytest.mark.slow
def test_training_ends_with_the_same_bits_as_from_disk(root, packed, tmp_path):
    config = small_runs.small(root, steps=6, save_every=2)
    apcnet.train(config, tmp_path / "disk", device="cpu")
    with serving(packed, every=20) as server:
        remote = replace(config, data=replace(config.data, dataset="shards", root=server.address))
        apcnet.train(replace(remote, steps=6), tmp_path / "remote", device="cpu", workers=1)
        assert server.seen
    for file in ("final.safetensors", "best.safetensors"):
        assert small_runs.digest(tmp_path / "disk" / file) == small_runs.digest(tmp_path / "remote" / file)


@pytest.mark.slow
def test_a_killed_run_on_a_bad_network_resumes_to_the_same_bits(root, packed, tmp_path):
    config = small_runs.small(root, steps=30, save_every=2, eval_every=15)
    apcnet.train(config, tmp_path / "disk", device="cpu")
    with serving(packed, every=20) as server:
        words = [*small_runs.flags(config), "--dataset", "shards", "--device", "cpu", "--out", tmp_path / "remote"]
        words[words.index(root)] = server.address
        for workers in (1, 0):
            run = small_runs.start(*words, "--workers", workers)
            while run.poll() is None and not (tmp_path / "remote" / "last.pt").exists():
                time.sleep(0.01)
            run.kill()
            run.communicate()
        run = small_runs.start(*words, "--workers", 2, "--cache", tmp_path / "cache")
        assert run.communicate()[1] == "" and run.returncode == 0
    disk, remote = (small_runs.digest(tmp_path / run / "final.safetensors") for run in ("disk", "remote"))
    assert disk == remote


# millions


@pytest.mark.slow
def test_ten_million_samples_open_at_once(packed, tmp_path):
    """Tests an index of ten million samples, which all stand for those of one shard."""
    count, out = 10_000_000, tmp_path / "many"
    out.mkdir()
    records = np.frombuffer((packed / "train.index").read_bytes(), RECORD, 3)  # of the first shard
    names = [f"image-{number:07}".encode() for number in range(100_000)]
    parts = ((np.resize(records, len(names)), names) for _ in range(count // len(names)))
    assert write_index(out / "train.index", parts) == count
    shutil.copy(packed / "train-000000.tar", out)
    description = json.loads((packed / "shards.json").read_text())
    description["splits"] = {
        "train": description["splits"]["train"]
        | {
            "samples": count,
            "index_bytes": (out / "train.index").stat().st_size,
            "index_checksums": block_checksums(out / "train.index"),
        }
    }
    description["checksum"] = checksum(description)
    (out / "shards.json").write_text(json.dumps(description))
    program = f"""
import resource, time, apcnet.data
from apcnet.data.stream import Batches
def transform(sample, generator):
    return sample.image, sample.mask
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
memory, began = peak(), time.perf_counter()
data = apcnet.data.open("shards", {str(out)!r}, "train")
opened = time.perf_counter()
batch = Batches(data, transform, seed=1, batch_size=16)[12345]
assert len(data) == {count} and len(set(batch.names)) == 16
print(opened - began, time.perf_counter() - opened, peak() - memory)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    opening, batch, mebibytes = map(float, ran.stdout.split())
    assert opening < 2 and batch < 1 and mebibytes < 200, ran.stdout


# what goes wrong


def test_a_bad_shard_is_named(packed):
    start = apcnet.data.open("shards", packed, "train").pairs.index.record(4).parts[1].start
    with serving(packed) as server:
        server.broken["train-000001.tar"] = start + 20
        shards = apcnet.data.open("shards", server.address, "train")
        expected = (
            rf"sample 4 of 7: {server.address}/train-000001.tar: 000000004.mask.png at byte {start}: expected \d+ "
            r"bytes with the checksum [0-9a-f]{8}, got \d+ with [0-9a-f]{8}, 7 times; upload it again, or check it with"
        )
        with pytest.raises(ValueError, match=expected):
            shards[4]
        assert shards[3].name == shards.names[3]
        named = rf"sample '{shards.names[4]}' \(number 4\), position \d+ of the stream: ValueError: sample 4 of 7: http"
        with pytest.raises(SampleError, match=named):
            list(loader(Batches(shards, as_it_is, 3, 1), range(7), 1))


def test_check_reports_a_bad_shard(packed, tmp_path, run):
    bad = tmp_path / "bad"
    shutil.copytree(packed, bad)
    status, out, _ = run("check", "shards", bad, "--workers", 0)
    assert status == 0 and "train: 7 samples" in out
    content = bytearray((bad / "train-000002.tar").read_bytes())
    content[600] ^= 1
    (bad / "train-000002.tar").write_bytes(content)
    status, out, _ = run("check", "shards", bad, "--workers", 0)
    text = " ".join(out.split())
    assert status == 1 and "the shard is damaged" in text and "train-000002.tar: 000000006.png at byte 512" in text


def test_a_server_that_is_gone_is_named(packed):
    with serving(packed) as server:
        shards = apcnet.data.open("shards", server.address, "train")
        shards[0]
    with pytest.raises(ValueError, match=r"-000001.tar: 000000003.png at byte 512: URLError: .*refused.*, 7 times"):
        shards[3]


@pytest.mark.parametrize("file", ["shards.json", "train.index"])
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_damaged_descriptions_are_found(packed, tmp_path, file, place):
    bad = tmp_path / "bad"
    shutil.copytree(packed, bad)
    content = bytearray((bad / file).read_bytes())
    content[int(len(content) * place)] ^= 2
    (bad / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{bad}/{file}: "):
        apcnet.data.open("shards", bad, "train")[0]


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        (None, {}, "root: expected the folder or the address of shards, got None"),
        ("nowhere", {}, "root: expected a folder with shards.json, which `apcnet pack` writes, found none in nowhere"),
        ("packed", {"split": "test"}, "split: expected train or val, which .* holds, got 'test'"),
        ("packed", {"cache_gib": 0}, "cache_gib: expected a positive number, got 0"),
        ("odd://bucket", {}, "root: expected a folder or an address that fsspec knows, got odd://bucket"),
        ("server", {}, "root: expected a server that answers ranges, got all of val.index from http:"),
        ("server/none", {}, r"http://.*/none/shards.json: there is no such file \(404 Not Found\)"),
    ],
)
def test_wrong_arguments(packed, place, options, message):
    with serving(packed, ranges=False) as server:
        if place is not None:
            place = place.replace("packed", str(packed)).replace("server", server.address)
        with pytest.raises((ValueError, TypeError, OSError), match=message):
            apcnet.data.open("shards", place, **options)[0]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ModuleNotFoundError, match=r"root: expected a package that reads gs://, found none: .*gcsfs"):
        apcnet.data.open("shards", "gs://bucket/shards")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "shards"}, "name: expected .*, got 'shards'"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"splits": ()}, r"splits: expected different names, at least one, got \[\]"),
        ({"splits": ("train", "train")}, "splits: expected different names"),
    ],
)
def test_wrong_packs(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        pack(**{"name": "synthetic", "out": tmp_path / "out"} | given)
    assert not (tmp_path / "out").exists()


def test_an_unreadable_file_is_not_packed(root, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(root, bad)
    broken = next((bad / "images" / "val").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=broken.name):
        pack("folder", tmp_path / "out", bad, samples=3)
    assert not (tmp_path / "out" / "shards.json").exists()


def test_the_command_packs(run, root, tmp_path):
    out = tmp_path / "out"
    status, text, err = run("pack", "folder", out, "--root", root, "--samples", 4, "--workers", 0)
    assert (status, err) == (0, "") and text == (
        f"{out}: 7 train, 5 val samples; 4 shards written, 0 already there\n"
        f"apcnet train --dataset shards --root {out} trains on it\n"
    )
    assert run("pack", "synthetic", out, "--labels", 0, 1)[2] == (
        "apcnet: labels: expected with folder only, got {0: 1} with synthetic\n"
    )
