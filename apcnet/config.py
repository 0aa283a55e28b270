"""Describes a training run: frozen dataclasses that hold every choice the result depends on, and convert to JSON.

Every field is a flag of `apcnet train`, so no two sections share a field name; the string under a field is its help.
The output folder, the number of workers and the logging are not part of a config: they do not change the result.
A config is checked when it is made: every field has its declared type and a value in a sensible range.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from apcnet.choices import check_choice
from apcnet.fields import (
    COUNT,
    FRACTION,
    LARGEST,
    NOT_NEGATIVE,
    POSITIVE,
    SIDES,
    check,
    convert,
    convert_fields,
    fields,
)
from apcnet.terms import SMOOTHED, parse

Pair = tuple[int, int]
Precision = Literal["float32", "bfloat16", "float16"]

RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101))
BACKBONES = (*RESNETS, *(f"tv:{name}" for name in RESNETS), "tiny")


def check_backbone(name: str) -> None:
    """Checks the name of a backbone; timm itself checks the names of its models."""
    if not name.startswith("timm:"):
        check_choice(name, "backbone", (*BACKBONES, "timm:NAME"))


@dataclass(frozen=True)
class Model:
    """Describes the network and its initial weights; None stands for the model's own default."""

    model: Literal["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet", "own"] = "apcnet"
    """Use this head, with its neck if it has one; `own` stands for a module passed to apcnet.train in Python."""
    backbone: str = "resnet50"
    """Extract features with this backbone: resnet18, resnet34, resnet50, resnet101, tiny, tv:resnet50 or timm:NAME."""
    backbone_weights: str | None = None
    """Start the backbone from these ImageNet weights: a file, timm, timm:NAME or tv:resnet50."""
    from_scratch: bool = False
    """Train without pretrained backbone weights."""
    init: Path | None = None
    """Start from this model file; its classifiers are replaced if the number of classes differs."""
    output_stride: int | None = None
    """Set the backbone's output stride: image pixels per position of its last feature map."""
    width: int | None = None
    """Give the backbone's first stage this many channels."""
    stem_width: int | None = None
    """Give the backbone's stem this many channels."""
    stem: Literal["deep", "7x7"] | None = None
    """Start a ResNet with three 3×3 convolutions (deep) or, as torchvision does, with one of 7×7."""
    in_channels: int | None = None
    """Read images with this many channels."""
    image_size: Pair | None = None
    """Use images of this height and width only (encoders of timm that take one size)."""
    channels: int | None = None
    """Give the head this many channels."""
    scales: tuple[int, ...] | None = None
    """Pool to square grids with these side lengths (APCNet, PSPNet and UPerNet only)."""
    guide: bool | None = None
    """Guide the affinities by the image's global feature (APCNet only)."""
    fusion: bool | None = None
    """Add a convolution after each context module (APCNet only)."""
    plain: bool | None = None
    """Use the paper's module, without residual and fusion convolutions (APCNet only)."""
    codes: int | None = None
    """Use this many codewords (EncNet only)."""
    presence: bool | None = None
    """Add the branch that predicts which classes are present in an image (EncNet only)."""
    lateral: bool | None = None
    """Use the backbone's earlier stages as well (EncNet only)."""
    convs: int | None = None
    """Use this many convolutions (FCN only)."""
    concat: bool | None = None
    """Concatenate the head's input with the output of its convolutions (FCN only)."""
    kernel_size: int | None = None
    """Set the kernel size of the head's convolutions (FCN only)."""
    neck_channels: int | None = None
    """Give the neck this many channels (Semantic FPN only)."""
    neck_norm: bool | None = None
    """Add batch norm to the neck, as sssegmentation does (Semantic FPN only)."""
    align_corners: bool | None = None
    """Align corners when logits are resized."""
    dropout: float | None = None
    """Set the dropout probability before the classifier."""
    auxiliary_channels: int | None = None
    """Give the auxiliary head this many channels; 0 removes the head."""
    auxiliary_weight: float | None = None
    """Weight the auxiliary loss by this factor."""
    presence_weight: float | None = None
    """Weight the loss of the class-presence branch by this factor (EncNet only)."""

    def __post_init__(self):
        convert_fields(self)
        if bool(self.backbone_weights) + bool(self.init) + self.from_scratch > 1:
            raise ValueError("backbone_weights, init, from_scratch: expected one of them at most")
        check_backbone(self.backbone)
        check(self, *SIDES, "image_size")
        check(self, *COUNT, "width", "stem_width", "in_channels", "channels", "codes", "kernel_size", "neck_channels")
        check(self, *NOT_NEGATIVE, "convs", "auxiliary_channels", "auxiliary_weight", "presence_weight")
        check(self, *FRACTION, "dropout")

    @classmethod
    def of(cls, architecture: dict, **start) -> "Model":
        """Makes the section from a model file's architecture and the fields that choose initial weights."""
        other_sections = {"num_classes", "reduction"}  # the data and the optimisation determine these
        return cls(**{name: value for name, value in architecture.items() if name not in other_sections}, **start)

    def options(self) -> dict:
        """Returns the options of `apcnet.create`, without the names of model, backbone and weights."""
        others = {"model", "backbone", "backbone_weights", "from_scratch", "init"}
        return {name: value for name, value in fields(self) if value is not None and name not in others}


