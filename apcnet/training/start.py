"""What a run starts from: its config checked as a whole, its data, its model before the first step."""

import functools
import math
import warnings
from dataclasses import replace

import torch

import apcnet.data
from apcnet.config import Config, Data, Model, differences
from apcnet.data import augment
from apcnet.data.stream import Transform
from apcnet.distributed import world_size
from apcnet.files import read_json
from apcnet.keys import WEIGHTS, keyed
from apcnet.models import Segmentor
from apcnet.zoo import create, load


def augmentation(data: Data, model: Segmentor) -> Transform:
    """What a run makes of its samples: crops that the model takes."""
    return functools.partial(
        augment.train,
        crop_size=data.crop,
        scale=data.scale,
        ratio_range=data.ratio,
        cat_max_ratio=data.cat_max_ratio,
        antialias=data.antialias,
        mean=model.mean,
        std=model.std,
    )


def check(config: Config, log_every: int = 1, workers: int = 0) -> None:
    """What has to be known of a run before its first step and is not seen from a field alone."""
    if log_every < 1:
        raise ValueError(f"log_every: expected 1 or more, got {log_every}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    model, share = config.model, config.batch_size // world_size()
    if config.batch_size % world_size():
        raise ValueError(f"batch_size: expected a multiple of the {world_size()} processes, got {config.batch_size}")
    if share % config.optimisation.accumulate:
        raise ValueError(
            f"accumulate: expected a divisor of the {share} images of a process, got {config.optimisation.accumulate}"
        )
    if model.backbone.startswith("resnet") and not (model.backbone_weights or model.init or model.from_scratch):
        raise ValueError(
            f"backbone_weights: {model.backbone} is trained from ImageNet's weights: give a file or timm:resnet50c by "
            "--backbone-weights, a model by --init, or say --from-scratch"
        )


def starting_model(config: Config, data) -> Segmentor:
    """The model before its first step, on the CPU; its fresh weights follow from the seed."""
    given, classes = config.model, tuple(data.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed(config.seed, WEIGHTS))
        if given.init is None:
            model = create(given.model, given.backbone, len(classes), given.backbone_weights, **given.options())
        else:
            model = load(given.init, len(classes))
            kept = {"backbone_weights": given.backbone_weights, "from_scratch": given.from_scratch, "init": given.init}
            its = replace(config, model=Model.of(model.architecture, **kept))
            if changed := differences(its, config):
                raise ValueError(f"init: {given.init} is another model than the run's, {'; '.join(changed)}")
            if model.classes and model.classes != classes:
                warnings.warn(f"{given.init}: its classifiers are kept, but were made for other classes", stacklevel=2)
    model.classes, model.palette = classes, tuple(data.palette)
    return model.train()


def class_weights(config: Config, classes) -> list[float] | None:
    """From the report of `apcnet check`, where one is named."""
    path = config.optimisation.class_weights
    if path is None:
        return None
    try:
        weights = read_json(path)["class_weights"]["weights"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"class_weights: {path} is no report of `apcnet check --json` with class weights") from None
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
    if not numbers or len(weights) != len(classes):
        raise ValueError(f"class_weights: expected {len(classes)} numbers of 0 or more in {path}, found {weights}")
    return weights


def open_data(data: Data, split: str):
    """The data set that a config means."""
    if data.root is None and data.dataset != "synthetic":
        raise ValueError(f"root: expected the folder of {data.dataset}, by --root")
    return apcnet.data.open(data.dataset, data.root, split, **data.open_options())
