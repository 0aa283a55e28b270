"""Models as files that run without this package: an ExportedProgram for PyTorch, ONNX for everything else.

While a model is traced, the operations of apc_kernels are what their references say, stock operators only, and height,
width and batch stay symbols. No file appears before it was read back and gave what the model gives.
"""

import json
import operator
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from apcnet import inference
from apcnet.choices import check_choice
from apcnet.files import replacing
from apcnet.models import Segmentor

FORMATS = {"exportedprogram": ".pt2", "onnx": ".onnx"}
OUTPUTS = ("logits", "upsampled", "labels")
TOLERANCE = 1e-4  # of the largest logit; of labels this share may differ, where two classes are as likely
SMALLEST = 33  # a traced size that leaves more than one row and column at every stride
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
    """Writes a model in evaluation to a file, after comparing what the file computes with what the model does.

    Args:
        format: "exportedprogram" (torch.export.load) or "onnx"; where nothing is said as the path ends, .pt2 or .onnx.
        size: (H, W) that it is traced at.
        dynamic: take images of every size from 17 pixels on, and any number of them; otherwise one image of `size`.
        output: "logits" at the model's own resolution, as model(images); "upsampled", these at the size of the images;
            or "labels" at the size of the images, uint8 for up to 256 classes.
        normalise: take RGB pixels, uint8 (B, 3, H, W), and normalise them by the model's mean and std first; otherwise
            normalised float32 images.

    Returns:
        for every size (H, W) compared the largest difference relative to the largest logit, or of labels the share that
        differs. The file also says classes, palette, mean and std: as JSON under "apcnet", in an ExportedProgram's
        extra_files or in ONNX's metadata_props.
    """
    path = Path(path)
    format = _format(path, format)
    size = _checked(model, size, dynamic, output)
    deployed = Deployed(model, output, normalise).eval()
    about = json.dumps({name: getattr(model, name) for name in ("classes", "palette", "mean", "std")})
    with torch.no_grad(), replacing(path) as temporary:
        program = _traced(deployed, size, dynamic)
        if format == "exportedprogram":
            run = _exported_program(program, temporary, about)
        else:
            run = _onnx(program, temporary, about, output, dynamic)
        return {} if run is None else _compared(deployed, run, size, dynamic)


class Deployed(nn.Module):
    """What goes into the file: the model, and what a user of it would have to do before and after."""

    def __init__(self, model: Segmentor, output: str, normalise: bool):
        super().__init__()
        self.model, self.output, self.normalise = model, output, normalise
        device = next(model.parameters()).device
        for name in ("mean", "std"):  # not by these names: in an ONNX file they would meet those of results
            values = torch.tensor(getattr(model, name), device=device)[:, None, None]
            self.register_buffer(f"pixel_{name}", values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.normalise:
            images = (images.float() - self.pixel_mean) / self.pixel_std
        if self.output == "logits":
            return self.model(images)
        return (inference.labels if self.output == "labels" else inference.whole_logits)(self.model, images)

    def example(self, batch: int, size: Sequence[int]) -> Tensor:
        """Images as forward takes them, the same ones every time."""
        pixels = torch.randint(256, (batch, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        pixels = pixels.to(self.pixel_mean.device)
        return pixels if self.normalise else (pixels.float() - self.pixel_mean) / self.pixel_std


def _format(path: Path, format: str | None) -> str:
    if format is None:
        endings = {ending: name for name, ending in FORMATS.items()}
        if path.suffix not in endings:
            raise ValueError(
                f"path: expected a name that ends in {' or '.join(endings)}, or a format; got {path.name!r}"
            )
        format = endings[path.suffix]
    check_choice(format, "format", FORMATS)
    missing = [name for name in ("onnx", "onnxscript") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"format: onnx needs {' and '.join(missing)}: pip install 'apc_kernels[onnx]'")
    return format


def _checked(model: Segmentor, size: Sequence[int], dynamic: bool, output: str) -> tuple[int, int]:
    if not isinstance(model, Segmentor):
        given = type(model).__name__
        raise TypeError(f"model: expected one of this package (apcnet.create, apcnet.load), got {given}")
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected a model in evaluation, got one in training: call model.eval() first")
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise ValueError(f"model: expected float32, got {tensor.dtype} ({name}): call model.float() first")
    check_choice(output, "output", OUTPUTS)
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise TypeError(f"size: expected two integers (H, W), got {size!r}") from None
    smallest = SMALLEST if dynamic else 1
    if min(height, width) < smallest:
        raise ValueError(f"size: expected {smallest} pixels or more each way to trace at, got {(height, width)}")
    return height, width


def _traced(deployed: Deployed, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    axes = dict.fromkeys(AXES, Dim.DYNAMIC) if dynamic else None
    example = deployed.example(2 if dynamic else 1, size)  # of a batch of one torch.export makes a constant
    program = torch.export.export(deployed, (example,), dynamic_shapes={"images": axes})
    program.example_inputs = None  # they would be saved, too
    return program


# Both write a program to a file, read it back, and return a function that runs it.


def _exported_program(program: ExportedProgram, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"apcnet": about})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx(
    program: ExportedProgram, path: Path, about: str, output: str, dynamic: bool
) -> Callable[[Tensor], Tensor] | None:
    axes = {"images": AXES} if dynamic else None  # their names in the file; dynamic they are already
    names = {"input_names": ["images"], "output_names": [output], "dynamic_shapes": axes}
    converted = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    converted.model.metadata_props["apcnet"] = about
    converted.save(path)
    if find_spec("onnxruntime") is None:
        warnings.warn("onnxruntime is not installed: the ONNX file was written without a comparison", stacklevel=3)
        return None
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])


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
                f"export: for an image of {size} the {deployed.output} of the file are off by {differences[size]:.3g}, "
                f"allowed are {TOLERANCE}; nothing was written"
            )
    return differences


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return (actual != expected).double().mean().item()
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
