"""Implements `timm:NAME`: any model of timm that gives feature maps, as a backbone of four maps."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.choices import check_choice
from apcnet.models import windows
from apcnet.models.pyramid import MAPS, SimplePyramid
from apcnet.models.weights import assign, listed

OLDEST = 1, 0, 31  # older versions build no models on the meta device, or have no Swin for any size
# Options by which models of timm take images of any size. Models that need none know neither.
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})
REFUSALS = (TypeError, AssertionError, NotImplementedError, ValueError)  # what timm raises for such an option


class TimmEncoder(nn.Module):
    """Computes four feature maps from images with an encoder of timm.

    An encoder that has four or more maps gives the last four. Others give the last map of every stride: one, after the
    final norm, for a plain vision transformer. A pyramid then makes the maps that are missing; without one, the first
    map is repeated, for heads that read the last map only.

    Args:
        name: Name of the model in timm, with or without the tag of its weights.
        pyramid: Make the missing maps by a `SimplePyramid`.
        output_stride: Largest stride of the encoder's maps, in pixels of the image. The default is its own.
        in_channels: Number of channels of the images.
        image_size: Height and width of all images, for encoders that take images of one size. The default is the size
            in pretraining.

    Attributes:
        channels: Numbers of channels of the four maps.
        strides: Strides of the four maps, in pixels of the image.
        mean, std: RGB values, 0–255, by which timm normalises images for this model.
    """

    def __init__(
        self,
        name: str,
        pyramid: bool = False,
        *,
        output_stride: int | None = None,
        in_channels: int = 3,
        image_size: Sequence[int] | None = None,
    ):
        super().__init__()
        check_choice(name.partition(".")[0], "backbone: timm", package().list_models())
        self.name, self.in_channels = name, in_channels
        self.options = _options(name, output_stride, in_channels, image_size)
        self.body = _create(name, self.options)
        self.mean, self.std = (_pixels(self.body.pretrained_cfg[key]) for key in ("mean", "std"))
        self.channels, self.strides = self.body.feature_info.channels(), self.body.feature_info.reduction()
        self.multiple, self.image_size = self._sizes(image_size)
        self.repeated = MAPS - len(self.channels)
        self.pyramid = SimplePyramid(self.channels, self.strides) if pyramid and self.repeated else None
        if self.pyramid is not None:
            self.repeated, self.channels, self.strides = 0, self.pyramid.channels, self.pyramid.strides
        self.channels, self.strides = self._repeat(self.channels), self._repeat(self.strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        if self.image_size and (height, width) != self.image_size:
            only = "×".join(map(str, self.image_size))
            raise ValueError(
                f"images: expected {only} pixels, the one size for timm:{self.name}, got {height}×{width}; create "
                "the model with another image_size, or predict in windows"
            )
        if self.multiple > 1:
            down, right = (_ceil(side, self.multiple) * self.multiple - side for side in (height, width))
            images = F.pad(images, (0, right, 0, down))
        with windows.exportable() if torch.compiler.is_exporting() else nullcontext():
            maps = self.body(images)
        if getattr(self.body, "output_fmt", None) == "NHWC":
            maps = [x.permute(0, 3, 1, 2) for x in maps]  # channels_last, without a copy
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        if self.multiple > 1:  # a map of stride s is as large as a convolution of stride s would make it
            strides = self.strides[self.repeated :]
            maps = [_cropped(x, height, width, stride) for x, stride in zip(maps, strides, strict=True)]
        return self._repeat(maps)

    @property
    def any_size_exports(self) -> bool:
        """Tells whether an exported graph can take images of other sizes."""
        return not self.image_size and windows.are_exportable(self.body)

    def load_pretrained(self, tag: str = "", tensors: Mapping[str, Tensor] | None = None) -> None:
        """Loads pretrained weights as timm does, which adapts the stem to the channels and positions to the size.

        Args:
            tag: Name of weights in timm, such as "convnext_tiny.fb_in22k". The default is the encoder's name.
            tensors: Weights by the names of timm's classifier, to load in place of timm's own.
        """
        tag = tag or self.name
        source = {} if tensors is None else {"pretrained_cfg_overlay": {"state_dict": dict(tensors)}}
        with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads others
            loaded, again = (_create(tag, self.options, pretrained=True, **source).state_dict() for _ in range(2))
        # timm passes over weights that are missing. Those differ from one draw to the next.
        missing = [name for name, tensor in loaded.items() if not torch.equal(tensor, again[name])]
        if missing:
            raise ValueError(
                f"backbone_weights: expected weights of timm:{tag}, got others; missing: {listed(missing)}"
            )
        assign(self.body.state_dict(), loaded, f"backbone_weights: timm:{tag}")

    def depths(self) -> dict[str, int]:
        """Returns for each parameter the number of layers from it to the head, as timm counts layers."""
        model, names = self._classifier()
        if not hasattr(model, "group_matcher"):
            raise ValueError(f"layer_decay: expected 1 for timm:{self.name}, whose layers timm does not tell")
        layers = package().models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        last = max(layers.values())  # the classifier's, where the head is
        return {own: last - layers[name] for own, name in names.items()}

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that timm exempts from weight decay, such as positions."""
        model, names = self._classifier()
        patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        return {own for own, name in names.items() if any(fnmatch(name, pattern) for pattern in patterns)}

    def _classifier(self) -> tuple[nn.Module, dict[str, str]]:
        """Returns timm's classifier, without weights, and its names of our parameters; the encoder's are changed."""
        options = {key: value for key, value in self.options.items() if key not in ("out_indices", "feature_cls")}
        with torch.device("meta"):
            model = package().create_model(self.name, num_classes=2, **options)
        theirs = {name for name, _ in model.named_parameters()}
        known = {changed: n for n in theirs for changed in (n, f"model.{n}", f"body.{n}", n.replace(".", "_", 1))}
        return model, {f"body.{name}": known[name] for name, _ in self.body.named_parameters()}

    def _sizes(self, image_size: Sequence[int] | None) -> tuple[int, tuple[int, int] | None]:
        """Returns the number that sides of images are padded to a multiple of, and the one size of images, or None.

        timm does not tell which sizes a model takes: it is run on some.
        """
        first, last = self.strides[0], self.strides[-1]
        multiples = {1, first, last}
        if len(self.strides) == 1:
            multiples = {last}  # a plain transformer needs whole patches; some compute nonsense without
        elif windows.have_windows(self.body):
            multiples = {1, last}  # maps can then be merged at every size, which an exported graph has to know
        for multiple in sorted(multiples):
            if self._refusal((3 * last + multiple, 4 * last + multiple)) is None:
                return multiple, None
        size = tuple(image_size or self.body.pretrained_cfg["input_size"][1:])
        if refusal := self._refusal(size):
            raise ValueError(f"image_size: expected a size that timm:{self.name} takes, got {size}: {refusal}")
        return 1, size

    def _refusal(self, size: Sequence[int]) -> Exception | None:
        """Returns the error that the encoder raises for images of a size, or None."""
        images = next(self.parameters()).new_zeros(1, self.in_channels, *size)
        try:
            with torch.no_grad():
                self.eval().body(images)
        except (*REFUSALS, RuntimeError) as error:
            return error
        finally:
            self.train()
        return None

    def _repeat(self, items: list) -> list:
        return [items[0]] * self.repeated + items


