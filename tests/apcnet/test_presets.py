"""Tests that presets are the published recipes and that the table shows the published results."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from apcnet.config import Config
from apcnet.hub import PUBLISHED
from apcnet.models import build
from apcnet.models.build import BACKBONES
from apcnet.presets import names, preset, table

MODELS = ("apcnet", "pspnet", "encnet", "fcn", "semantic-fpn")
STEPS = {"20k": 20_000, "40k": 40_000, "80k": 80_000, "160k": 160_000}
SCHEDULES = {
    "cityscapes": ("40k", "80k"),
    "cityscapes-769": ("40k", "80k"),
    "ade20k": ("80k", "160k"),
    "voc2012": ("20k", "40k"),
    "context": ("40k", "80k"),
    "context59": ("40k", "80k"),
}
EVERY = pytest.mark.parametrize("name", names())


def test_every_run_of_the_tables_has_a_name():
    """Tests that unpublished combinations have a name as well."""
    runs = {f"{m}-r{depth}-{on}-{s}" for m in MODELS for depth in (50, 101) for on in SCHEDULES for s in SCHEDULES[on]}
    for model, dataset in itertools.product(("pspnet", "fcn"), ("cityscapes", "cityscapes-769")):
        runs.add(f"{model}-r18-{dataset}-80k")
    runs |= {"pspnet-r101-cityscapes-80k-fp16", "fcn-r101-cityscapes-80k-fp16"}
    runs |= {f"paper-apcnet-r{depth}-{on}" for depth in (50, 101) for on in ("voc2012", "context", "ade20k")}
    runs |= {f"ssseg-semantic-fpn-r{depth}-{on}" for depth in (50, 101) for on in ("voc2012", "ade20k", "cityscapes")}
    assert set(names()) == {"tiny", "folder"} | runs
    assert len(names()) == len(set(names())) == 2 + 120 + 4 + 2 + 6 + 6


@EVERY
def test_every_preset_survives_json(name):
    config = preset(name)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_no_two_are_the_same():
    configs = [json.dumps(preset(name).to_json()) for name in names()]
    assert len(set(configs)) == len(configs)


def test_every_option_is_one_that_its_model_takes():
    """Tests options at every depth and width."""
    models = {preset(name).model for name in names() if name != "tiny"}
    assert {model.backbone for model in models} == {"resnet18", "resnet50", "resnet101"} <= BACKBONES.keys()
    for model in {replace(model, backbone="resnet18") for model in models}:
        build(model.model, model.backbone, 3, **{**model.options(), "width": 8, "channels": 8})


# mmsegmentation's recipe


@pytest.mark.parametrize("dataset", SCHEDULES)
@pytest.mark.parametrize("model", MODELS)
def test_the_schedule_is_in_the_name_or_the_longest(model, dataset):
    runs = {schedule: preset(f"{model}-r50-{dataset}-{schedule}") for schedule in SCHEDULES[dataset]}
    for schedule, run in runs.items():
        assert run.steps == STEPS[schedule] and run.eval_every == STEPS[schedule] // 10
    assert preset(f"{model}-r50-{dataset}") == runs[SCHEDULES[dataset][-1]]
    shorter, longer = runs.values()
    assert replace(longer, steps=shorter.steps, eval_every=shorter.eval_every) == shorter


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("dataset", "opened", "batch_size", "crop", "scale", "slides"),
    [
        ("cityscapes", ("cityscapes", "train", None), 8, (512, 1024), (2048, 1024), None),
        ("cityscapes-769", ("cityscapes", "train", None), 8, (769, 769), (2049, 1025), (513, 513)),
        ("ade20k", ("ade20k", "train", None), 16, (512, 512), (2048, 512), None),
        ("voc2012", ("voc2012", "trainaug", None), 16, (512, 512), (2048, 512), None),
        ("context", ("pascal_context", "train", 60), 16, (480, 480), (520, 520), (320, 320)),
        ("context59", ("pascal_context", "train", 59), 16, (480, 480), (520, 520), (320, 320)),
    ],
)
def test_mmsegmentations_recipe(model, dataset, opened, batch_size, crop, scale, slides):
    config = preset(f"{model}-r101-{dataset}")
    data, descent, test = config.data, config.optimisation, config.evaluation
    assert (data.dataset, data.split, data.classes, data.val_split) == (*opened, "val")
    assert (config.batch_size, data.crop, data.scale, test.test_scale) == (batch_size, crop, scale, scale)
    assert (data.ratio, data.cat_max_ratio, data.antialias) == ((0.5, 2.0), 0.75, False)
    assert (test.window, test.stride, test.ratios, test.flip) == (slides and crop, slides, (1.0,), False)
    assert (descent.lr, descent.weight_decay) == ((0.004, 1e-4) if "context" in dataset else (0.01, 5e-4))
    assert (descent.min_lr, descent.momentum, descent.power, descent.reduction) == (1e-4, 0.9, 0.9, "mean_all")
    assert (config.model.model, config.model.backbone) == (model.replace("-", "_"), "resnet101")
    assert config.model.options() == ({"align_corners": True} if dataset == "cityscapes-769" else {})
    assert config.precision == "float32"


@pytest.mark.parametrize("model", ["pspnet", "fcn"])
def test_what_is_published_of_these_two_alone(model):
    """Tests narrower heads on ResNet-18, and half precision."""
    assert preset(f"{model}-r18-cityscapes").model.options() == {"channels": 128, "auxiliary_channels": 64}
    full, half = preset(f"{model}-r101-cityscapes-80k"), preset(f"{model}-r101-cityscapes-80k-fp16")
    assert half == replace(full, precision="float16")


# recipes of others


@pytest.mark.parametrize(
    ("dataset", "crop", "lr", "steps"),
    [  # 80 · 10582 / 16, 80 · 4998 / 16, 120 · 20210 / 16
        ("voc2012", (512, 512), 0.01, 52_910),
        ("context", (512, 512), 0.001, 24_990),
        ("ade20k", (576, 576), 0.01, 151_575),
    ],
)
def test_the_papers_recipe(dataset, crop, lr, steps):
    config = preset(f"paper-apcnet-r50-{dataset}")
    assert (config.data.crop, config.steps, config.batch_size) == (crop, steps, 16)
    assert (config.optimisation.lr, config.optimisation.min_lr, config.optimisation.weight_decay) == (lr, 0.0, 1e-4)
    assert config.model.options() == {"plain": True}
    assert min(config.data.scale) >= crop[0] and config.evaluation.test_scale == config.data.scale
    assert config.evaluation.window == (crop if dataset == "context" else None)


@pytest.mark.parametrize(
    ("dataset", "batch_size", "steps"),
    [  # 60 · 10582 / 16 = 39682.5, 130 · 20210 / 16 = 164206.25, 220 · 2975 / 8 = 81812.5
        ("voc2012", 16, 39_683),
        ("ade20k", 16, 164_207),
        ("cityscapes", 8, 81_813),
    ],
)
def test_sssegmentations_recipe(dataset, batch_size, steps):
    """Tests that it is mmsegmentation's but for length, neck and loss reduction."""
    config, theirs = preset(f"ssseg-semantic-fpn-r50-{dataset}"), preset(f"semantic-fpn-r50-{dataset}")
    assert (config.batch_size, config.steps, config.optimisation.reduction) == (batch_size, steps, "mean")
    assert config.model == replace(theirs.model, neck_norm=True)
    assert config.optimisation == replace(theirs.optimisation, reduction="mean")
    assert (config.data, config.evaluation) == (theirs.data, theirs.evaluation)


