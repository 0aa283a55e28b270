"""The command line of apcnet: models in, out and through their work."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

import apcnet
from apcnet.data.check import check as check_data
from apcnet.data.prepare import prepare as prepare_data
from apcnet.export import export as export_model
from apcnet.files import replacing
from apcnet.interop.convert import convert as convert_checkpoint

FOUND, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses; 2 is also that of wrong flags

# A command is a function: its parameters are its flags, its docstring is their help.


def convert(
    source: Positional[Annotated[str, arg(metavar="FILE|URL|NAME")]],
    out: Positional[Annotated[Path, arg(metavar="OUT.safetensors")]],
    align_corners: bool | None = None,
    output_stride: Literal[8, 16, 32] | None = None,
    folder: Path | None = None,
) -> None:
    """Make a model file from a checkpoint of mmsegmentation (0.x, 1.x) or sssegmentation.

    Its architecture is read off the names and shapes of its weights. Nothing in the checkpoint is run.

    Args:
        source: A file, a URL, or the name of weights that mmsegmentation has published.
        out: The file to write, NAME.safetensors.
        align_corners: How the model resized its logits in training, where the checkpoint does not say it.
        output_stride: Of the backbone, where the checkpoint does not say it.
        folder: For what is downloaded.
    """
    model = convert_checkpoint(
        source, out, align_corners=align_corners, output_stride=output_stride, folder=folder, progress=_show_progress
    )
    about = ", ".join(f"{name} {value}" for name, value in model.architecture.items())
    print(f"{out}: {about}, {'with' if model.classes else 'without'} names of classes")


def export(
    model: Positional[Annotated[Path, arg(metavar="MODEL.safetensors")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    format: Literal["exportedprogram", "onnx"] | None = None,
    size: tuple[int, int] = (512, 512),
    dynamic: bool = True,
    output: Literal["logits", "upsampled", "labels"] = "logits",
    normalise: bool = False,
) -> None:
    """Write a model as a file that runs without this package, and compare the two.

    Args:
        model: The model's file, as `apcnet convert` and model.save write it.
        out: The file to write.
        format: An ExportedProgram for PyTorch (.pt2) or ONNX (.onnx); not given as OUT ends.
        size: Height and width to trace it at.
        dynamic: Take images of every size and any number of them, otherwise one of that size.
        output: Logits at the model's resolution, logits at the images' size, or labels at the images' size.
        normalise: Take RGB pixels, uint8, and normalise them in the model.
    """
    differences = export_model(
        apcnet.load(model), out, format=format, size=size, dynamic=dynamic, output=output, normalise=normalise
    )
    compared = ", ".join(f"{value:.1e} at {height}×{width}" for (height, width), value in differences.items())
    print(f"{out}: {output}, {f'off by {compared}' if compared else 'not compared'}")


def check(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    splits: tuple[str, ...] = (),
    labels: dict[int, int] | None = None,
    json: Path | None = None,
    examples: int = 5,
    workers: int | None = None,
) -> None:
    """Read every file of a data set once, and say what is wrong with it and what to do. Exit status 1: it is not fit.

    Args:
        name: cityscapes, ade20k, voc2012, pascal_context, or folder: your own.
        root: The folder that holds leftImg8bit, images or JPEGImages.
        splits: Those to look at, where it should not be all that are trained on and tested.
        labels: Of folder, what the values in masks stand for: 0 0 255 1 for masks of 0 and 255.
        json: A file to write the report to as well, with more numbers and with class weights for training.
        examples: How many files each finding names.
        workers: Processes that decode; not given, one for each core.
    """
    options = {} if labels is None else {"labels": labels}
    if options and name != "folder":
        raise ValueError(f"labels: those of {name} are fixed, only folder takes them")
    if json is not None and not json.parent.is_dir():  # said now, and not after an hour of reading
        raise FileNotFoundError(f"json: there is no folder {json.parent}")
    with _bar("looking") as progress:
        report = check_data(name, root, splits=splits, examples=examples, workers=workers, progress=progress, **options)
    print(report.text(), end="")
    if json is not None:
        _write_json(report.json(), json)
    if not report.ok:
        sys.exit(FOUND)


def prepare(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    source: Path | None = None,
) -> None:
    """Make the masks and lists that the download of a benchmark lacks. Nothing is overwritten, what is there is kept.

    Args:
        name: cityscapes, voc2012 or pascal_context.
        root: The folder that holds leftImg8bit or JPEGImages.
        source: Of voc2012 the folder of SBD that holds cls, of pascal_context the JSON file, if not where usual.
    """
    with _bar("preparing") as progress:
        written, kept = prepare_data(name, root, source, progress)
    print(f"{root}: {written} files written, {kept} were there already")


COMMANDS = {"convert": convert, "export": export, "check": check, "prepare": prepare}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What is wrong with its input is said in one line, without a traceback."""
    warnings.showwarning = _show_warning
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="apcnet", description=__doc__, args=arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"apcnet: {_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _show_warning(message, *_):
    print(f"apcnet: {_line(message)}", file=sys.stderr)


def _line(message):
    return " ".join(str(message).split())


def _show_progress(come: int, total: int | None) -> None:
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        print(f"\rdownload {come / 1e6:.1f}{of_total} MB", end="\n" if come == total else "", file=sys.stderr)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Draws how much is done of how much, until it is; only where somebody may be looking."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write_json(report: dict, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
