"""Defines the named training configs: `preset(name)` returns one, `table()` lists them with published results.

    tiny                            generated scenes and a small network: no download, a CPU is enough
    folder                          your own images and masks, from a trained model (--init) or a backbone
    apcnet-r50-ade20k-160k          MODEL-rDEPTH-DATASET-SCHEDULE: mmsegmentation's recipe, published or not; without
                                    a schedule it is the longest one for the dataset
    paper-apcnet-r101-voc2012       the APCNet paper's own recipe
    ssseg-semantic-fpn-r50-ade20k   sssegmentation's recipe

MODEL is apcnet, pspnet, encnet, fcn or semantic-fpn; DATASET is cityscapes (crops of 512×1024), cityscapes-769 (of
769×769), ade20k, voc2012 (trainaug), context (60 classes) or context59.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches

from apcnet.config import Config, Data, Model, Optimisation, Pair, Protocol
from apcnet.hub import PUBLISHED, TRAINED, Published

MODELS = ("apcnet", "pspnet", "encnet", "fcn", "semantic-fpn")
HEADINGS = ("preset", "mIoU", "ms+flip", "GB", "fps", "published by")
FORMATS = (".2f", ".2f", "g", ".2f", "")  # for all columns but the first


@dataclass(frozen=True)
class Benchmark:
    """Holds a dataset and the settings that mmsegmentation's runs on it share."""

    data: dict
    """Fields of the config's data section."""
    images: int
    """Number of training images."""
    batch_size: int
    crop: Pair
    scale: Pair
    """Size that images are fitted into, in training (before the random ratio) and in evaluation."""
    schedules: tuple[str, ...]
    """Schedules, from the shortest to the longest."""
    slides: bool = False
    """Evaluate by a sliding window of the crop's size, with a stride of two thirds of it."""
    align_corners: bool | None = None
    lr: float = 0.01
    weight_decay: float = 5e-4

    def steps(self, epochs: int) -> int:
        return math.ceil(epochs * self.images / self.batch_size)

    def evaluation(self) -> Protocol:
        if not self.slides:
            return Protocol(test_scale=self.scale)
        height, width = self.crop
        return Protocol(test_scale=self.scale, window=self.crop, stride=(round(height * 2 / 3), round(width * 2 / 3)))


CITYSCAPES = Benchmark({"dataset": "cityscapes"}, 2975, 8, (512, 1024), (2048, 1024), ("40k", "80k"))
VOC2012 = Benchmark({"dataset": "voc2012", "split": "trainaug"}, 10582, 16, (512, 512), (2048, 512), ("20k", "40k"))
CONTEXT = Benchmark(
    {"dataset": "pascal_context", "classes": 60},
    images=4998,
    batch_size=16,
    crop=(480, 480),
    scale=(520, 520),
    schedules=("40k", "80k"),
    slides=True,
    lr=0.004,
    weight_decay=1e-4,
)
BENCHMARKS = {
    "cityscapes": CITYSCAPES,
    "cityscapes-769": replace(CITYSCAPES, crop=(769, 769), scale=(2049, 1025), slides=True, align_corners=True),
    "ade20k": Benchmark({"dataset": "ade20k"}, 20210, 16, (512, 512), (2048, 512), ("80k", "160k")),
    "voc2012": VOC2012,
    "context": CONTEXT,
    "context59": replace(CONTEXT, data={"dataset": "pascal_context", "classes": 59}),
}
# Epochs, side of a crop and learning rate. Settings that the paper does not state, such as the batch size of 16, are
# mmsegmentation's; but images are never scaled below the crop.
PAPER = {"voc2012": (80, 512, 0.01), "context": (80, 512, 0.001), "ade20k": (120, 576, 0.01)}
SSSEG_EPOCHS = {"voc2012": 60, "ade20k": 130, "cityscapes": 220}
MORE = (18, "cityscapes", "80k"), (18, "cityscapes-769", "80k"), (101, "cityscapes", "80k-fp16")


def tiny() -> Config:
    """Returns a config that trains a model of 0.11 million parameters on generated scenes in a minute or two.

    Some classes in these scenes can be told apart by context only. Sizes and steps are the config's defaults.
    """
    return Config(
        Model("apcnet", "tiny", width=32, channels=32, dropout=0.0, auxiliary_channels=0),
        Data(ratio=(1.0, 1.0), cat_max_ratio=1.0),
        Optimisation(lr=0.05),
    )


def folder() -> Config:
    """Returns a config for your own images, also for few of them: a short run with batches that fit on one GPU."""
    return Config(
        Model("apcnet", "resnet50"),
        Data("folder", crop=(512, 512), scale=(2048, 512)),
        Optimisation(lr=0.005),  # the benchmarks' 0.01 is for twice the batch
        Protocol(test_scale=(2048, 512)),
        steps=4000,
        eval_every=400,
        save_every=400,
    )


