"""Tests damaged and hostile checkpoints, model files and their descriptions: read rightly, or an error names the file.

A battery, see tests/support/battery.py. torch's legacy format and safetensors have no checksums: there a flipped byte
among the numbers is read as it stands.
"""

import copy
import functools
import io
import itertools
import json
import random
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_archives
import hostile_pickles
import pytest
import torch
from battery import judged
from judge import verdict
from safetensors.torch import save

import apcnet
from apcnet import cli
from apcnet.interop import convert, mmseg, pickles

Cases = Iterator[tuple[str, Callable[[Path], str]]]
SMALL = {"width": 8, "stem_width": 8, "channels": 8, "auxiliary_channels": 8}
KINDS_OF_MODELS = {
    "apcnet": {**SMALL, "scales": (1, 2)},
    "pspnet": SMALL,
    "encnet": SMALL | {"codes": 4},
    "semantic_fpn": {"width": 8, "stem_width": 8, "channels": 8, "neck_channels": 8},
    "fcn": SMALL,
}


@functools.cache
def model(name: str = "fcn"):
    torch.manual_seed(0)
    return apcnet.create(name, "resnet18", 3, **KINDS_OF_MODELS[name])


@functools.cache
def model_file(name: str = "fcn") -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns what a model file holds: the description and the tensors."""
    about = {key: getattr(model(name), key) for key in ("architecture", "classes", "palette", "mean", "std")}
    about |= {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}
    return about, {key: tensor.contiguous() for key, tensor in model(name).state_dict().items()}


def saved(about: dict, tensors: dict) -> bytes:
    return save(tensors, {"apcnet": json.dumps(about)})


@functools.cache
def files() -> dict[str, bytes]:
    """Returns whole files: checkpoints in both formats, safetensors, and a model file."""
    weights = OrderedDict(
        weight=torch.arange(60.0).reshape(3, 20),
        half=torch.ones(7).half(),
        steps=torch.tensor(7),
        empty=torch.ones(0, 4),
    )
    state = {"state_dict": weights, "meta": {"epoch": 1}, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}}
    found = {"safetensors": save(weights)}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        found["zip" if zipped else "legacy"] = buffer.getvalue()
    return found | {"model": saved(*model_file())}


def judge_bytes(data: bytes, kind: str, right: Callable, folder: Path) -> str:
    path = folder / ("a.safetensors" if kind == "model" else "a.pth")
    path.write_bytes(data)
    read = apcnet.load if kind == "model" else pickles.read
    return verdict(lambda: read(path), lambda result: right(path, result), str(path))


def equal(one: dict, other: dict) -> bool:
    """Compares the tensors of two dicts, bit by bit."""
    one, other = ({k: v for k, v in d.items() if isinstance(v, torch.Tensor)} for d in (one, other))
    return one.keys() == other.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        for a, b in ((one[key], other[key]) for key in one)
    )


def unchanged(path: Path, result, kind: str) -> bool:
    """Tests what is read from a file with flipped bytes. Only the zip format has checksums."""
    if kind == "zip":
        whole = torch.load(io.BytesIO(files()["zip"]), weights_only=True)
        return equal(result["state_dict"], whole["state_dict"])
    if kind == "legacy":
        theirs = torch.load(path, weights_only=True)
        return all(equal(ours, theirs[key]) for key, ours in result.items() if key in theirs and isinstance(ours, dict))
    if kind == "model":
        return [tuple(t.shape) for t in result.state_dict().values()] == [
            tuple(t.shape) for t in model().state_dict().values()
        ]
    return all(isinstance(tensor, torch.Tensor) for tensor in result.values())


def flips(count: int, seed: int) -> Cases:
    for number in range(count):
        generator = random.Random(f"{seed} {number}")
        kind = list(files())[number % len(files())]
        data = bytearray(files()[kind])
        # Half of the flips lie where numbers say what is where.
        most = len(data) if generator.random() < 0.5 or kind == "zip" else min(len(data), 1500)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(most)] = generator.randrange(256)
        right = functools.partial(unchanged, kind=kind)
        yield f"flips {number} in {kind}", functools.partial(judge_bytes, bytes(data), kind, right)


def truncations(count: int, seed: int) -> Cases:
    """Cuts each file at 200 points, ends included."""
    points = [(kind, i) for kind in files() for i in range(200)]
    random.Random(seed).shuffle(points)
    for kind, i in points[:count]:
        data = files()[kind]
        cut = data[: len(data) * i // 200]
        yield f"{kind} cut at {len(cut)}", functools.partial(judge_bytes, cut, kind, lambda *_: False)


def judge_pickle(pickle: Callable[[], bytes], zipped: bool, kept: bool, folder: Path) -> str:
    """Reads a checkpoint, whose good tensor has to be right if it is there, and must be there if `kept`."""
    path = hostile_pickles.write(folder / "a.pth", pickle(), zipped)

    def right(checkpoint: dict) -> bool:
        try:
            pickles.weights(checkpoint, path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        weight = checkpoint.get("weight")
        return weight.equal(hostile_pickles.WEIGHT) if torch.is_tensor(weight) else not kept

    return verdict(lambda: pickles.read(path), right, str(path))


def deep_keys(count: int, seed: int) -> Cases:
    """Nests tuples as keys so deep that hashing or comparing them overflows C's stack."""
    return programs(count, seed, "deepest")


