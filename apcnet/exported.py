"""Reads the files of `apcnet.export` as models: .onnx by onnxruntime, .xml by OpenVINO, .pt2 by PyTorch.

`apcnet.load` returns an `Exported`, which `predict` and `evaluate` take like the model that the file came from. The
file runs on the CPU, in float32, with as many threads as PyTorch has while it is loaded.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apcnet.files import printable

OUTPUTS = ("logits", "upsampled", "labels")
PACKAGES = {".onnx": ("onnxruntime", "onnx"), ".xml": ("openvino", "openvino"), ".pt2": ("torch", "")}  # and the extra
TOLERANCE = 0.05  # levels; float32 images are normalised and back within a thousandth of this

Run = Callable[[Tensor], Tensor]


class Opened(NamedTuple):
    """Holds the text under "apcnet" in a file, the shape of its images (None for any number), and what runs them."""

    about: str | None
    shape: tuple[int | None, ...]
    run: Run


class Exported(nn.Module):
    """Runs an exported file as a model, in evaluation only; `apcnet.load` returns one.

    `model(images)` takes normalised images as other models do, even if the file takes uint8 pixels. The results are on
    the device of the images, but the file runs on the CPU.

    Attributes:
        path: The file.
        output: "logits", "upsampled" or "labels": what the file returns.
        takes_pixels: True if the file normalises pixels itself.
        size: Height and width of the only images that the file takes, or None for any.
        num_classes: Number of logits of a pixel.
        align_corners: How logits are resized, as in `torch.nn.functional.interpolate`.
        in_channels: Number of channels of the images.
        classes, palette, mean, std, range: As those of the model that was exported.
    """

    def __init__(self, path: Path, opened: Opened, about: dict):
        super().__init__()
        self.path, self._run = path, opened.run
        self._batch, self.in_channels, height, width = opened.shape
        self.size = None if height is None or width is None else (height, width)
        self.output, self.takes_pixels = about["output"], about["normalise"]
        self.num_classes, self.align_corners = about["num_classes"], about["align_corners"]
        self.classes = self.palette = self.range = None
        self.mean, self.std = (), ()  # apcnet.load sets all five
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # the device that callers expect results on
        super().train(False)

    @property
    def gives_labels(self) -> bool:
        """Tells whether the file returns labels, which can be neither resized nor averaged."""
        return self.output == "labels"

    @property
    def gives_upsampled(self) -> bool:
        """Tells whether the file returns logits at the size of its images, which are resized once already."""
        return self.output == "upsampled"

    def train(self, mode: bool = True) -> "Exported":
        """Raises an error for training: a file has no weights to train."""
        if mode:
            raise ValueError(f"model: expected one that can be trained, got the exported file {self.path}")
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, K, h, w) of normalised images: at the model's resolution, or "upsampled" to theirs."""
        if self.gives_labels:
            raise self.no_logits()
        return self._results(images)

    def labels(self, images: Tensor) -> Tensor:
        """Returns the labels (B, H, W) of normalised images, from a file that gives labels."""
        assert self.gives_labels
        return self._results(images)

    def no_logits(self) -> ValueError:
        """Returns the error for what needs logits at the model's own resolution, or any logits."""
        uses, gives = "tiles, windows, other scales, flips, confidence and loss", "labels of whole images"
        if self.gives_upsampled:
            uses, gives = "a single resize to another size", "logits"
        return ValueError(
            f"model: expected logits for {uses}, got {self.path}, which gives {gives} at the size of its input; "
            f"export the model's logits: {self._command('')}"
        )

    def _command(self, options: str) -> str:
        return f"apcnet export MODEL.safetensors {self.path}{options}"

    def _results(self, images: Tensor) -> Tensor:
        self._check(images)
        inputs = images.detach().cpu().float()
        inputs = self._pixels(inputs) if self.takes_pixels else inputs
        parts = inputs.split(inputs.shape[0] if self._batch is None else self._batch)
        found = [self._run(part.contiguous()) for part in parts]
        results = found[0] if len(found) == 1 else torch.cat(found)
        expected = ("B", "H", "W") if self.gives_labels else ("B", self.num_classes, "h", "w")
        if results.dim() != len(expected) or (not self.gives_labels and results.shape[1] != self.num_classes):
            raise ValueError(f"{self.path}: expected it to return {expected}, got {tuple(results.shape)}")
        return results.to(images.device)

    def _check(self, images: Tensor) -> None:
        if torch.is_autocast_enabled(images.device.type):
            raise ValueError(f"precision: expected float32 for the exported file {self.path}, got another")
        if images.dim() != 4 or images.shape[1] != self.in_channels or not images.is_floating_point():
            shape, given = f"(B, {self.in_channels}, H, W)", str(images.dtype).removeprefix("torch.")
            raise ValueError(
                f"images: expected normalised floating-point images {shape}, got {tuple(images.shape)} {given}"
            )
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            height, width = self.size
            stride = f"{-(-height * 2 // 3)} {-(-width * 2 // 3)}"
            window = f"slide a window over larger images by --window {height} {width} --stride {stride}, or "
            raise ValueError(
                f"images: expected a height and width of {height} and {width}, the only size that {self.path} takes, "
                f"got {images.shape[2]} and {images.shape[3]}; {'' if self.gives_labels else window}export a file for "
                f"every size: {self._command(' --dynamic')}"
            )

    def _pixels(self, images: Tensor) -> Tensor:
        """Returns the levels of normalised images; uint8 RGB, unless the model was trained with other levels."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        levels = images * std + mean
        if self.range is not None:
            return levels
        pixels = levels.round()
        if not ((levels - pixels).abs() <= TOLERANCE).all() or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(
                f"images: expected normalised levels of 0 to 255, because {self.path} takes uint8 pixels, got others; "
                f"export without --normalise: {self._command('')}"
            )
        return pixels.to(torch.uint8)


def read(path: str | Path) -> tuple[Exported, dict[str, Any]]:
    """Reads an exported file; returns the model without classes, palette, mean and std, and the file's description."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file of apcnet export, got {path}: there is no such file")
    package, extra = PACKAGES[path.suffix]
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{path}: expected the package {package}: pip install 'apc_kernels[{extra}]'")
    try:
        opened = {".onnx": _onnx, ".xml": _openvino, ".pt2": _exported_program}[path.suffix](path)
    except Exception as error:  # a runtime raises errors of its own, of many kinds
        raise ValueError(f"{path}: {package} cannot read it: {printable(error)}") from None
    about = _checked(path, opened)
    return Exported(path, opened, about), about


