"""Predicts the labels of images of any kind and size: `predict` takes images, `predict_files` whole folders.

The network sees an image at its own size, or resized to fit a scale. A larger image is cut into overlapping tiles whose
scores are averaged band by band, so its memory grows by no more than its pixels.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from apc_kernels import upsample_argmax
from apcnet import draw, inference
from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.data.augment import view, view_sizes
from apcnet.data.files import checked_form, levels_of, read_as, read_image
from apcnet.data.layout import SUFFIXES
from apcnet.data.levels import visible
from apcnet.inference.protocol import WHOLE, winning
from apcnet.models.segmentor import Segmentor, count_labels
from apcnet.zoo import load

MAX_PIXELS = 2_200_000  # Cityscapes' 2049×1025 are still one piece: about 1.5 GiB with a ResNet-50 in float32
BAND_SCORES = 1 << 28  # of a band of tiles, classes × rows × columns: 1 GiB, and as much again while they are added up
WORTH_PREPARING = 4  # images, see inference.prepare
MIN_TILE_ROWS = 256  # a tile has fewer rows than columns if bands would be larger than that, but at least these

Source = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """Holds the labels that a model predicts for an image.

    Attributes:
        labels: Class indices (H, W), on the CPU.
        image: The image (3, H, W), uint8.
        classes: Names of the classes.
        palette: RGB colours of the classes.
        confidence: Probability (H, W) of each pixel's label, on the CPU; None unless it was asked for.

    Example:
        >>> seen = apcnet.predict(model, "photo.jpg")
        >>> seen.overlay().save("overlay.png")
    """

    labels: Tensor
    image: Tensor
    classes: tuple[str, ...]
    palette: tuple[draw.Color, ...]
    confidence: Tensor | None = None

    def colours(self) -> Image.Image:
        """Draws the labels in the colours of their classes."""
        return draw.colourise(self.labels, self.palette)

    def overlay(self, opacity: float = 0.5, legend: bool = True) -> Image.Image:
        """Draws the labels' colours over the image, with a legend below it; the background stays clear."""
        clear = draw.backgrounds(self.classes, self.palette)
        picture = draw.overlay(self.image, self.labels, self.palette, opacity, clear)
        return draw.with_legend(picture, self.labels, self.classes, self.palette, clear) if legend else picture

    def shares(self) -> dict[str, float]:
        """Returns the share of pixels of each class that occurs, in descending order."""
        counts = torch.bincount(self.labels.flatten().long()).tolist()
        present = sorted(filter(counts.__getitem__, range(len(counts))), key=lambda label: -counts[label])
        return {self.classes[label]: counts[label] / self.labels.numel() for label in present}

    def indices(self) -> Image.Image:
        """Returns the labels as a picture: palette indices, or 16-bit grey levels for more than 256 classes."""
        if self.labels.dtype != torch.uint8:
            return Image.fromarray(self.labels.numpy().astype(np.uint16))
        picture = Image.fromarray(self.labels.numpy())
        picture.putpalette(np.array(self.palette, np.uint8).tobytes())
        return picture

    def save(self, path: str | Path) -> None:
        """Writes the labels to a PNG, as `indices` returns them."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"path: expected NAME.png, which keeps labels as they are, got {path}")
        draw.save(self.indices(), path)

    def save_confidence(self, path: str | Path) -> None:
        """Writes the confidence to a PNG or JPEG: grey levels, black for 0 and white for 1."""
        if self.confidence is None:
            raise ValueError("confidence: expected a prediction of predict(…, confidence=True), got one without")
        draw.save(Image.fromarray((self.confidence * 255).round().to(torch.uint8).numpy()), path)


class Job(NamedTuple):
    """Holds an image to predict, and the files to write; None for those that were not asked for."""

    source: Path
    labels: Path
    overlay: Path | None
    confidence: Path | None


class Report(NamedTuple):
    """Holds the number of images that predict_files has finished, and an error for each failed image."""

    done: int
    failures: list[str]


@overload
def predict(
    model: Segmentor | str | Path,
    images: str | Path | Image.Image,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> Prediction: ...
@overload
def predict(
    model: Segmentor | str | Path,
    images: Sequence[Source],
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> list[Prediction]: ...
@overload
def predict(  # a batch, (B, H, W, 3) or (B, 3, H, W), gives a list
    model: Segmentor | str | Path,
    images: np.ndarray | Tensor,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> Prediction | list[Prediction]: ...
def predict(
    model: Segmentor | str | Path,
    images: Source | Sequence[Source],
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> Prediction | list[Prediction]:
    """Predicts the class of every pixel of one or several images, at the size of each image.

    Args:
        model: A model of `apcnet.create` or `apcnet.load` on any device, or the path of its file. Its mode is restored
            afterwards.
        images: A path; a PIL image of any mode, rotated by its EXIF orientation like a file; an array (H, W, 3) or a
            tensor (3, H, W) of RGB levels, or grey levels (H, W), uint8; or a list, tuple or batch of these, of any
            sizes. A model of other images takes their levels: (H, W, C), (C, H, W) or (H, W), of any type. For
            normalised images in floating point, use `apcnet.inference.labels`.
        protocol: Scales, windows and flips. The protocol of the model's evaluation gives the best labels.
        max_pixels: Largest number of pixels that the network sees at once. A larger view is cut into tiles unless the
            protocol has a window. A pixel costs about 0.7 KiB with a ResNet-50 in float32. If only the image is
            larger than this, probabilities are averaged at the largest view's size and then enlarged.
        precision: Precision of the matrix products: "float32", "bfloat16" or "float16" (autocast).
        confidence: Also compute the probability of every pixel's label.

    Returns:
        One Prediction for one image; a list of them for a list, a tuple or a batch.

    Example:
        >>> seen = predict(apcnet.load("model.safetensors"), "photo.jpg")
        >>> seen.save("labels.png")
    """
    several = isinstance(images, list | tuple) and len(images) >= WORTH_PREPARING
    with _prepared(model, max_pixels, precision, several) as prepared:
        if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4):
            return [
                _predict(prepared, image, f"images[{i}]", protocol, max_pixels, confidence)
                for i, image in enumerate(images)
            ]
        return _predict(prepared, images, "images", protocol, max_pixels, confidence)


def predict_files(
    model: Segmentor | str | Path,
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    overlay: Literal["jpg", "png"] | None = "jpg",
    opacity: float = 0.5,
    confidence: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Predicts files and all images in folders, and continues after images that cannot be read.

    For photos/street/a.jpg in the source photos, it writes the labels to out/street/a.png and the overlay to
    out/street/a_overlay.jpg. Two images that differ only in their suffix keep it: a.jpg.png. If no font has the letters
    of some classes, overlays show their numbers, and out/legend.txt lists the names.

    Args:
        model, protocol, max_pixels, precision: As in `predict`.
        sources: Files and folders. Hidden files, and `out` inside a source, are skipped.
        out: Output folder, created when needed. Files of an earlier run are replaced; source images never are.
        overlay: Suffix of the overlays; None writes labels only.
        opacity: Opacity of the colours in overlays.
        confidence: Also write the probability of every pixel's label, as grey levels to out/street/a_confidence.png.
        progress: Called with the number of finished images and the total.

    Returns:
        The number of finished images, and an error for each failed one.
    """
    if overlay is not None:
        check_choice(overlay, "overlay", ("jpg", "png"))
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    failures = []
    jobs = _jobs([sources] if isinstance(sources, (str, Path)) else sources, Path(out), overlay, confidence)
    with _prepared(model, max_pixels, precision, several=True) as prepared:
        for done, job in enumerate(jobs, 1):
            try:
                prediction = _predict(prepared, job.source, str(job.source), protocol, max_pixels, confidence)
            except (ValueError, OSError) as error:  # of this image: the options are checked, and nothing is written yet
                failures.append(str(error))
            else:
                job.labels.parent.mkdir(parents=True, exist_ok=True)
                prediction.save(job.labels)
                if job.overlay is not None:
                    draw.save(prediction.overlay(opacity), job.overlay)
                    draw.save_names(Path(out), prediction.classes)
                if job.confidence is not None:
                    prediction.save_confidence(job.confidence)
            if progress is not None:
                progress(done, len(jobs))
    return Report(len(jobs) - len(failures), failures)


