"""Exports models to files that run without this package: an ExportedProgram for PyTorch, ONNX, OpenVINO's IR.

While a model is traced, the operations of apc_kernels use their references, which consist of stock operators; height,
width and batch size stay symbolic. A file appears only after it was read back and its results matched the model's.
`apcnet.load` reads the files as models (apcnet.exported).
"""

import io
import json
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from apcnet import inference
from apcnet.choices import check_choice
from apcnet.exported import OUTPUTS, Exported
from apcnet.files import replacing
from apcnet.models import Segmentor

FORMATS = {"exportedprogram": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
NEEDS = {"exportedprogram": (), "onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
TOLERANCE = 1e-4  # relative to the largest logit; or the share of labels that may differ, where classes tie
SMALLEST = 33  # pixels; a smaller traced size leaves a single row or column at stride 32
AXES = {0: "batch", 2: "height", 3: "width"}


def export(
    model: Segmentor,
    path: str | Path,
    *,
    format: str | None = None,
    size: Sequence[int] = (512, 512),
    dynamic: bool = True,
    output: str = "logits",
    normalise: bool = False,
) -> dict[tuple[int, int], float]:
    """Exports a model to a file, and checks that the file computes the same as the model.

    The file also holds classes, palette, mean, std, align_corners and the options of the export as JSON under "apcnet":
    in extra_files of an ExportedProgram, in metadata_props of an ONNX file, in rt_info of an IR.

    Args:
        model: A float32 model in evaluation mode.
        path: Name of the file, NAME.pt2, NAME.onnx or NAME.xml.
        format: "exportedprogram" (read it by `torch.export.load`), "onnx" or "openvino" (an IR in float32, in NAME.xml
            and NAME.bin). The default follows from the path.
        size: (H, W) of the images to trace with.
        dynamic: Accept any number of images of any size from 17 pixels on. Otherwise the file takes one image of
            `size`. Encoders that take images of one size, or have windows other than Swin's, can only do that; with
            Swin, sides are longer than 32 windows, 224 pixels for most.
        output: "logits" at the model's own resolution, as `model(images)` returns them; "upsampled", logits at the size
            of the images; or "labels" at the size of the images, uint8 for up to 256 classes.
        normalise: Accept RGB pixels, uint8 (B, 3, H, W), and normalise them by the model's mean and std; or the levels
            of other images in float32, if the model was trained with such. Otherwise the file takes normalised float32
            images.

    Returns:
        For every compared size (H, W), the largest difference relative to the largest logit, or the share of labels
        that differ. It is empty if onnxruntime is not installed to run an ONNX file.

    Example:
        >>> export(apcnet.load("best.safetensors"), "best.onnx", output="labels", normalise=True)
    """
    path = Path(path)
    format = _format(path, format)
    size = _checked(model, size, dynamic, output)
    deployed = Deployed(model, output, normalise).eval()
    described = ("classes", "palette", "mean", "std", "num_classes", "align_corners")
    described += ("range",) if model.range is not None else ()
    about = {name: getattr(model, name) for name in described} | {"output": output, "normalise": normalise}
    text = json.dumps(about)
    with torch.no_grad(), ExitStack() as stack:
        temporary = stack.enter_context(replacing(path))
        program = _traced(deployed, size, dynamic)
        if format == "exportedprogram":
            run = _exported_program(program, temporary, text)
        elif format == "onnx":
            run = _onnx(program, temporary, text, output, dynamic)
        else:
            weights = stack.enter_context(replacing(path.with_suffix(".bin")))
            run = _openvino(program, temporary, weights, text, output, dynamic)
        return {} if run is None else _compared(deployed, run, size, dynamic)


class Deployed(nn.Module):
    """Wraps a model for export, with the normalisation before it and the resizing after it."""

    def __init__(self, model: Segmentor, output: str, normalise: bool):
        super().__init__()
        self.model, self.output, self.normalise = model, output, normalise
        device = next(model.parameters()).device
        for name in ("mean", "std"):  # in ONNX, plain "mean" and "std" would clash with names of results
            values = torch.tensor(getattr(model, name), device=device)[:, None, None]
            self.register_buffer(f"pixel_{name}", values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.normalise:
            images = (images.float() - self.pixel_mean) / self.pixel_std
        if self.output == "logits":
            return self.model(images)
        return (inference.labels if self.output == "labels" else inference.whole_logits)(self.model, images)

    def example(self, batch: int, size: Sequence[int]) -> Tensor:
        """Returns random images in the format of `forward`, the same at every call."""
        shape, generator = (batch, self.model.in_channels, *size), torch.Generator().manual_seed(0)
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        pixels = pixels.to(self.pixel_mean.device)
        if self.model.range is not None:
            low, high = torch.tensor(self.model.range, device=pixels.device).T[:, :, None, None]
            pixels = low + pixels * ((high - low) / 255)
        return pixels if self.normalise else (pixels.float() - self.pixel_mean) / self.pixel_std


def _format(path: Path, format: str | None) -> str:
    if format is None:
        endings = {ending: name for name, ending in FORMATS.items()}
        if path.suffix not in endings:
            raise ValueError(
                f"path: expected a name that ends in {', '.join(endings)}, or a format as well, got {path.name!r}"
            )
        format = endings[path.suffix]
    check_choice(format, "format", FORMATS)
    if format == "openvino" and path.suffix != FORMATS[format]:  # its runtime looks for NAME.bin beside NAME.xml
        raise ValueError(f"path: expected a name that ends in .xml for openvino, got {path.name!r}")
    missing = [name for name in NEEDS[format] if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"format: {format} needs {' and '.join(missing)}: pip install 'apc_kernels[{format}]'"
        )
    return format


def check_model(model: object) -> None:
    """Checks that a model is one that can be exported."""
    if isinstance(model, Exported):
        raise ValueError(f"model: expected the model that {model.path} was exported from, got that file")
    if not isinstance(model, Segmentor):
        given = type(model).__name__
        raise TypeError(f"model: expected a model of apcnet.create or apcnet.load, got {given}")


def _checked(model: Segmentor, size: Sequence[int], dynamic: bool, output: str) -> tuple[int, int]:
    check_model(model)
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected evaluation mode, got training mode: call model.eval() first")
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise ValueError(f"model: expected float32, got {tensor.dtype} ({name}): call model.float() first")
    check_choice(output, "output", OUTPUTS)
    if dynamic and not getattr(model.backbone, "any_size_exports", True):
        raise ValueError(
            f"dynamic: expected False for timm:{model.backbone.name}, which takes images of one size, or has windows, "
            "got True: add --no-dynamic, and --size for the size of the images"
        )
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise TypeError(f"size: expected two integers (H, W), got {size!r}") from None
    smallest = SMALLEST if dynamic else 1
    if min(height, width) < smallest:
        raise ValueError(f"size: expected a height and width of {smallest} pixels or more, got {(height, width)}")
    return height, width


def _traced(deployed: Deployed, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    axes = dict.fromkeys(AXES, Dim.DYNAMIC) if dynamic else None
    example = deployed.example(2 if dynamic else 1, size)  # torch.export would make a batch size of 1 constant
    program = torch.export.export(deployed, (example,), dynamic_shapes={"images": axes})
    program.example_inputs = None  # they would be saved as well
    return program


# The next three functions write a program to a file, read it back, and return a function that runs it.


def _exported_program(program: ExportedProgram, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    content = io.BytesIO()  # where a write fails, PyTorch's writer ends the process
    torch.export.save(program, content, extra_files={"apcnet": about})
    path.write_bytes(content.getbuffer())
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx(
    program: ExportedProgram, path: Path, about: str, output: str, dynamic: bool
) -> Callable[[Tensor], Tensor] | None:
    converted = _to_onnx(program, output, dynamic)
    converted.model.metadata_props["apcnet"] = about
    converted.save(path)
    if find_spec("onnxruntime") is None:
        warnings.warn("onnxruntime is not installed: the ONNX file was not checked", stacklevel=3)
        return None
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])


def _openvino(
    program: ExportedProgram, path: Path, weights: Path, about: str, output: str, dynamic: bool
) -> Callable[[Tensor], Tensor]:
    import openvino  # an extra

    core = openvino.Core()
    model = core.read_model(_to_onnx(program, output, dynamic).model_proto.SerializeToString())
    model.set_rt_info(about, "apcnet")
    with TemporaryDirectory(prefix=".apcnet-", dir=path.parent) as folder:  # OpenVINO writes NAME.xml and NAME.bin only
        written = Path(folder, "model.xml")
        openvino.serialize(model, written)
        written.with_suffix(".bin").replace(weights)
        written.replace(path)
    model = core.read_model(path.read_bytes(), weights.read_bytes())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled([images.cpu().numpy()])[0])


def _to_onnx(program: ExportedProgram, output: str, dynamic: bool) -> torch.onnx.ONNXProgram:
    axes = {"images": AXES} if dynamic else None  # names only: the axes are dynamic already
    names = {"input_names": ["images"], "output_names": [output], "dynamic_shapes": axes}
    with _quiet():
        converted = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert converted is not None  # it is None for the old exporter only
    return converted


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the converter says about its own code: deprecations, and operators that it does not fold."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _compared(
    deployed: Deployed, run: Callable, traced: tuple[int, int], dynamic: bool
) -> dict[tuple[int, int], float]:
    another = (traced[0] * 3 // 4 + 1, traced[1] * 5 // 4 + 1)
    differences = {}
    for size in (traced, another) if dynamic else (traced,):
        images = deployed.example(1, size)
        differences[size] = _difference(run(images).cpu(), deployed(images).cpu())
        if not differences[size] <= TOLERANCE:  # NaN does not pass either
            raise RuntimeError(
                f"export: for images of {size} the file's {deployed.output} differ by {differences[size]:.3g}, "
                f"expected at most {TOLERANCE}; nothing was written"
            )
    return differences


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return (actual != expected).double().mean().item()
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