def _checked(path: Path, opened: Opened) -> dict[str, Any]:
    """Returns the description in a file, or raises an error that names what is missing."""
    again = f"export it by apcnet export MODEL.safetensors {path}"
    if opened.about is None:
        raise ValueError(
            f'{path}: expected metadata under "apcnet" (classes, mean, std, …), got a file without them, which apcnet '
            f"did not export; {again}"
        )
    try:
        about = json.loads(opened.about)
    except (ValueError, RecursionError):
        raise ValueError(f'{path}: expected JSON under "apcnet" in its metadata, got something else; {again}') from None
    valid = {
        "output": lambda value: value in OUTPUTS,
        "normalise": lambda value: isinstance(value, bool),
        "align_corners": lambda value: isinstance(value, bool),
        "num_classes": lambda value: type(value) is int and value > 0,
    }
    wrong = [name for name, is_valid in valid.items() if not isinstance(about, dict) or not is_valid(about.get(name))]
    if wrong:
        raise ValueError(f'{path}: expected {", ".join(wrong)} under "apcnet" in its metadata, found none; {again}')
    if len(opened.shape) != 4 or opened.shape[1] is None:
        raise ValueError(f"{path}: expected images (B, C, H, W) as its only input, got {opened.shape}; {again}")
    return about


def _onnx(path: Path) -> Opened:
    import onnxruntime  # an extra, like OpenVINO

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    shape = tuple(size if isinstance(size, int) else None for size in images.shape)
    about = session.get_modelmeta().custom_metadata_map.get("apcnet")
    return Opened(about, shape, lambda x: torch.from_numpy(session.run(None, {images.name: x.numpy()})[0]))


def _openvino(path: Path) -> Opened:
    import openvino

    model = openvino.Core().read_model(path)
    places = (["apcnet"], ["framework", "apcnet"])  # written by apcnet export; or by ovc, from a file in ONNX
    texts = [model.get_rt_info(place).astype(str) for place in places if model.has_rt_info(place)]
    (images,) = model.inputs
    shape = tuple(None if size.is_dynamic else size.get_length() for size in images.partial_shape)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})

    def run(images: Tensor) -> Tensor:
        (result,) = compiled.infer_new_request([images.numpy()]).values()  # a request of its own: for several threads
        return torch.from_numpy(result)

    return Opened(texts[0] if texts else None, shape, run)


def _exported_program(path: Path) -> Opened:
    about = {"apcnet": ""}
    with path.open("rb") as file:  # PyTorch's reader cannot open names that are not UTF-8
        program = torch.export.load(file, extra_files=about)
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    shape = tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)
    module = program.module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return Opened(about["apcnet"] or None, shape, run)
