"""Tests that configs are checked, that every field matters, and that JSON keeps all of them."""

import ast
import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import pytest

from apcnet import config
from apcnet.config import Config, Data, Model, Optimisation, Protocol, differences
from apcnet.models import build

SECTIONS = {"model": Model, "data": Data, "optimisation": Optimisation, "evaluation": Protocol}
OTHER = {  # for every field a value other than its default
    "model": "pspnet",
    "backbone": "resnet18",
    "backbone_weights": "timm:resnet50c",
    "from_scratch": True,
    "init": Path("a.safetensors"),
    "output_stride": 16,
    "width": 8,
    "stem_width": 8,
    "stem": "7x7",
    "in_channels": 4,
    "image_size": (64, 96),
    "channels": 8,
    "scales": (1, 2),
    "guide": False,
    "fusion": False,
    "plain": True,
    "codes": 4,
    "presence": False,
    "lateral": True,
    "convs": 1,
    "concat": False,
    "kernel_size": 1,
    "neck_channels": 8,
    "neck_norm": True,
    "align_corners": True,
    "dropout": 0.5,
    "auxiliary_channels": 0,
    "auxiliary_weight": 0.2,
    "presence_weight": 0.1,
    "dataset": "folder",
    "root": Path("photographs"),
    "cache": Path("cache"),
    "cache_gib": 2.5,
    "split": "trainaug",
    "val_split": "test",
    "classes": 59,
    "labels": {0: 0, 128: 255, 255: 1},
    "family": "regional",
    "size": (64, 48),
    "crop": (64, 48),
    "scale": (64, 48),
    "ratio": (1.0, 1.0),
    "cat_max_ratio": 1.0,
    "antialias": True,
    "flips": "both",
    "rotate": True,
    "distortion": False,
    "augmentation": "none",
    "optimizer": "adamw",
    "schedule": "cosine",
    "lr": 0.02,
    "min_lr": 0.0,
    "power": 1.0,
    "warmup": 10,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "head_lr": 10.0,
    "lr_factors": {"backbone": 0.5},
    "freeze": ("backbone.stem",),
    "layer_decay": 0.75,
    "clip": 1.0,
    "accumulate": 2,
    "ema": 0.999,
    "loss": "cross_entropy+0.5*dice",
    "focal_gamma": 0.5,
    "ohem_threshold": 0.9,
    "ohem_share": 1.0,
    "reduction": "mean",
    "label_smoothing": 0.1,
    "class_weights": Path("report.json"),
    "test_scale": (2048, 512),
    "window": (769, 513),
    "stride": (513, 342),
    "ratios": (0.5, 1.0),
    "flip": True,
    "single_resize": True,
    "steps": 3,
    "batch_size": 3,
    "seed": -1,
    "eval_every": 3,
    "save_every": 3,
    "best_by": "dice",
    "patience": 3,
    "precision": "bfloat16",
    "channels_last": True,
    "compile": True,
    "deterministic": False,
}
REQUIRED = {  # the other fields that a field needs
    "classes": {"dataset": "pascal_context"},
    "labels": {"dataset": "folder"},
    "cache": {"dataset": "shards"},
    "window": {"window": (513, 513), "stride": (513, 513)},
    "stride": {"window": (513, 513), "stride": (513, 513)},
}
VERBS = (  # with which the help of a flag begins
    "Accumulate Add Align Apply Augment Average Choose Clip Compile Concatenate Distort Draw Evaluate Extract Generate "
    "Give Guide Keep Let Map Minimise Mirror Move Multiply Pool Read Resize Rotate Run Save Seed Set Slide Smooth "
    "Start Stop Store Train Use Weight"
)
BACKBONES, SMALL = ("tiny", "resnet18"), {"width": 8, "channels": 8}
START = {"model", "backbone", "backbone_weights", "from_scratch", "init"}


def fields_of(kind):
    return [field.name for field in dataclasses.fields(kind)]


def made(fields):
    """Makes a config from fields of any section."""
    inside = {name: {f: fields[f] for f in fields_of(kind) if f in fields} for name, kind in SECTIONS.items()}
    return Config(**inside, **{f: fields[f] for f in fields_of(Config) if f in fields.keys() - SECTIONS.keys()})


def test_every_field_is_a_flag_of_its_own():
    """Tests that no two fields share a name, since flags do not name the section."""
    fields = [name for kind in SECTIONS.values() for name in fields_of(kind)]
    fields += [name for name in fields_of(Config) if name not in SECTIONS]
    assert len(set(fields)) == len(fields)
    assert fields == list(OTHER)