@contextmanager
def _prepared(
    model: Segmentor | str | Path, max_pixels: int, precision: Precision, several: bool
) -> Iterator[Segmentor]:
    """Loads the model if needed, and puts it in evaluation mode and the given precision until the end.

    For several images in float32 on a CPU it takes a copy that is laid out for speed, which costs as much as an image.
    """
    if not isinstance(max_pixels, int) or max_pixels < 1:
        raise ValueError(f"max_pixels: expected a positive integer, got {max_pixels!r}")
    model = load(model) if isinstance(model, (str, Path)) else model
    for name in ("mean", "std", "num_classes", "align_corners"):
        if not isinstance(model, nn.Module) or not hasattr(model, name):
            raise TypeError(
                f"model: expected one of apcnet.create or apcnet.load, or its file, got {type(model).__name__}"
            )
    with inference.in_evaluation(model, precision):
        yield inference.prepare(model) if several and precision == "float32" else model


def _predict(
    model: Segmentor, image: object, name: str, protocol: Protocol, max_pixels: int, confidence: bool
) -> Prediction:
    ranges = getattr(model, "range", None)
    is_rgb = ranges is None and len(model.mean) == 3
    levels = _levels(image, name) if is_rgb else _many_levels(image, name, len(model.mean))
    try:
        labels, sure = _labels(model, levels, protocol, max_pixels, confidence)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    classes = getattr(model, "classes", None) or tuple(f"class {i}" for i in range(count_labels(model)))
    colors = getattr(model, "palette", None) or draw.palette(count_labels(model))
    shown = visible(levels, ranges)
    colors = tuple((red, green, blue) for red, green, blue in colors)
    return Prediction(labels.cpu(), shown, tuple(classes), colors, None if sure is None else sure.cpu())