def recipe(model: str, depth: int, dataset: str, schedule: str) -> Config:
    """Returns the config of a published recipe.

    Args:
        model: One of MODELS.
        depth: Depth of the ResNet: 18, 50 or 101.
        dataset: One of BENCHMARKS.
        schedule: mmsegmentation's number of steps in thousands ("80k"), the same in half precision ("80k-fp16"),
            "paper" for a dataset in PAPER, or "ssseg" for one in SSSEG_EPOCHS.
    """
    benchmark, paper, ssseg = BENCHMARKS[dataset], schedule == "paper", schedule == "ssseg"
    if paper:
        epochs, side, lr = PAPER[dataset]
        scale = (benchmark.scale[0], max(benchmark.scale[1], side))
        benchmark = replace(benchmark, crop=(side, side), scale=scale, lr=lr, weight_decay=1e-4)
        steps = benchmark.steps(epochs)
    elif ssseg:
        steps = benchmark.steps(SSSEG_EPOCHS[dataset])
    else:
        steps = 1000 * int(schedule.removesuffix("-fp16").removesuffix("k"))
    narrow = {"channels": 128, "auxiliary_channels": 64} if depth == 18 else {}
    return Config(
        replace(
            Model(),
            model=model.replace("-", "_"),
            backbone=f"resnet{depth}",
            plain=paper or None,
            neck_norm=ssseg or None,
            align_corners=benchmark.align_corners,
            **narrow,
        ),
        Data(**benchmark.data, crop=benchmark.crop, scale=benchmark.scale),
        Optimisation(
            lr=benchmark.lr,
            min_lr=0.0 if paper else 1e-4,
            weight_decay=benchmark.weight_decay,
            reduction="mean" if ssseg else "mean_all",
        ),
        benchmark.evaluation(),
        steps=steps,
        batch_size=benchmark.batch_size,
        eval_every=math.ceil(steps / 10),
        save_every=1000,  # more often than published: an interruption would cost hours
        precision="float16" if schedule.endswith("fp16") else "float32",
    )


def _recipes() -> Iterator[tuple[str, tuple[str, int, str, str]]]:
    """Yields the names of the published recipes with their arguments for `recipe`."""
    for model, (dataset, benchmark) in itertools.product(MODELS, BENCHMARKS.items()):
        for schedule, depth in itertools.product(benchmark.schedules, (50, 101)):
            yield f"{model}-r{depth}-{dataset}-{schedule}", (model, depth, dataset, schedule)
    for model in ("pspnet", "fcn"):  # these two have more published runs
        for depth, dataset, schedule in MORE:
            yield f"{model}-r{depth}-{dataset}-{schedule}", (model, depth, dataset, schedule)
    for prefix, model, datasets in (("paper", "apcnet", PAPER), ("ssseg", "semantic-fpn", SSSEG_EPOCHS)):
        for dataset, depth in itertools.product(datasets, (50, 101)):
            yield f"{prefix}-{model}-r{depth}-{dataset}", (model, depth, dataset, prefix)


OWN = {"tiny": tiny, "folder": folder}
RECIPES = dict(_recipes())
SHORT = {  # names without a schedule stand for the last schedule, which is the longest
    f"{model}-r{depth}-{dataset}": (model, depth, dataset, schedule)
    for model, depth, dataset, schedule in RECIPES.values()
    if schedule.endswith("k")
}


def names() -> list[str]:
    """Returns the names of all presets; those of benchmarks include the schedule."""
    return [*OWN, *RECIPES]


def with_weights() -> list[str]:
    """Returns the names of the presets with published weights, which `apcnet.load` takes as well."""
    trained = {RECIPES[name] for name in TRAINED}
    return [name for name, recipe in (RECIPES | SHORT).items() if recipe in trained]


def preset(name: str) -> Config:
    """Returns the config of a preset.

    Args:
        name: One of `names()`, or a benchmark's name without the schedule, which stands for the longest one.

    Example:
        >>> config = preset("apcnet-r50-ade20k-160k")
    """
    if name in OWN:
        return OWN[name]()
    recipes = RECIPES | SHORT
    if name not in recipes:
        near = get_close_matches(name, [*OWN, *recipes]) or [known for known in recipes if name in known][:3]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"preset: expected a name that `apcnet presets` lists, got {name!r}{hint}")
    return recipe(*recipes[name])


def recipe_for(dataset: str, name: str | None = None) -> Config:
    """Returns the config of a preset for a dataset: the named one, or the first one; `folder` serves for any data."""
    if name is None:
        name = next((known for known in names() if preset(known).data.dataset == dataset), "folder")
    config = preset(name)
    if name != "folder" and config.data.dataset != dataset:
        raise ValueError(f"preset: expected one for {dataset}, got {name}, which is for {config.data.dataset}")
    return config


def table(containing: str = "") -> str:
    """Returns a table of the presets whose name contains a text, with their published results."""
    chosen = [name for name in names() if containing in name]
    if not chosen:
        raise ValueError(f"presets: expected a part of a name that `apcnet presets` lists, got {containing!r}")
    lines: list[tuple[str, ...]] = [HEADINGS]
    for name in chosen:
        figures = PUBLISHED.get(name, Published(None, None, None, None, "–"))
        cells = ("–" if figure is None else format(figure, form) for figure, form in zip(figures, FORMATS, strict=True))
        lines.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        f"{name:<{widths[0]}}  {'  '.join(map(str.rjust, figures, widths[1:]))}  {source}\n"
        for name, *figures, source in lines
    )
