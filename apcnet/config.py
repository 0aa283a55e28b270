"""What a run is: every choice that its result depends on, in frozen dataclasses, and their way to JSON and back.

The fields are the flags of `apcnet train`, so that no two sections have one of the same name; the string under each is
its help. Where a run is kept, how many processes work on it and what is shown of it is not in here: it changes nothing.
A config that exists is in order: each field has the type it is declared with, in a range that makes sense.
"""

import dataclasses
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from apcnet.choices import check_choice

Pair = tuple[int, int]
Precision = Literal["float32", "bfloat16", "float16"]
# What numbers may be, and how that is said:
COUNT = "1 or more", lambda count: count >= 1
SIDES = "two sides of 1 or more", lambda sides: min(sides) >= 1
POSITIVE = "a positive number", lambda number: 0 < number < math.inf
NOT_NEGATIVE = "0 or more", lambda number: 0 <= number < math.inf
PART = "0 up to 1, without 1", lambda part: 0 <= part < 1


@dataclass(frozen=True)
class Model:
    """The network and what it starts from. An option that is None is the model's own default."""

    model: Literal["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn"] = "apcnet"
    """The head, and the neck where it has one."""
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "tiny"] = "resnet50"
    """What makes features of images."""
    backbone_weights: str | None = None
    """A backbone trained on ImageNet: a file, or timm:resnet50c."""
    from_scratch: bool = False
    """Train a benchmark without backbone weights, on purpose."""
    init: Path | None = None
    """A model file to start from; with another number of classes its classifiers start afresh."""
    output_stride: int | None = None
    """Pixels from one position of the backbone's last map to the next."""
    width: int | None = None
    """Channels of the backbone's first stage."""
    stem_width: int | None = None
    """Channels of the backbone's stem."""
    channels: int | None = None
    """Of the head."""
    scales: tuple[int, ...] | None = None
    """Of apcnet and pspnet: the sides of the pooled grids."""
    guide: bool | None = None
    """Of apcnet: the global guide of affinities."""
    fusion: bool | None = None
    """Of apcnet: the convolution after each context module."""
    plain: bool | None = None
    """Of apcnet: the paper's plainer module."""
    codes: int | None = None
    """Of encnet: how many codewords."""
    presence: bool | None = None
    """Of encnet: the branch that says which classes are in an image."""
    lateral: bool | None = None
    """Of encnet: the backbone's earlier stages too."""
    convs: int | None = None
    """Of fcn: how many convolutions."""
    concat: bool | None = None
    """Of fcn: its input once more beside their result."""
    kernel_size: int | None = None
    """Of fcn: of these convolutions."""
    neck_channels: int | None = None
    """Of semantic_fpn: of the neck."""
    neck_norm: bool | None = None
    """Of semantic_fpn: batch norm in the neck, as in sssegmentation."""
    align_corners: bool | None = None
    """How logits are resized."""
    dropout: float | None = None
    """Before the classifier."""
    auxiliary_channels: int | None = None
    """Of the auxiliary head; 0: none."""
    auxiliary_weight: float | None = None
    """Of the auxiliary loss."""
    presence_weight: float | None = None
    """Of encnet: of the loss on which classes are in an image."""

    def __post_init__(self):
        _settle(self)
        if bool(self.backbone_weights) + bool(self.init) + self.from_scratch > 1:
            raise ValueError("backbone_weights, init, from_scratch: expected one of them at most")
        _check(self, *COUNT, "width", "stem_width", "channels", "codes", "kernel_size", "neck_channels")
        _check(self, *NOT_NEGATIVE, "convs", "auxiliary_channels", "auxiliary_weight", "presence_weight")
        _check(self, *PART, "dropout")

    @classmethod
    def of(cls, architecture: dict, **start) -> "Model":
        """A model's architecture, as its file has it, and what it starts from."""
        elsewhere = {"num_classes", "reduction"}  # of the data, and of the optimisation
        return cls(**{name: value for name, value in architecture.items() if name not in elsewhere}, **start)

    def options(self) -> dict:
        """What `apcnet.create` is to be told beside names and weights."""
        others = {"model", "backbone", "backbone_weights", "from_scratch", "init"}
        return {name: value for name, value in _fields(self) if value is not None and name not in others}


