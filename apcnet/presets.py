"""The runs that have a name: `preset(name)` is a config, `table()` says what has been published of each.

    tiny                            generated scenes, a small network: no download, and a CPU is enough
    folder                          images and masks of one's own, from a trained model (--init) or a backbone
    apcnet-r50-ade20k-160k          MODEL-rDEPTH-DATASET-SCHEDULE: mmsegmentation's recipe, whether that run has been
                                    published or not; without a schedule it is the longest for the data set
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
from apcnet.hub import PUBLISHED, Published

MODELS = ("apcnet", "pspnet", "encnet", "fcn", "semantic-fpn")
HEADINGS = ("preset", "mIoU", "ms+flip", "GB", "fps", "published by")
FORMATS = (".2f", ".2f", "g", ".2f", "")  # of all columns but the first


@dataclass(frozen=True)
class Benchmark:
    """A data set and what mmsegmentation's runs on it have in common."""

    data: dict
    """What it is opened with."""
    images: int
    """To train with."""
    batch_size: int
    crop: Pair
    scale: Pair
    """Bounds that an image is fitted into, in training (before the random ratio) and in a test."""
    schedules: tuple[str, ...]
    """From the shortest to the longest."""
    slides: bool = False
    """A test looks through a window as large as a crop, that moves on by two thirds of it."""
    align_corners: bool | None = None
    lr: float = 0.01
    weight_decay: float = 5e-4

    def steps(self, epochs: int) -> int:
        return math.ceil(epochs * self.images / self.batch_size)

    def evaluation(self) -> Protocol:
        window = self.crop if self.slides else None
        stride = window and tuple(round(side * 2 / 3) for side in window)
        return Protocol(test_scale=self.scale, window=window, stride=stride)


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
# Epochs, side of a crop and learning rate. What is not stated, such as the batch size, 16, is as in mmsegmentation; but
# no scale makes images smaller than a crop.
PAPER = {"voc2012": (80, 512, 0.01), "context": (80, 512, 0.001), "ade20k": (120, 576, 0.01)}
SSSEG_EPOCHS = {"voc2012": 60, "ade20k": 130, "cityscapes": 220}
MORE = (18, "cityscapes", "80k"), (18, "cityscapes-769", "80k"), (101, "cityscapes", "80k-fp16")


def tiny() -> Config:
    """Generated scenes whose context decides, and 0.11 million parameters that learn it in a minute or two.

    Scenes, sizes and steps are what a config has where nothing is said.
    """
    return Config(
        Model("apcnet", "tiny", width=32, channels=32, dropout=0.0, auxiliary_channels=0),
        Data(ratio=(1.0, 1.0), cat_max_ratio=1.0),
        Optimisation(lr=0.05),
    )


def folder() -> Config:
    """Images of one's own, of which there may be few: a short run, of batches that fit on one GPU."""
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
    """The run of one of MODELS, on a ResNet of a depth, on one of BENCHMARKS.

    `schedule` is mmsegmentation's by its thousands of steps, 80k, or 80k-fp16 in half precision; paper, of those in
    PAPER; or ssseg, of those in SSSEG_EPOCHS.
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
        Model(
            model.replace("-", "_"),
            f"resnet{depth}",
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
        save_every=1000,  # not as published: an interruption would cost hours
        precision="float16" if schedule.endswith("fp16") else "float32",
    )


def _recipes() -> Iterator[tuple[str, tuple[str, int, str, str]]]:
    """Names, and what recipe makes them of."""
    for model, (dataset, benchmark) in itertools.product(MODELS, BENCHMARKS.items()):
        for schedule, depth in itertools.product(benchmark.schedules, (50, 101)):
            yield f"{model}-r{depth}-{dataset}-{schedule}", (model, depth, dataset, schedule)
    for model in ("pspnet", "fcn"):  # a few more have been published of these
        for depth, dataset, schedule in MORE:
            yield f"{model}-r{depth}-{dataset}-{schedule}", (model, depth, dataset, schedule)
    for prefix, model, datasets in (("paper", "apcnet", PAPER), ("ssseg", "semantic-fpn", SSSEG_EPOCHS)):
        for dataset, depth in itertools.product(datasets, (50, 101)):
            yield f"{prefix}-{model}-r{depth}-{dataset}", (model, depth, dataset, prefix)


OWN = {"tiny": tiny, "folder": folder}
RECIPES = dict(_recipes())
SHORT = {  # of several runs that differ in their schedules alone the last, which is the longest
    f"{model}-r{depth}-{dataset}": (model, depth, dataset, schedule)
    for model, depth, dataset, schedule in RECIPES.values()
    if schedule.endswith("k")
}


def names() -> list[str]:
    """Of all presets; those of benchmarks with their schedules."""
    return [*OWN, *RECIPES]


def preset(name: str) -> Config:
    """The config of that name."""
    if name in OWN:
        return OWN[name]()
    made_of = RECIPES | SHORT
    if name not in made_of:
        near = get_close_matches(name, [*OWN, *made_of]) or [known for known in made_of if name in known][:3]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"preset: none is called {name!r}{hint} (`apcnet presets` lists them)")
    return recipe(*made_of[name])


def table(containing: str = "") -> str:
    """A line for each preset whose name contains this, with what has been published of it; the first are headings."""
    chosen = [name for name in names() if containing in name]
    if not chosen:
        raise ValueError(f"presets: no name contains {containing!r} (`apcnet presets` lists them)")
    lines = [HEADINGS]
    for name in chosen:
        figures = PUBLISHED.get(name, Published(None, None, None, None, "–"))
        cells = ("–" if figure is None else format(figure, form) for figure, form in zip(figures, FORMATS, strict=True))
        lines.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        f"{name:<{widths[0]}}  {'  '.join(map(str.rjust, figures, widths[1:]))}  {source}\n"
        for name, *figures, source in lines
    )
