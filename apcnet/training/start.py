"""Prepares a run: checks its config as a whole, opens its data and makes its initial model."""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import apcnet.data
from apcnet.config import Config, Data, Model, differences
from apcnet.data import augment
from apcnet.data.doctor.check import judge as judge_files
from apcnet.data.files import Files
from apcnet.data.own import own_data
from apcnet.data.sample import MEAN, STD, Dataset
from apcnet.data.statistics import Statistics
from apcnet.data.stream import Transform
from apcnet.data.synthetic import Synthetic
from apcnet.distributed import gather, rank, world_size
from apcnet.files import read_json
from apcnet.interop.backbones import FROM_TIMM
from apcnet.keys import WEIGHTS, keyed
from apcnet.models import Segmentor
from apcnet.models.own import OwnSegmentor
from apcnet.terms import is_binary
from apcnet.training.own import Augmentation, Own, OwnAugmentation, measure
from apcnet.zoo import create, load

STATISTICS = "images.json"  # in the folder of a run whose images are not 8-bit RGB: their levels
FEW_IMAGES = 2000  # below it, the weights that a backbone starts from decide how good a model becomes


def augmentation(data: Data, model: Segmentor, own: Augmentation | None = None) -> Transform:
    """Returns the transform of training samples to normalised crops."""
    if own is not None:
        return OwnAugmentation(own, data.crop, model.mean, model.std)
    plain = data.augmentation == "none"
    return functools.partial(
        augment.train,
        crop_size=data.crop,
        scale=data.scale,
        ratio_range=(1.0, 1.0) if plain else data.ratio,
        cat_max_ratio=data.cat_max_ratio,
        antialias=data.antialias,
        flips="none" if plain else data.flips,
        rotate=data.rotate and not plain,
        distort=data.distortion and not plain,
        mean=model.mean,
        std=model.std,
    )