@dataclass(frozen=True)
class Data:
    """Describes the dataset, and the augmentation of its training images."""

    dataset: Literal["synthetic", "cityscapes", "ade20k", "voc2012", "pascal_context", "folder", "shards", "own"] = (
        "synthetic"
    )
    """Use this dataset: `folder` is your own images and masks, `shards` a packed one, `own` an object of Python."""
    root: str | Path | None = None
    """Read the dataset from this folder, or shards from an address such as s3://…; only synthetic needs none."""
    cache: Path | None = None
    """Store what is read in this folder of the machine; by default it is not stored (shards only)."""
    cache_gib: float = 20.0
    """Store up to this many GiB of the dataset (shards only)."""
    split: str = "train"
    """Train on this split."""
    val_split: str = "val"
    """Evaluate on this split."""
    classes: Literal[59, 60] | None = None
    """Use 59 classes, or 60 with the background (pascal_context only)."""
    labels: dict[int, int] | None = None
    """Map values in masks to classes: `0 0 255 1` maps 0 to class 0 and 255 to class 1 (folder only)."""
    family: Literal["whole", "regional"] = "whole"
    """Let the border of the whole picture or of each region decide the class of a texture (synthetic only)."""
    size: Pair = (96, 96)
    """Generate scenes of this height and width (synthetic only)."""
    crop: Pair = (96, 96)
    """Train on crops of this height and width."""
    scale: Pair = (96, 96)
    """Resize training images to fit within this scale (long side, short side), times a random ratio."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Draw the random ratio from this range."""
    cat_max_ratio: float = 0.75
    """Draw another crop if one class fills more than this share of it."""
    antialias: bool = False
    """Apply antialiasing when images are reduced, unlike mmsegmentation."""
    flips: Literal["horizontal", "both", "none"] = "horizontal"
    """Mirror half of the crops horizontally, or half of them vertically too (both), or none."""
    rotate: bool = False
    """Rotate crops by a random multiple of 90°, for images without an upright side, as from the air."""
    distortion: bool = True
    """Distort brightness, contrast, saturation and hue of crops."""
    augmentation: Literal["standard", "none"] = "standard"
    """Augment crops as the other flags say, or not (none): ratio 1, no flips, rotations or distortion."""

    def __post_init__(self):
        convert_fields(self)
        check(self, *SIDES, "size", "crop", "scale")
        check(self, "two positive numbers, the smaller first", lambda r: 0 < r[0] <= r[1] < math.inf, "ratio")
        check(self, "a share above 0, up to 1", lambda share: 0 < share <= 1, "cat_max_ratio")
        check(self, *POSITIVE, "cache_gib")
        for name, owner in (("classes", "pascal_context"), ("labels", "folder"), ("cache", "shards")):
            if getattr(self, name) is not None and self.dataset != owner:
                raise ValueError(f"{name}: expected with {owner} only, got {getattr(self, name)} with {self.dataset}")

    def open_options(self) -> dict:
        """Returns the options of `apcnet.data.open`, without name, root and split."""
        if self.dataset == "synthetic":
            return {"family": self.family, "size": self.size}
        if self.dataset == "shards":
            return {"cache": self.cache, "cache_gib": self.cache_gib}
        given = {"classes": self.classes, "labels": self.labels}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Optimisation:
    """Describes the losses and their minimisation: by default SGD with a polynomial learning rate schedule."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Use this optimizer."""
    schedule: Literal["poly", "cosine", "one_cycle"] = "poly"
    """Move the learning rate along this curve; one_cycle rises for 30 % of the steps, from 1/25 of the rate."""
    lr: float = 0.01
    """Set the largest learning rate."""
    min_lr: float = 1e-4
    """Set the learning rate of the last step."""
    power: float = 0.9
    """Set the exponent of the polynomial schedule."""
    warmup: int = 0
    """Give this many first steps a learning rate that rises linearly; the schedule takes the others."""
    momentum: float = 0.9
    """Set the momentum of SGD, or the first beta of AdamW; its second is 0.999."""
    weight_decay: float = 5e-4
    """Set the weight decay: of all parameters with SGD, without biases, norms and positions with AdamW."""
    head_lr: float = 1.0
    """Multiply the learning rate of all parameters outside the backbone by this factor."""
    lr_factors: dict[str, float] | None = None
    """Multiply learning rates by part: `backbone 0.1 head.classifier 2`; the longest name that fits decides."""
    freeze: tuple[str, ...] = ()
    """Keep the weights and statistics of these parts: `backbone`, or patterns of names such as `*.stem.*`."""
    layer_decay: float = 1.0
    """Multiply the learning rate by this factor for every layer between a parameter and the head (timm only)."""
    clip: float | None = None
    """Clip the total norm of the gradients to this value; by default they are not clipped."""
    accumulate: int = 1
    """Accumulate gradients over this many parts of a batch, which saves memory."""
    ema: float = 0.0
    """Evaluate and save an exponential moving average of the weights with this decay; 0 turns it off."""
    loss: str = "cross_entropy"
    """Minimise this sum: of cross_entropy, focal, ohem, dice, ..., as cross_entropy+0.5*dice (docs/train.md)."""
    focal_gamma: float = 2.0
    """Set the exponent of the focal losses."""
    ohem_threshold: float = 0.7
    """Let ohem keep the pixels whose label has a lower probability than this."""
    ohem_share: float = 0.2
    """Let ohem keep at least this share of the labelled pixels, the hardest ones."""
    reduction: Literal["mean_all", "mean"] = "mean_all"
    """Average the losses of pixels over all of them (mean_all, as mmsegmentation) or over labelled ones (mean)."""
    label_smoothing: float = 0.0
    """Smooth the labels in the cross entropy by this amount."""
    class_weights: Path | None = None
    """Use the class weights in this file, written by `apcnet check --json`."""

    def __post_init__(self):
        convert_fields(self)
        check(self, *POSITIVE, "lr", "head_lr", "clip")
        check(self, "above 0, up to 1", lambda factor: 0 < factor <= 1, "layer_decay")
        check(self, f"0 up to lr, {self.lr}", lambda rate: 0 <= rate <= self.lr, "min_lr")
        check(self, *NOT_NEGATIVE, "power", "warmup")
        check(self, f"0 up to {LARGEST}", lambda decay: 0 <= decay <= LARGEST, "weight_decay")
        if self.warmup and self.schedule == "one_cycle":
            raise ValueError(f"warmup: expected 0 with schedule one_cycle, which has one of its own, got {self.warmup}")
        check(self, *FRACTION, "momentum", "ema", "label_smoothing", "ohem_threshold")
        check(self, "a share above 0, up to 1", lambda share: 0 < share <= 1, "ohem_share")
        check(self, "0 to 1e6", lambda gamma: 0 <= gamma <= 1e6, "focal_gamma")
        names = [term.name for term in parse(self.loss)]
        if self.label_smoothing and not set(names) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing: expected 0 without {' or '.join(SMOOTHED)} in the loss, got {self.loss}"
            )
        check(self, *COUNT, "accumulate")
        allowed = f"names with positive numbers up to {LARGEST}", lambda f: all(0 < x <= LARGEST for x in f.values())
        check(self, *allowed, "lr_factors")
        factor = max(self.head_lr, 1) * max((self.lr_factors or {}).values(), default=1)
        largest = self.lr * max(factor, 1) / (1 - self.momentum)  # AdamW divides its first step by the last
        if largest > LARGEST:
            raise ValueError(
                f"lr: expected lr · head_lr · lr_factors / (1 − momentum) up to {LARGEST}, got {largest:g}"
            )