# what is neither


def test_tiny_is_tiny():
    config = preset("tiny")
    model = build(config.model.model, config.model.backbone, 9, **config.model.options())
    assert sum(parameter.numel() for parameter in model.parameters()) <= 350_000
    assert model.backbone.strides[-1] == 4 and model.auxiliary is None
    assert (config.steps, config.batch_size, config.eval_every) == (1500, 8, 150)
    data = config.data
    assert (data.dataset, data.family) == ("synthetic", "whole")
    assert data.size == data.crop == data.scale and data.ratio == (1.0, 1.0)  # scenes as they are


def test_a_folder_of_ones_own():
    config = preset("folder")
    assert (config.data.dataset, config.data.root, config.data.crop) == ("folder", None, (512, 512))
    assert config.evaluation.test_scale == config.data.scale == (2048, 512)
    assert config.model.backbone == "resnet50" and config.steps < 20_000


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("apcnet-r50-ade20", "did you mean apcnet-r50-ade20k or "),
        ("apcnet_r50-ade20k-80k", "did you mean apcnet-r50-ade20k-80k or "),
        ("apcnet-r18-ade20k-80k", "did you mean apcnet-r101-ade20k-80k or "),
        ("Tiny", "did you mean tiny?"),
        ("encnet", "did you mean encnet-r50-cityscapes-40k or "),
        ("pspnet-r101-cityscapes-fp16", "did you mean pspnet-r101-cityscapes-80k-fp16 or "),
        ("?", "expected a name that `apcnet presets` lists, got '?'"),
    ],
)
def test_a_name_that_is_none(name, near):
    with pytest.raises(ValueError, match="preset: expected a name that `apcnet presets` lists, got ") as caught:
        preset(name)
    assert near in str(caught.value) and len(str(caught.value)) < 250


# what has been published