@dataclass(frozen=True)
class Data:
    """The images and what is done to them. Scales are two bounds, (long, short), that an image is fitted into."""

    dataset: Literal["synthetic", "cityscapes", "ade20k", "voc2012", "pascal_context", "folder"] = "synthetic"
    """Its name; folder: your own."""
    root: Path | None = None
    """The folder that holds it; none for synthetic."""
    split: str = "train"
    """What is trained on."""
    val_split: str = "val"
    """What is evaluated on."""
    classes: Literal[59, 60] | None = None
    """Of pascal_context: without or with a class for the background."""
    labels: dict[int, int] | None = None
    """Of folder: what the values in masks stand for, 0 0 255 1 for masks of 0 and 255."""
    family: Literal["whole", "regional"] = "whole"
    """Of synthetic: what decides about a texture's class, the picture's border or the region's."""
    size: Pair = (96, 96)
    """Of synthetic: height and width of the scenes."""
    crop: Pair = (96, 96)
    """Height and width of what is trained on."""
    scale: Pair = (96, 96)
    """Bounds for training images before the random ratio."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """The random ratio is drawn from here."""
    cat_max_ratio: float = 0.75
    """Share of a crop that no class may fill, if another crop has less."""
    antialias: bool = False
    """Smooth images that shrink; mmsegmentation does not."""

    def __post_init__(self):
        _settle(self)
        _check(self, *SIDES, "size", "crop", "scale")
        _check(self, "two positive numbers, the smaller first", lambda r: 0 < r[0] <= r[1] < math.inf, "ratio")
        _check(self, "a share above 0, up to 1", lambda share: 0 < share <= 1, "cat_max_ratio")
        for name, owner in (("classes", "pascal_context"), ("labels", "folder")):
            if getattr(self, name) is not None and self.dataset != owner:
                raise ValueError(f"{name}: expected with {owner} alone, got {getattr(self, name)} with {self.dataset}")

    def open_options(self) -> dict:
        """What `apcnet.data.open` is to be told beside name, root and split."""
        if self.dataset == "synthetic":
            return {"family": self.family, "size": self.size}
        given = {"classes": self.classes, "labels": self.labels}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Optimisation:
    """Stochastic gradient descent under a polynomial schedule, and the losses it descends."""

    lr: float = 0.01
    """Learning rate at the first step."""
    min_lr: float = 1e-4
    """Learning rate after the last step."""
    power: float = 0.9
    """Of the polynomial between them."""
    momentum: float = 0.9
    """Of the gradients."""
    weight_decay: float = 5e-4
    """Of every parameter, those of batch norms too."""
    head_lr: float = 1.0
    """Factor on the learning rate of everything but the backbone."""
    clip: float | None = None
    """Largest norm of all gradients together."""
    accumulate: int = 1
    """Parts a process takes its share of a batch in, one after the other, to save memory."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then what is evaluated and kept; 0: none."""
    reduction: Literal["mean_all", "mean"] = "mean_all"
    """Of the cross entropy: over all pixels, as mmsegmentation, or over those that are not ignored."""
    label_smoothing: float = 0.0
    """Of the cross entropy."""
    class_weights: Path | None = None
    """The JSON file that `apcnet check --json` wrote: its class weights are used."""

    def __post_init__(self):
        _settle(self)
        _check(self, *POSITIVE, "lr", "head_lr", "clip")
        _check(self, f"0 up to lr, {self.lr}", lambda rate: 0 <= rate <= self.lr, "min_lr")
        _check(self, *NOT_NEGATIVE, "power", "weight_decay")
        _check(self, *PART, "momentum", "ema", "label_smoothing")
        _check(self, *COUNT, "accumulate")


@dataclass(frozen=True)
class Protocol:
    """How a model is tested."""

    test_scale: Pair | None = None
    """Bounds (long, short) that a test image is fitted into; none: as large as it is."""
    window: Pair | None = None
    """Height and width of a sliding window; none: images as a whole."""
    stride: Pair | None = None
    """From one window to the next."""
    ratios: tuple[float, ...] = (1.0,)
    """Of the scales whose probabilities are averaged; 0.5 0.75 1 1.25 1.5 1.75 is the published multi-scale test."""
    flip: bool = False
    """Average with the mirrored image."""
    single_resize: bool = False
    """Straight from the logits to the image's size: faster, 0.2 % of the labels differ from mmsegmentation's."""

    def __post_init__(self):
        _settle(self)
        _check(self, *SIDES, "test_scale", "window", "stride")
        _check(self, "positive numbers, at least one", lambda r: r and all(0 < x < math.inf for x in r), "ratios")
        if (self.window is None) != (self.stride is None):
            raise ValueError(f"window, stride: expected both or neither, got {self.window} and {self.stride}")
        if self.window and (self.stride[0] > self.window[0] or self.stride[1] > self.window[1]):
            raise ValueError(f"stride: expected at most the window, {self.window}, got {self.stride}")
        if self.single_resize and (self.window or self.averages):
            raise ValueError(
                "single_resize: windows, and what is averaged over ratios and flip, are resized twice; leave out one"
            )

    @property
    def averages(self) -> bool:
        """Whether probabilities of several passes are averaged; of one pass the largest logit is the label."""
        return self.flip or len(self.ratios) > 1