def programs(count: int, seed: int, chosen: str = "") -> Cases:
    cases = [case for case in hostile_pickles.programs() if chosen in case[0]]
    random.Random(seed).shuffle(cases)
    for name, pickle, zipped in cases[:count]:
        yield (
            f"{name}, {'zip' if zipped else 'legacy'}",
            functools.partial(judge_pickle, pickle, zipped, not name.endswith("alone")),
        )


def soups(count: int, seed: int) -> Cases:
    for number in range(count):
        _, pickle, zipped = hostile_pickles.soup(random.Random(f"{seed} {number}"))
        yield (
            f"soup {number}: {pickle[:80]!r}",
            functools.partial(judge_pickle, lambda pickle=pickle: pickle, zipped, False),
        )


def archives(count: int, seed: int) -> Cases:
    right = lambda _, result: equal(result, {"weight": hostile_pickles.WEIGHT})  # noqa: E731
    for name, data in itertools.islice(hostile_archives.archives(), count):
        yield name, functools.partial(judge_bytes, data, "zip", right)


ABSURD = [
    None, True, -1, 0, 1, 2, 3, 7, 256, 10**6, 10**9, 10**18, 10**40, -(10**40), 0.5, -0.5, 1e308,
    float("nan"), float("inf"),
    "", "a", "512", "\udce9", "a\nb", "a" * 100_000, [], [1], [1, 2], [1] * 10**5,
    [10**6], [10**40], [-1], [0], ["a"], [[1]],
    [None], {}, {"a": 1}, {"type": "BN"}, "__class__", [[0, 0, 0]] * 3, [[300, 0, 0]] * 3, [1.0, 2.0, 3.0], [0, 0, 0],
]  # fmt: skip


def judge_model(data: bytes, name: str, folder: Path) -> str:
    """Loads a model file and computes logits with it, whatever its description says."""

    def right(loaded) -> bool:
        with torch.no_grad():
            logits = loaded(torch.zeros(1, 3, 64, 64))
        return equal(loaded.state_dict(), model(name).state_dict()) and logits.shape[:2] == (1, 3)

    judged = judge_bytes(data, "model", lambda _, result: right(result), folder)
    path = str(folder / "a.safetensors")
    verdict(lambda: cli._read_model(path), lambda _: True, path)  # for `train --init`
    return judged


def architectures(count: int, seed: int) -> Cases:
    """Replaces each part of a description by an absurd value, and each option of `build` that it does not have."""
    changes = []
    for name in KINDS_OF_MODELS:
        about, _ = model_file(name)
        options = {
            "align_corners",
            "dropout",
            "reduction",
            "presence_weight",
            "output_stride",
            "fusion",
            "convs",
            "index",
        }
        places = [(key,) for key in about] + [("architecture", key) for key in {*about["architecture"], *options, "?"}]
        changes += [(name, place, value) for place in sorted(places) for value in ABSURD]
    random.Random(seed).shuffle(changes)
    for name, place, value in changes[:count]:
        about, tensors = copy.deepcopy(model_file(name)[0]), model_file(name)[1]
        section = about if len(place) == 1 else about["architecture"]
        section[place[-1]] = value
        data = saved(about, tensors)
        yield f"{name}: {'.'.join(place)} = {str(value)[:30]!r}", functools.partial(judge_model, data, name)