def test_what_is_published_has_a_preset():
    assert PUBLISHED.keys() <= set(names())
    sources = {"apcnet": 12, "pspnet": 23, "encnet": 12, "fcn": 23, "sem_fpn": 4}
    for folder, count in sources.items():
        rows = [name for name, row in PUBLISHED.items() if row.source == f"mmsegmentation, configs/{folder}"]
        assert len(rows) == count and {name.split("-r")[0] for name in rows} == {folder.replace("sem_", "semantic-")}
    others = {name: row.source for name, row in PUBLISHED.items() if not row.source.startswith("mmsegmentation")}
    assert len(others) == 10
    for name, source in others.items():
        assert source.startswith({"paper": "the paper", "ssseg": "sssegmentation, "}[name.split("-")[0]])


def test_figures_are_such_as_can_be():
    assert all(row.miou is not None or row.multi_scale is not None for row in PUBLISHED.values())
    for name, row in PUBLISHED.items():
        for accuracy in (row.miou, row.multi_scale):
            assert accuracy is None or 35 < accuracy < 82
        assert row.miou is None or row.multi_scale is None or 0 < row.multi_scale - row.miou < 3
        assert row.memory is None or 1 < row.memory < 14
        assert row.fps is None or 1 < row.fps < 56
        if "-r101-" in name and (shallow := PUBLISHED.get(name.replace("-r101-", "-r50-"))) and row.memory:
            assert row.memory > shallow.memory and row.fps < shallow.fps


def test_apcnets_figures_are_not_pspnets():
    """Tests against a known page that confuses the two."""
    for name, row in PUBLISHED.items():
        if name.startswith("apcnet-"):
            assert row[:4] != PUBLISHED[name.replace("apcnet", "pspnet")][:4]


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("apcnet-r50-cityscapes-40k", (78.02, 79.26, 7.7, 3.57)),
        ("apcnet-r101-cityscapes-769-80k", (78.45, 79.91, None, None)),
        ("apcnet-r50-ade20k-80k", (42.20, 43.30, 10.1, 19.61)),
        ("pspnet-r18-cityscapes-80k", (74.87, 76.04, 1.7, 15.71)),
        ("pspnet-r101-context-40k", (46.60, 47.78, 8.8, 9.68)),
        ("pspnet-r101-cityscapes-80k-fp16", (79.46, None, 5.34, 8.77)),
        ("encnet-r101-cityscapes-769-40k", (74.25, 76.25, 13.7, 1.26)),
        ("fcn-r50-voc2012-40k", (66.97, 69.04, None, None)),
        ("fcn-r101-context59-80k", (49.35, 51.38, None, None)),
        ("semantic-fpn-r101-ade20k-160k", (39.35, 40.72, 5.9, 40.58)),
        ("ssseg-semantic-fpn-r50-ade20k", (38.16, None, None, None)),
        ("paper-apcnet-r101-ade20k", (None, 45.38, None, None)),
    ],
)
def test_figures_as_published(name, figures):
    assert PUBLISHED[name][:4] == figures


# the table


def test_the_table_has_a_line_for_every_preset():
    heading, *lines = table().splitlines()
    assert heading.split() == ["preset", "mIoU", "ms+flip", "GB", "fps", "published", "by"]
    assert [line.split()[0] for line in lines] == names()
    assert not [line for line in lines if line != line.rstrip()]
    start = heading.index("published by")
    assert {line[start - 2 : start] for line in lines} == {"  "} and max(map(len, lines)) <= 120


def test_the_table_can_be_cut_down():
    assert table("r50-ade20k-160k").splitlines() == [
        "preset                         mIoU  ms+flip   GB    fps  published by",
        "apcnet-r50-ade20k-160k        43.40    43.94    –      –  mmsegmentation, configs/apcnet",
        "pspnet-r50-ade20k-160k        42.48    43.44    –      –  mmsegmentation, configs/pspnet",
        "encnet-r50-ade20k-160k        40.10    41.71    –      –  mmsegmentation, configs/encnet",
        "fcn-r50-ade20k-160k           36.10    38.08    –      –  mmsegmentation, configs/fcn",
        "semantic-fpn-r50-ade20k-160k  37.49    39.09  4.9  55.77  mmsegmentation, configs/sem_fpn",
    ]
    assert table("tiny").splitlines()[1].split() == ["tiny", "–", "–", "–", "–", "–"]
    with pytest.raises(
        ValueError, match="presets: expected a part of a name that `apcnet presets` lists, got 'deeplab'"
    ):
        table("deeplab")


def test_help_need_not_wait_for_pytorch():
    heavy = {"torch", "numpy", "PIL", "tyro", "rich"}
    code = f"import sys, apcnet.presets; apcnet.presets.table(); assert not {heavy!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