@dataclass(frozen=True)
class Protocol:
    """Describes how a model sees an image in evaluation and prediction: its scale, windows and averaging.

    Example:
        >>> Protocol(window=(769, 769), stride=(513, 513))  # a sliding window
        >>> Protocol(test_scale=(2048, 512), ratios=(0.75, 1.0, 1.25), flip=True)  # multi-scale testing
    """

    test_scale: Pair | None = None
    """Resize images to fit within this scale (long side, short side); by default they keep their size."""
    window: Pair | None = None
    """Slide a window of this height and width over the image; by default the network sees whole images."""
    stride: Pair | None = None
    """Move the window by this many pixels, vertically and horizontally."""
    ratios: tuple[float, ...] = (1.0,)
    """Average class probabilities over these ratios; the published test takes 0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """Average class probabilities with those of the mirrored image."""
    single_resize: bool = False
    """Resize logits once instead of twice: faster, but 0.2 % of the labels differ from mmsegmentation's."""

    def __post_init__(self):
        convert_fields(self)
        check(self, *SIDES, "test_scale", "window", "stride")
        check(self, "positive numbers, at least one", lambda r: r and all(0 < x < math.inf for x in r), "ratios")
        if (self.window is None) != (self.stride is None):
            raise ValueError(f"window, stride: expected both or neither, got {self.window} and {self.stride}")
        if self.window and self.stride and (self.stride[0] > self.window[0] or self.stride[1] > self.window[1]):
            raise ValueError(f"stride: expected at most the window, {self.window}, got {self.stride}")
        if self.single_resize and (self.window or self.averages):
            raise ValueError(
                "single_resize: expected without window, ratios and flip, which need two resizes; remove one of them"
            )

    @property
    def averages(self) -> bool:
        """Tells whether probabilities of several passes are averaged; with one pass the largest logit wins."""
        return self.flip or len(self.ratios) > 1