def test_every_flag_has_a_help_that_is_a_sentence():
    tree = ast.parse(inspect.getsource(config))
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, following in itertools.pairwise(section.body):
            if isinstance(field, ast.AnnAssign) and not (section.name == "Config" and field.target.id in SECTIONS):
                name = f"{section.name}.{field.target.id}"
                assert isinstance(following, ast.Expr), name
                text = following.value.value
                assert text.endswith(".") and text.split()[0] in VERBS.split(), f"{name}: {text}"


@pytest.mark.parametrize("name", OTHER)
def test_every_field_counts_and_survives_json(name):
    needed = REQUIRED.get(name, {})
    one, other = made(needed), made({**needed, name: OTHER[name]})
    (line,) = differences(one, other)
    assert line.startswith(f"{name}: ") and line.endswith(f" → {OTHER[name]}") and one != other
    assert Config.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert differences(other, other) == []


def test_differences_are_what_a_user_would_type():
    one = Config(optimisation=Optimisation(clip=None), seed=1)
    other = Config(data=Data(crop=(64, 48)), optimisation=Optimisation(clip=35), seed=2)
    assert differences(one, other) == ["crop: (96, 96) → (64, 48)", "clip: None → 35.0", "seed: 1 → 2"]


def test_fields_are_converted_to_their_type():
    data = Data("folder", root="photographs", crop=[64, 48], ratio=[1, 2], labels={"0": 255})
    assert data == Data("folder", root=Path("photographs"), crop=(64, 48), ratio=(1.0, 2.0), labels={0: 255})
    assert [type(value) for value in (data.crop, data.ratio[0], data.root)] == [tuple, float, type(Path())]
    assert type(Optimisation(lr=1).lr) is float
    address = Data("shards", "s3://bucket/shards")
    assert address.root == "s3://bucket/shards" and Config.from_json(Config(data=address).to_json()).data == address
    assert Config(model={"model": "fcn"}).model == Model("fcn")
    assert Config.from_json({}) == Config() and Config.from_json({"data": {"size": [48, 64]}}).data.size == (48, 64)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (Config, {"steps": 0}, "steps: expected 1 or more, got 0"),
        (Config, {"batch_size": -1}, "batch_size: expected 1 or more, got -1"),
        (Config, {"steps": "10"}, "steps: expected int, got '10'"),
        (Config, {"steps": True}, "steps: expected int, got True"),
        (Config, {"steps": None}, "steps: expected int, got None"),
        (Config, {"model": "apcnet"}, "model: expected Model, got 'apcnet'"),
        (Config, {"precision": "float"}, "precision: expected one of float32, bfloat16, float16, got 'float'"),
        (Config, {"data": {"croop": [3, 3]}}, r"field of data: expected .*, got 'croop'; did you mean 'crop'\?"),
        (Model, {"model": "apcnt"}, r"model: expected one of .*, got 'apcnt'; did you mean 'apcnet'\?"),
        (Model, {"init": "a", "backbone_weights": "b"}, "backbone_weights, init, from_scratch: expected one"),
        (Model, {"from_scratch": True, "backbone_weights": "b"}, "backbone_weights, init, from_scratch: expected one"),
        (Model, {"channels": 0}, "channels: expected 1 or more, got 0"),
        (Model, {"dropout": 1}, "dropout: expected 0 or more, but less than 1, got 1.0"),
        (Model, {"auxiliary_channels": -1}, "auxiliary_channels: expected 0 or more, got -1"),
        (Model, {"scales": (1, 2.5)}, "scales: expected int, got 2.5"),
        (Data, {"crop": (0, 3)}, r"crop: expected two sides of 1 or more, got \(0, 3\)"),
        (Data, {"crop": 3}, r"crop: expected tuple\[int, int\], got 3"),
        (Data, {"crop": (3, 3, 3)}, r"crop: expected 2 numbers, got \[3, 3, 3\]"),
        (Data, {"ratio": (2, 1)}, r"ratio: expected two positive numbers, the smaller first, got \(2.0, 1.0\)"),
        (Data, {"cat_max_ratio": 0}, "cat_max_ratio: expected a share above 0, up to 1, got 0.0"),
        (Data, {"dataset": "pascal_context", "classes": 58}, "classes: expected one of 59, 60, got '58'"),
        (Data, {"dataset": "pascal_context", "classes": "59"}, "classes: expected int, got '59'"),
        (Data, {"dataset": "ade20k", "classes": 59}, "classes: expected with pascal_context only, got 59 with ade20k"),
        (Data, {"labels": {0: 1}}, "labels: expected with folder only, got {0: 1} with synthetic"),
        (Data, {"dataset": "folder", "labels": {"a": 1}}, "labels: expected int, got 'a'"),
        (Data, {"dataset": "folder", "labels": [1, 2]}, r"labels: expected dict\[int, int\], got \[1, 2\]"),
        (Optimisation, {"lr": float("nan")}, r"lr: expected a positive number up to 3.4e\+38, got nan"),
        (Optimisation, {"clip": 0}, r"clip: expected a positive number up to 3.4e\+38, got 0.0"),
        (Optimisation, {"lr": 1e-5}, "min_lr: expected 0 up to lr, 1e-05, got 0.0001"),
        (Optimisation, {"momentum": 1.0}, "momentum: expected 0 or more, but less than 1, got 1.0"),
        (Optimisation, {"weight_decay": float("inf")}, r"weight_decay: expected 0 up to 3.4e\+38, got inf"),
        (Optimisation, {"lr": 1e308}, r"lr: expected a positive number up to 3.4e\+38, got 1e\+308"),
        (
            Optimisation,
            {"lr": 1e30, "head_lr": 1e30},
            r"lr: expected lr · head_lr · lr_factors / .* up to 3.4e\+38, got 1e\+61",
        ),
        (Optimisation, {"accumulate": 0}, "accumulate: expected 1 or more, got 0"),
        (Optimisation, {"lr_factors": {"head": 0}}, "lr_factors: expected names with positive numbers up to"),
        (Optimisation, {"freeze": "backbone"}, r"freeze: expected tuple\[str, \.\.\.\], got 'backbone'"),
        (Optimisation, {"lr": 1e30, "lr_factors": {"head": 1e30}}, "lr: expected lr · head_lr · lr_factors / "),
        (Config, {"patience": 0}, "patience: expected 1 or more, got 0"),
        (Config, {"best_by": "iou"}, "best_by: expected one of miou, dice, .*got 'iou'"),
        (Data, {"flips": "all"}, "flips: expected one of horizontal, both, none, got 'all'"),
        (Protocol, {"ratios": ()}, r"ratios: expected positive numbers, at least one, got \(\)"),
        (Protocol, {"ratios": (1, -1)}, r"ratios: expected positive numbers, at least one, got \(1.0, -1.0\)"),
        (Protocol, {"window": (3, 3)}, r"window, stride: expected both or neither, got \(3, 3\) and None"),
        (Protocol, {"window": (3, 3), "stride": (3, 4)}, r"stride: expected at most the window, \(3, 3\), got"),
        (
            Protocol,
            {"window": (3, 3), "stride": (3, 3), "single_resize": True},
            "single_resize: expected without window",
        ),
        (Optimisation, {"schedule": "one_cycle", "warmup": 5}, "warmup: expected 0 with schedule one_cycle"),
        (Optimisation, {"layer_decay": 1.5}, "layer_decay: expected above 0, up to 1, got 1.5"),
        (Model, {"backbone": "resnet51"}, r"backbone: expected one of resnet18, .*did you mean 'resnet50'"),
        (Protocol, {"flip": True, "single_resize": True}, "single_resize: expected without window"),
        (Protocol, {"window": (3, 3.5), "stride": (3, 3)}, r"window: expected int, got 3.5"),
    ],
)
def test_errors_name_the_field(section, fields, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        section(**fields)


@pytest.mark.parametrize("given", [None, [1], "config"])
def test_a_config_is_made_from_fields_only(given):
    with pytest.raises(TypeError, match="config: expected Config, got"):
        Config.from_json(given)


@pytest.mark.parametrize("name", [name for name in fields_of(Model) if name not in START])
def test_every_option_is_accepted_by_some_model(name):
    options = Model(**{name: OTHER[name]}).options()
    assert options == {name: OTHER[name]}
    if name == "image_size":  # of encoders of timm only: test_encoders.py
        return

    def is_taken(model, backbone):
        try:
            return build(model, backbone, 3, **{**SMALL, **options}) is not None
        except ValueError:
            return False

    assert any(itertools.starmap(is_taken, itertools.product(("apcnet", "encnet", "semantic_fpn", "fcn"), BACKBONES)))


def test_options_leave_out_names_and_fields_that_are_none():
    model = Model("fcn", "resnet18", from_scratch=True, channels=8, dropout=0.0, align_corners=False)
    assert model.options() == {"channels": 8, "dropout": 0.0, "align_corners": False}


def test_the_config_of_a_model_file():
    """Tests that an architecture read from JSON gives the config; classes and losses are not part of it."""
    model = build("pspnet", "resnet18", 3, **SMALL, scales=(1, 2), reduction="mean")
    architecture = json.loads(json.dumps(model.architecture))
    given = {**SMALL, "scales": (1, 2), "init": Path("a.safetensors")}
    assert Model.of(architecture, init="a.safetensors") == Model("pspnet", "resnet18", **given)


def test_the_options_of_a_dataset():
    assert Data(family="regional").open_options() == {"family": "regional", "size": (96, 96)}
    assert Data("ade20k").open_options() == {}
    assert Data("pascal_context", classes=59).open_options() == {"classes": 59}
    assert Data("folder", labels={0: 1}).open_options() == {"labels": {0: 1}}