def _labels(
    model: Segmentor, image: Tensor, protocol: Protocol, max_pixels: int, confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """Predicts the labels (H, W) of an image (3, H, W) uint8, and on request the probability of each."""
    size = image.shape[1], image.shape[2]
    sizes = view_sizes(size, protocol.ratios, protocol.test_scale)
    largest = max(sizes, key=math.prod)
    if protocol.window is None and math.prod(largest) > max_pixels:
        return _tiled_labels(model, image, sizes, protocol, max_pixels, confidence)
    views = _views(model, image, sizes)
    if protocol.averages and math.prod(size) > max_pixels:
        averaged = min(size, largest, key=math.prod)
        shares = inference.probabilities(model, views, protocol, size=averaged)
        labels = upsample_argmax(shares, size)
        return labels[0], winning(shares, labels, False, True)[0] if confidence else None
    if confidence:
        labels, sure = inference.confidence(model, views, protocol, size=size)
        return labels[0], sure[0]
    return inference.labels(model, views, protocol, size=size)[0], None


def _tiled_labels(
    model: Segmentor,
    image: Tensor,
    sizes: Sequence[tuple[int, int]],
    protocol: Protocol,
    max_pixels: int,
    confidence: bool,
) -> tuple[Tensor, Tensor | None]:
    """Predicts the labels of an image that is too large at these sizes, from tiles that overlap by a third."""
    size = image.shape[1:]
    shrinks = math.prod(size) / max(map(math.prod, sizes))
    width = max(1, math.isqrt(int(max_pixels * shrinks)))
    height = min(width, max(MIN_TILE_ROWS, BAND_SCORES // (model.num_classes * size[1])))
    tiles = _Tiles(model, [max(view) / max(size) for view in sizes], protocol, image.dtype)
    levels = image[None].half() if image.dtype == torch.uint8 else image[None]  # float16 holds all 256 levels
    stride = max(1, 2 * height // 3), max(1, 2 * width // 3)
    windows = Protocol(window=(height, width), stride=stride)
    if confidence:
        labels, sure = inference.confidence(tiles, levels, windows)
        return labels[0], sure[0]
    return inference.labels(tiles, levels, windows)[0], None


class _Tiles:
    """Acts as a model for inference.labels: maps the levels of a tile to its scores, over all scales.

    A tile is resized by the factors of the whole image.
    """

    def __init__(self, model: Segmentor, factors: Sequence[float], protocol: Protocol, dtype: torch.dtype):
        self.model, self.factors, self.protocol, self.dtype = model, factors, protocol, dtype
        self.align_corners = model.align_corners
        self.gives_probabilities = protocol.averages

    def __call__(self, levels: Tensor) -> Tensor:
        tile, size = levels[0].to(self.dtype), levels.shape[2:]
        views = _views(self.model, tile, [[max(1, round(n * factor)) for n in size] for factor in self.factors])
        if self.protocol.averages:
            return inference.probabilities(self.model, views, self.protocol, size=size)
        (view,) = views
        return self.model(view) if self.protocol.single_resize else inference.whole_logits(self.model, view)


def _views(model: Segmentor, image: Tensor, sizes: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Yields an image (C, H, W), normalised for the network, at one size after the other."""
    for size in sizes:
        parameter = next(model.parameters(), torch.empty(0))
        yield view(image, size, model.mean, model.std)[None].to(parameter)  # its device and dtype


def _levels(image: object, name: str) -> Tensor:
    """Converts an image of any supported type to levels (3, H, W) uint8 on the CPU."""
    if isinstance(image, (str, Path)):
        if form := checked_form(image):
            if form.channels not in (1, 3) or form.kind != "uint16":
                raise ValueError(f"{image}: expected 8-bit RGB, as the model was trained with, got {form}")
            warnings.warn(
                f"{image}: of 16 bits the upper 8 are used, because the model was trained with 8-bit RGB", stacklevel=2
            )
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            return levels_of(ImageOps.exif_transpose(image))  # a copy: the image stays as it is
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if isinstance(image, np.ndarray):
        planes = torch.from_numpy(np.array(image.transpose(2, 0, 1) if image.ndim == 3 else image))
        shape = "(H, W, 3) or (H, W)"
    elif isinstance(image, Tensor):
        planes, shape = image.detach().cpu(), "(3, H, W) or (H, W)"
    else:
        raise TypeError(
            f"{name}: expected a path, a PIL image, an array, a tensor or several of these, got {type(image).__name__}"
        )
    if planes.dtype != torch.uint8:
        hint = "; what is normalised already goes to apcnet.inference.labels" if planes.is_floating_point() else ""
        raise TypeError(f"{name}: expected levels of 0 to 255 as uint8, got {image.dtype}{hint}")
    if not planes.numel() or not (planes.ndim == 2 or (planes.ndim == 3 and len(planes) == 3)):
        raise ValueError(f"{name}: expected the shape {shape} without zeros, got {tuple(image.shape)}")
    return planes.expand(3, *planes.shape[-2:]).clone(memory_format=torch.contiguous_format)


def _many_levels(image: object, name: str, channels: int) -> Tensor:
    """Converts an image to levels (C, H, W) float32, for a model that was trained with such."""
    expected = f"{channels} channel{'s' * (channels > 1)}, as the model was trained with"
    if isinstance(image, (str, Path)):
        form = checked_form(image)
        if form is None:
            raise ValueError(f"{image}: expected {expected}, got 8-bit RGB")
        levels = read_as(image, form)
    elif isinstance(image, Tensor):
        levels = image.detach().cpu().float()
    else:
        planes = np.asarray(image)
        levels = torch.from_numpy((planes.transpose(2, 0, 1) if planes.ndim == 3 else planes).astype(np.float32))
    levels = levels[None] if levels.ndim == 2 else levels
    if levels.ndim != 3 or len(levels) != channels or not levels.numel():
        raise ValueError(f"{name}: expected {expected}, got {len(levels)} in the shape {tuple(levels.shape)}")
    return levels


def _jobs(sources: Iterable[str | Path], out: Path, overlay: str | None, confidence: bool) -> list[Job]:
    """Lists images with the files to write; refuses a file that is written twice or is a source."""
    found = {}  # where in out what comes of an image lies, by its path
    for source in map(Path, sources):
        if source.is_dir():
            below = _images_below(source, out)
            if not below:
                raise FileNotFoundError(f"{source}: expected images in this folder, found none ({', '.join(SUFFIXES)})")
            found |= {path: path.relative_to(source) for path in below}
        elif source.exists():
            found[source] = Path(source.name)
        else:
            raise FileNotFoundError(f"{source}: there is no such file or folder")
    if not found:
        raise FileNotFoundError("sources: expected files or folders, got none")
    alike = Counter(place.with_suffix("") for place in found.values())
    images, written, jobs = set(map(os.path.realpath, found)), {}, []  # realpath takes a link to itself as it is
    for source, place in found.items():
        name = place.name if alike[place.with_suffix("")] > 1 else place.stem
        ends = (".png", f"_overlay.{overlay}", "_confidence.png")
        labels, over, sure = (out / place.with_name(name + end) for end in ends)
        jobs.append(Job(source, labels, over if overlay else None, sure if confidence else None))
        for path in filter(None, jobs[-1][1:]):
            if os.path.realpath(path) in images:
                raise ValueError(f"out: {path} is one of the images that are read; choose another folder")
            if path in written:
                raise ValueError(f"{written[path]} and {source}: both would be written to {path}")
            written[path] = source
    return jobs


def _images_below(folder: Path, out: Path) -> list[Path]:
    """Lists the images in a folder and its subfolders, except `out`, hidden files and links to folders."""
    found, kept = [], os.path.realpath(out)
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(place, name)) != kept
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)