def headers(count: int, seed: int) -> Cases:
    """Changes the header of a model file: its length, its JSON as text, and its offsets, types, shapes and names."""
    whole = files()["model"]
    length = int.from_bytes(whole[:8], "little")
    header, numbers = whole[8 : 8 + length], whole[8 + length :]
    for number in range(count):
        generator = random.Random(f"{seed} {number}")
        about = json.loads(header)
        changed, size = header, None
        names = list(about)[1:]
        entry = about[generator.choice(names)]
        what = number % 14
        match what:
            case 0:
                size = generator.choice((0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1))
            case 1:
                key = generator.choice(("dtype", "shape", "data_offsets", "?"))
                entry[key] = generator.choice([*ABSURD, [-1, 5], [0, 2**63], [5, 1], [0.5, 1]])
            case 2:
                entry["data_offsets"] = [n + generator.randint(-9, 9) for n in entry["data_offsets"]]
            case 3:
                entry["dtype"] = generator.choice(
                    ("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64")
                )
            case 4:
                entry["shape"] = [*entry["shape"], generator.choice((0, 1, 2, 2**40, -1))]
            case 5:
                del about[generator.choice(names)]
            case 6:
                about[generator.choice(("a\nb", "\udce9", "x" * 10**5, "head..", ""))] = about.pop(
                    generator.choice(names)
                )
            case 7:
                about["__metadata__"] = generator.choice(
                    [*ABSURD, {"apcnet": 1}, {"apcnet": "["}, {"apcnet": "[" * 10**5}]
                )
            case 8:
                about["__metadata__"] = {
                    "apcnet": generator.choice(("null", "[]", "1", '"a"', "{}", '{"architecture": []}'))
                }
            case 9:
                changed = b"[" * generator.choice((10, 10**5)) + header
            case 10:
                changed = b'{"a":' * generator.choice((10, 10**5)) + header
            case 11:
                changed = header[: generator.randrange(len(header))]
            case 12:
                pair = json.dumps({generator.choice(names): entry})[1:-1].encode()
                changed = b"{" + pair + b"," + header[1:]
            case 13:
                mutable = bytearray(header)
                mutable[generator.randrange(len(header))] = generator.randrange(256)
                changed = bytes(mutable)
        if what in range(1, 9):
            changed = json.dumps(about).encode()
        data = struct.pack("<Q", len(changed) if size is None else size) + changed + numbers
        right = lambda _, result: equal(  # noqa: E731
            {k: torch.ones(v.shape) for k, v in result.state_dict().items()},
            {k: torch.ones(v.shape) for k, v in model().state_dict().items()},
        )
        yield f"header {number} of kind {what}", functools.partial(judge_bytes, data, "model", right)


CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(type='EncoderDecoder', pretrained='open-mmlab://resnet18_v1c', data_preprocessor=dict(mean=[1.0, 2.0, 3.0],
    std=[1.0, 2.0, 3.0], bgr_to_rgb=True), backbone=dict(type='ResNetV1c', depth=18, num_stages=4, strides=(1, 2, 1, 1),
    dilations=(1, 1, 2, 4), contract_dilation=True, norm_cfg=dict(type='SyncBN', requires_grad=True)),
    decode_head=dict(type='HEAD', channels=8, num_classes=3, align_corners=False, dropout_ratio=0.1),
    auxiliary_head=dict(type='FCNHead', channels=8, num_classes=3, align_corners=False, num_convs=1, concat_input=0))