@dataclass(frozen=True)
class Config:
    """A run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimisation: Optimisation = field(default_factory=Optimisation)
    evaluation: Protocol = field(default_factory=Protocol)
    steps: int = 1500
    """Steps of the optimizer."""
    batch_size: int = 8
    """Images a step, all processes together."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    eval_every: int = 150
    """Steps from one evaluation, with its pictures, to the next; the last step is always evaluated."""
    save_every: int = 150
    """Steps from one checkpoint to the next."""
    precision: Precision = "float32"
    """Of the matrix products (autocast)."""
    channels_last: bool = False
    """Keep maps position by position: faster on GPUs."""
    compile: bool = False
    """Let torch.compile work on the model first."""
    deterministic: bool = True
    """The same bits from run to run on a GPU too, where PyTorch has them."""

    def __post_init__(self):
        _settle(self)
        _check(self, *COUNT, "steps", "batch_size", "eval_every", "save_every")

    def to_json(self) -> dict:
        """As plain lists, strings and numbers."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, given: dict) -> "Config":
        """What to_json gave. A field that there is not is an error, one that is missing has its default."""
        return _read(cls, given, "config")


def differences(one: Config, other: Config) -> list[str]:
    """A line for each field in which two configs differ: 'lr: 0.01 → 0.02'."""
    pairs = zip(_fields(one), _fields(other), strict=True)
    return [f"{name}: {was} → {now}" for (name, was), (_, now) in pairs if was != now]


def _fields(section) -> Iterator[tuple[str, object]]:
    for name, value in vars(section).items():
        yield from _fields(value) if dataclasses.is_dataclass(value) else [(name, value)]


def _settle(section) -> None:
    """Gives every field the type that it is declared with: JSON's and a user's own lists, integers and strings, too."""
    for name, kind in typing.get_type_hints(type(section)).items():
        object.__setattr__(section, name, _read(kind, getattr(section, name), name))


def _check(section, expected: str, is_allowed: Callable, *names: str) -> None:
    """A ValueError for the first of these fields that is given and is not allowed."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not is_allowed(value):
            raise ValueError(f"{name}: expected {expected}, got {value}")


def _read(kind, given, name: str):
    """A value of a type from what stands for it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(given, dict):
        for key in given:
            check_choice(key, f"field of {name}", typing.get_type_hints(kind))
        return kind(**given)
    if origin in (typing.Union, types.UnionType):  # X | None is all there is
        return None if given is None else _read(next(a for a in arguments if a is not type(None)), given, name)
    if origin is Literal:
        check_choice(str(_read(type(arguments[0]), given, name)), name, map(str, arguments))
        return given
    if origin is tuple and isinstance(given, (list, tuple)):
        if arguments[-1] is not ... and len(given) != len(arguments):
            raise ValueError(f"{name}: expected {len(arguments)} numbers, got {list(given)}")
        return tuple(_read(arguments[0], item, name) for item in given)  # those of a tuple are all of one type
    if origin is dict and isinstance(given, dict):
        pairs = ((int(key) if str(key).isdecimal() else key, item) for key, item in given.items())  # JSON's are strings
        return {_read(arguments[0], key, name): _read(arguments[1], item, name) for key, item in pairs}
    if kind is float and type(given) is int:
        return float(given)
    if kind is Path and isinstance(given, (str, Path)):
        return Path(given)
    if kind is int and not isinstance(given, bool) and hasattr(given, "__index__"):  # NumPy's, too
        return operator.index(given)
    if type(given) is not kind:
        raise TypeError(f"{name}: expected {kind if origin else kind.__name__}, got {given!r}")
    return given