def package() -> Any:
    """Imports timm, or raises an error that tells how to install it."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"backbone: timm:NAME needs the package timm, which cannot be imported ({error}); install it: "
            "pip install 'apc_kernels[timm]'"
        ) from None
    if tuple(map(int, timm.__version__.split(".")[:3])) < OLDEST:
        raise ModuleNotFoundError(
            f"backbone: timm:NAME needs timm {'.'.join(map(str, OLDEST))} or newer, found {timm.__version__}; upgrade "
            "it: pip install -U timm"
        )
    return timm


def _options(
    name: str, output_stride: int | None, in_channels: int, image_size: Sequence[int] | None
) -> dict[str, Any]:
    """Returns the options of timm for this encoder; models without weights, on the meta device, show what it takes."""
    options: dict[str, Any] = {"in_chans": in_channels}
    with torch.device("meta"):
        if image_size is not None:
            options["img_size"] = tuple(image_size)
            if not _takes(name, options):
                raise ValueError(f"image_size: expected none for timm:{name}, got {tuple(image_size)}")
        else:
            options |= next((extra for extra in ANY_SIZE if _takes(name, options | extra)), {})
        body = _create(name, options)
        own = body.feature_info.reduction()[-1]
        if output_stride is not None and output_stride < own:
            options["output_stride"] = output_stride
            dilated = _takes(name, options) and _create(name, options).feature_info.reduction()[-1] == output_stride
            if not dilated:
                raise ValueError(
                    f"output_stride: expected {own}, as timm:{name} does not take {output_stride}, got {output_stride}"
                )
            body = _create(name, options)
    indices = _last_maps(body.feature_info)
    if len(indices) == 1 and hasattr(body, "norm"):  # timm's FeatureGetterNet can apply the final norm
        options["feature_cls"] = functools.partial(_normalised, type(body))
    return options | {"out_indices": indices}


def _last_maps(info: Any) -> tuple[int, ...]:
    """Returns the positions of the last four maps, or of the last one of every stride if there are fewer."""
    pairs = [(index, stride) for index, stride in zip(info.out_indices, info.reduction(), strict=True) if stride > 2]
    if len(pairs) < MAPS:
        return tuple({stride: index for index, stride in pairs}.values())
    return tuple(index for index, _ in pairs[-MAPS:])


def _cropped(x: Tensor, height: int, width: int, stride: float) -> Tensor:
    """Crops a map to ⌈height / stride⌉ × ⌈width / stride⌉; the stride is an integer, or 3.5 in a pyramid."""
    whole, parts = float(stride).as_integer_ratio()
    return x[:, :, : _ceil(height * parts, whole), : _ceil(width * parts, whole)]


def _ceil(number: int, divisor: int) -> int:
    """Returns ⌈number / divisor⌉. -(-number // divisor) would be wrong in ONNX, which rounds towards 0."""
    return (number + divisor - 1) // divisor


def _pixels(rgb: Sequence[float]) -> tuple[float, ...]:
    """Converts values of 0–1 to 0–255; without rounding, timm's 0.485 would become 123.67499999999998."""
    return tuple(round(255 * value, 6) for value in rgb)


def _normalised(kind: type[nn.Module], model: nn.Module, **options: Any) -> nn.Module:
    return kind(model, **options | {"norm": True, "output_fmt": "NCHW"})


def _takes(name: str, options: Mapping[str, Any]) -> bool:
    try:
        _create(name, options)
    except REFUSALS:
        return False
    return True


def _create(name: str, options: Mapping[str, Any], **more: Any) -> nn.Module:
    return package().create_model(name, features_only=True, **options, **more)
