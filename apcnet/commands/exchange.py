"""Converts, exports and uploads models: the commands convert, export and push."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import apcnet
from apcnet.config import Protocol


def convert(
    source: Positional[Annotated[str, arg(metavar="FILE|URL|NAME")]],
    out: Positional[Annotated[Path, arg(metavar="OUT.safetensors")]],
    align_corners: bool | None = None,
    output_stride: Literal[8, 16, 32] | None = None,
    folder: Path | None = None,
) -> None:
    """Convert a checkpoint of mmsegmentation (0.x, 1.x) or sssegmentation to a model file.

    The names and shapes of the weights determine the architecture. No code in the checkpoint is executed.

    Args:
        source: Convert this file, URL, or published mmsegmentation model.
        out: Write the model to this file, NAME.safetensors.
        align_corners: Align corners when resizing logits, as in training; needed if the checkpoint does not store it.
        output_stride: Set the backbone's output stride; needed if the checkpoint does not store it.
        folder: Keep downloads in this folder.
    """
    from apcnet.hub import show_download
    from apcnet.interop.convert import convert as convert_checkpoint

    model = convert_checkpoint(
        source, out, align_corners=align_corners, output_stride=output_stride, folder=folder, progress=show_download
    )
    assert model.architecture is not None  # every converted model has one
    about = ", ".join(f"{name} {value}" for name, value in model.architecture.items())
    print(f"{out}: {about}, {'with' if model.classes else 'without'} class names")


def export(
    model: Positional[Annotated[Path, arg(metavar="RUN|MODEL.safetensors")]],
    out: Positional[Annotated[Path | None, arg(metavar="OUT", help_behavior_hint="")]] = None,
    web: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    format: Literal["exportedprogram", "onnx", "openvino"] | None = None,
    size: tuple[int, int] = (512, 512),
    dynamic: bool = True,
    output: Literal["logits", "upsampled", "labels"] = "logits",
    normalise: bool = False,
    runtime: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: fetched by npm)")] = None,
) -> None:
    """Export a model to a file or a web page that runs without this package, and compare the results of the two.

    Args:
        model: Export the model in this run folder or file, of `apcnet train`, `apcnet convert` or model.save.
        out: Write the exported model to this file, NAME.pt2, NAME.onnx or NAME.xml.
        web: Write a page to this folder that labels photos in the browser alone, instead of a file.
        format: Write an ExportedProgram, ONNX or an IR of OpenVINO; by default the suffix of OUT decides.
        size: Trace the model with an image of this height and width.
        dynamic: Accept batches of images of any number and size; otherwise one image of the traced size.
        output: Return logits at the model's resolution, or logits or labels at the image's size.
        normalise: Accept uint8 RGB images and normalise them inside the model.
        runtime: Copy onnxruntime-web into the page from this folder.
    """
    from apcnet.export import export as export_model
    from apcnet.training.folder import model_file, read_config

    if (out is None) == (web is None):
        given = "none" if web is None else f"{out} and {web}"
        raise ValueError(f"out: expected NAME.pt2, NAME.onnx or NAME.xml, or else --web FOLDER, got {given}")
    loaded = apcnet.load(model_file(model))
    if out is not None:
        options = {"format": format, "size": size, "dynamic": dynamic, "output": output, "normalise": normalise}
        differences = export_model(loaded, out, **options)
    elif (format, dynamic, output, normalise) != (None, True, "logits", False):
        raise ValueError("web: expected no --format, --no-dynamic, --output and --normalise, which suit files only")
    else:
        from apcnet.web import write

        protocol = read_config(model).evaluation if model.is_dir() else Protocol()
        differences = write(loaded, web, protocol, name=model.stem, size=size, runtime=runtime)
    compared = ", ".join(f"{value:.1e} at {height}×{width}" for (height, width), value in differences.items())
    print(f"{out or web}: {output}, {f'off by {compared}' if compared else 'not compared'}")
    if web is not None:
        print(f"to open it: python -m http.server --directory {shlex.quote(str(web))}, then http://localhost:8000")


def push(
    model: Positional[Annotated[Path, arg(metavar="RUN|MODEL.safetensors")]],
    name: Positional[Annotated[str, arg(metavar="USER/MODEL")]],
    license: str | None = None,
    private: bool = False,
) -> None:
    """Upload a model and a model card to the Hugging Face Hub; then hf:USER/MODEL names it in every command.

    Args:
        model: Upload the model in this file or run folder; the card of a run tells its data and scores.
        name: Create or update this repository.
        license: Name this licence on the card, for example apache-2.0.
        private: Make a new repository private.
    """
    from apcnet.training.folder import model_file

    run = model if model.is_dir() else None
    print(apcnet.load(model_file(model)).push_to_hub(name, run=run, license=license, private=private or None))