def check(config: Config, log_every: int = 1, workers: int = 0) -> None:
    """Checks before the first step everything that depends on more than one field of the config."""
    if log_every < 1:
        raise ValueError(f"log_every: expected 1 or more, got {log_every}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    check_root(config.data)
    if config.optimisation.warmup >= config.steps:
        raise ValueError(f"warmup: expected fewer than the {config.steps} steps, got {config.optimisation.warmup}")
    encoder = "own models" if config.model.model == "own" else config.model.backbone
    if config.optimisation.layer_decay != 1 and not encoder.startswith("timm:"):
        raise ValueError(
            f"layer_decay: expected 1 for {encoder}, whose layers share one learning rate, got "
            f"{config.optimisation.layer_decay}; encoders of timm (--backbone timm:NAME) have it"
        )
    model, share = config.model, config.batch_size // world_size()
    if config.batch_size % world_size():
        raise ValueError(f"batch_size: expected a multiple of the {world_size()} processes, got {config.batch_size}")
    if share % config.optimisation.accumulate:
        raise ValueError(
            f"accumulate: expected a divisor of the {share} images per process, got {config.optimisation.accumulate}"
        )
    if (
        model.model != "own"
        and model.backbone != "tiny"
        and not (model.backbone_weights or model.init or model.from_scratch)
    ):
        kind = model.backbone.partition(":")[0]
        known = {"timm": "timm", "tv": model.backbone}.get(kind, f"timm:{model.backbone}c")
        package = "torchvision" if kind == "tv" else "timm"
        has = ":" in model.backbone or known.removeprefix("timm:") in FROM_TIMM
        where = f" (or {known}, after pip install {package})" if has else ""
        raise ValueError(
            f"backbone_weights: expected pretrained weights for {model.backbone}, got none; add "
            f"--backbone-weights FILE{where}, --init MODEL.safetensors or --from-scratch, which needs many "
            "thousands of images to be as good"
        )


def judge(config: Config, train_data: Dataset, val_data: Dataset, workers: int) -> Statistics | None:
    """Judges one's own data as `apcnet check` does: raises its errors before the first step, and repeats its warnings.

    All processes have to call this; the first one judges. Returns the levels of images that are not 8-bit RGB.
    """
    if config.data.dataset == "shards":  # judged when they were packed
        return train_data.pairs.statistics
    if config.data.dataset == "own":
        return measure(train_data, workers)
    opened = {config.data.split: train_data, config.data.val_split: val_data}
    files = {split: data for split, data in opened.items() if isinstance(data, Files)}
    complaint = measured = None
    if rank() == 0 and config.data.dataset == "folder":
        assert config.data.root is not None  # open_data has checked it
        report = judge_files("folder", config.data.root, files, workers)
        complaint, measured = report.complaint(), report.images
        for warning in [] if complaint else report.warnings():
            warnings.warn(f"root: {warning}", stacklevel=2)
    complaint, measured = gather((complaint, measured))[0]
    if complaint:
        raise ValueError(f"root: {complaint}")
    return measured


def read_statistics(folder: Path) -> Statistics | None:
    """Reads the levels of the images that a run has started with; None for 8-bit RGB."""
    path = folder / STATISTICS
    return Statistics.from_json(read_json(path)) if path.exists() else None


def warn_about_images(config: Config, images: int, statistics: Statistics | None) -> None:
    """Warns before the first step about images that are too few for random weights, or that are not 8-bit RGB."""
    if statistics is not None:
        warnings.warn(
            f"images: {statistics}: normalised by their own mean and standard deviation, and augmented without changes "
            "of brightness, contrast and colour",
            stacklevel=2,
        )
    if config.data.dataset == "folder" and config.model.from_scratch and images < FEW_IMAGES:
        warnings.warn(
            f"from_scratch: {images} images teach a network with random weights little, whatever the number of steps; "
            "start from weights that know photographs: --backbone-weights FILE or --init MODEL.safetensors",
            stacklevel=2,
        )


def initial_model(
    config: Config, data: Dataset, statistics: Statistics | None = None, own: Own | None = None
) -> Segmentor:
    """Makes the model before the first step, on the CPU; the seed determines its random weights.

    Images that are not 8-bit RGB determine its number of channels and its normalisation by their statistics.
    """
    channels = 3 if statistics is None else statistics.channels
    if config.model.in_channels not in (None, channels):
        raise ValueError(
            f"in_channels: expected {channels}, as the images have, got {config.model.in_channels}; leave it out"
        )
    settings, classes = config.model, tuple(data.classes)
    binary = is_binary(config.optimisation.loss)
    if binary and len(classes) != 2:
        raise ValueError(
            f"loss: expected a dataset of two classes for {config.optimisation.loss}, got {len(classes)}; for more: "
            "--loss cross_entropy"
        )
    num_classes = 1 if binary else len(classes)
    if statistics is not None and settings.init is None:
        settings = replace(settings, in_channels=channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed(config.seed, WEIGHTS))
        if settings.model == "own":
            model = _own_model(own, num_classes, channels)
        elif settings.init is None:
            names = settings.model, settings.backbone
            model = create(*names, num_classes, settings.backbone_weights, **settings.options())
        else:
            model = load(settings.init, num_classes)
            start = {name: getattr(settings, name) for name in ("backbone_weights", "from_scratch", "init")}
            assert model.architecture is not None  # every loaded model has one
            loaded = replace(config, model=Model.of(model.architecture, **start))
            asked = replace(config, model=replace(settings, in_channels=None))
            if model.in_channels != channels:
                raise ValueError(
                    f"init: expected a model of images with {channels} channels, got {settings.init} with "
                    f"{model.in_channels}"
                )
            if changed := differences(replace(loaded, model=replace(loaded.model, in_channels=None)), asked):
                raise ValueError(f"init: {settings.init} holds another model than the config, {'; '.join(changed)}")
            if model.classes and model.classes != classes:
                warnings.warn(
                    f"init: {settings.init} was trained for other classes; its classifiers are kept", stacklevel=2
                )
    if statistics is not None and model.range is None:  # a model that was trained with such images keeps its own
        model.mean, model.std, model.range = statistics.mean, statistics.std, statistics.range
    if statistics is None and model.range is not None:
        model.mean, model.std, model.range = MEAN, STD, None
    model.classes, model.palette = classes, tuple(data.palette)
    return model.train()


def _own_model(own: Own | None, num_classes: int, channels: int) -> Segmentor:
    if own is None or own.model is None:
        raise ValueError(
            "model: expected model=module in a call of apcnet.train, since own models are objects, got none"
        )
    network = own.model if isinstance(own.model, nn.Module) else own.model()
    if isinstance(network, Segmentor):
        if network.num_classes != num_classes:
            raise ValueError(f"model: expected {num_classes} classes, as the data have, got {network.num_classes}")
        return network
    if not isinstance(network, nn.Module):
        raise TypeError(f"model: expected a module, or a function that makes one, got {type(network).__name__}")
    return OwnSegmentor(network, num_classes, channels)


def class_weights(config: Config, classes: Sequence[str]) -> list[float] | None:
    """Reads class weights from the report of `apcnet check` that the config names, if it names one."""
    path = config.optimisation.class_weights
    if path is None:
        return None
    try:
        weights = read_json(path)["class_weights"]["weights"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"class_weights: expected a report of `apcnet check --json` with class weights, got {path}"
        ) from None
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
    if not numbers or len(weights) != len(classes):
        raise ValueError(f"class_weights: expected {len(classes)} numbers of 0 or more in {path}, found {weights}")
    return weights


def open_both(data: Data, own: Own) -> tuple[Dataset, Dataset]:
    """Opens the data sets to train and to evaluate on: the user's own ones, or those that a config describes."""
    if own.data is None:
        return open_data(data, data.split), open_data(data, data.val_split)
    train_data, val_data = own_data(own.data, "data"), own_data(own.val_data, "val_data")
    if tuple(train_data.classes) != tuple(val_data.classes):
        raise ValueError(
            f"val_data: expected the classes of data, {', '.join(train_data.classes)}; got "
            f"{', '.join(val_data.classes)}"
        )
    return train_data, val_data


def check_root(data: Data) -> None:
    """Checks that a dataset which lies in a folder has one."""
    if data.root is None and data.dataset not in ("synthetic", "own"):
        wanted = "your images and masks" if data.dataset == "folder" else data.dataset
        raise ValueError(f"root: expected the folder of {wanted}, got none; add --root FOLDER")


def open_data(data: Data, split: str) -> Files | Synthetic:
    """Opens a split of the dataset that a config describes."""
    if data.dataset == "own":
        raise ValueError(
            "dataset: expected data= and val_data= in a call of apcnet.train, or a call of apcnet.evaluate, since own "
            "data sets are objects of Python, got none"
        )
    check_root(data)
    return apcnet.data.open(data.dataset, data.root, split, **data.open_options())