@dataclass(frozen=True)
class Config:
    """Describes a training run; `apcnet.presets.preset(name)` returns the config of a published model.

    Example:
        >>> config = Config(data=Data("folder", root="photos"), steps=20_000, batch_size=16)
        >>> apcnet.train(config, out="runs/photos")
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimisation: Optimisation = field(default_factory=Optimisation)
    evaluation: Protocol = field(default_factory=Protocol)
    steps: int = 1500
    """Train for this many optimizer steps."""
    batch_size: int = 8
    """Use this many images per step, over all processes."""
    seed: int = 0
    """Seed the initial weights, the sample order, the augmentation and dropout."""
    eval_every: int = 150
    """Evaluate and save preview pictures every so many steps, and after the last one."""
    save_every: int = 150
    """Save a checkpoint every so many steps."""
    best_by: Literal["miou", "dice", "loss"] = "miou"
    """Choose the best model by this score of an evaluation: the highest mIoU or mean Dice, or the lowest loss."""
    patience: int | None = None
    """Stop early, after this many evaluations in a row that bring no better score; by default take all steps."""
    precision: Precision = "float32"
    """Run matrix products in this precision (autocast)."""
    channels_last: bool = False
    """Store feature maps in channels_last layout, which is faster on GPUs."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = True
    """Use deterministic algorithms on GPUs too, wherever PyTorch has them."""

    def __post_init__(self):
        convert_fields(self)
        check(self, *COUNT, "steps", "batch_size", "eval_every", "save_every", "patience")

    def to_json(self) -> dict:
        """Returns the config as nested dicts of lists, strings and numbers."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, given: dict) -> "Config":
        """Makes a config from the result of `to_json`; unknown fields are errors, missing ones take their defaults."""
        return convert(cls, given, "config")


def differences(one: Config, other: Config) -> list[str]:
    """Lists the fields in which two configs differ, as lines such as 'lr: 0.01 → 0.02'."""
    pairs = zip(fields(one), fields(other), strict=True)
    return [f"{name}: {old} → {new}" for (name, old), (_, new) in pairs if old != new]