"""
TEXTS = (
    None, 5, "", "[" * 10**5, "(" * 150 + ")" * 150, "-" * 10**5 + "1", "a" + ".b" * 10**5,
    "x = " + "not " * 10**5 + "1",
    "1" * 10**5, "\0", "model = dict(dict(", "model = 5", "model = dict(a=1, a=2)", "a" * 10**6, "1+" * 10**5 + "1",
    "model = " + "{1:" * 90 + "1" + "}" * 90, "if 1:\n" * 200, "lambda: " * 10**5 + "1", "\udce9 = 1",
    "f'" + "{" * 10**4,
)  # fmt: skip
LITERAL = re.compile(r"'[^']*'|\[[^]]*\]|\([\d, ]+\)|True|False|\b[\d.]+\b")
HEADS = {"apcnet": "APCHead", "pspnet": "PSPHead", "encnet": "EncHead", "fcn": "FCNHead"}


def judge_conversion(state: dict, text, folder: Path) -> str:
    """Converts a checkpoint of mmsegmentation whose names, shapes or config are absurd."""
    path = folder / "a.pth"
    torch.save({"state_dict": state, "meta": {"cfg": text, "CLASSES": ("a", "b", "c")}}, path)

    def call():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert.convert(path, folder / "a.safetensors")

    def right(converted) -> bool:
        own = mmseg.state_dict(converted)
        given = {key: tensor.to(own[key].dtype) for key, tensor in state.items()}  # counts of batches may be floats
        return equal({key: own[key] for key in given}, given) and (folder / "a.safetensors").is_file()

    judged = verdict(call, right, str(path))
    assert judged == "right" or not (folder / "a.safetensors").exists(), "an error, and a file was written"
    return judged


def conversions(count: int, seed: int) -> Cases:
    for number in range(count):
        generator = random.Random(f"{seed} {number}")
        name = generator.choice(list(HEADS))
        state, text = mmseg.state_dict(model(name)), CONFIG.replace("HEAD", HEADS[name], 1)
        keys = list(state)
        for _ in range(generator.choice((1, 1, 3))):
            key = generator.choice(keys)
            tensor = state.get(key, torch.ones(1))
            match generator.randrange(10):
                case 0:
                    state.pop(key, None)
                case 1:
                    names = (f"{key}.x", f"{key}".replace("0", "7"), "a\nb", "\udce9", 5, ("a", 1), "", "." * 9)
                    state[generator.choice(names)] = tensor
                case 2:
                    shapes = ((), (0,), (10**9, 0), (1,) * 9, (*tensor.shape, 1), tensor.shape[::-1])
                    state[key] = torch.ones(generator.choice(shapes))
                case 3:
                    values = (None, 1, "a", [tensor], tensor.to(torch.complex64), tensor.to(torch.int8))
                    state[key] = generator.choice(values)
                case 4:
                    part = generator.choice(("decode", "backbone", "layer1", "conv"))
                    state = {str(key).replace(part, "x"): tensor for key, tensor in state.items()}
                case 5 | 6 | 7:
                    literals = LITERAL.findall(text) if isinstance(text, str) else []
                    if literals:
                        text = text.replace(generator.choice(literals), repr(generator.choice(ABSURD))[:5000], 1)
                case 8:
                    text = generator.choice(TEXTS)
                case 9:
                    text = str(text)[: generator.randrange(len(str(text)))]
        yield f"conversion {number} of {name}", functools.partial(judge_conversion, state, text)


KINDS = {
    "deep keys": deep_keys,
    "bytes flipped": flips,
    "files cut": truncations,
    "hostile pickles": programs,
    "random pickles": soups,
    "zip archives": archives,
    "architectures": architectures,
    "headers": headers,
    "conversions": conversions,
}


def test_a_sample_of_each_kind():
    counts = judged(__file__, 12)
    print({kind: dict(verdicts) for kind, verdicts in counts.items()})
    assert counts.keys() == KINDS.keys() and all(verdicts.total() == 12 for verdicts in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_kind(kind):
    (verdicts,) = judged(__file__, 1000, seed=1, kinds=[kind]).values()
    print(kind, dict(verdicts))
    assert verdicts["named"] and (verdicts["right"] or kind == "files cut")  # otherwise the cases are wrong
