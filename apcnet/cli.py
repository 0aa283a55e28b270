"""The command line of apcnet: train, test, predict, and models and data on their way in and out."""

import dataclasses
import functools
import itertools
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

import apcnet
from apcnet import threads
from apcnet.config import Config, Data, Model, Precision, Protocol
from apcnet.console import RunDisplay, bar, show_download, table
from apcnet.files import write_json
from apcnet.presets import preset
from apcnet.presets import table as table_of_presets

FOUND, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses; 2 is also that of wrong flags

# A command is a function: its parameters are its flags, its docstring is their help. PyTorch takes a second to import:
# each command imports what it needs itself.


def train(
    config: OmitArgPrefixes[Config],
    out: Path,
    new: bool = False,
    gpus: int = 1,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int | None = None,
    log_every: int = 50,
    log: Literal["tensorboard", "wandb"] | None = None,
) -> None:
    """Train a model: apcnet train [PRESET] [flags]. The same command goes on where it was stopped.

    Args:
        config: What the run is.
        out: The run's folder.
        new: Start another run, in a folder beside one that is there.
        gpus: Of this machine, a process each; the exit status is then torchrun's, 1 for whatever stopped it. Of several
            machines, and on CPUs: torchrun -m apcnet train …
        device: Where to train; not given, on a GPU if there is one.
        workers: Processes that read and augment images, for each that trains; not given, up to 8.
        log_every: Steps from one record of losses to the next.
        log: Where records go beside the run's log.jsonl.
    """
    threads.one_for_a_small(config.model.backbone)
    from apcnet.confusion import percent
    from apcnet.training import train
    from apcnet.training.folder import unused

    one_of_several = "WORLD_SIZE" in os.environ
    if new:
        if gpus > 1 or one_of_several:
            raise ValueError("new: several processes have to be told their folder, by --out")
        out = unused(out)
    if gpus != 1 and not one_of_several:
        _start_processes(gpus, device)
    display = RunDisplay()
    with display.bar:
        scores = train(
            config,
            out,
            device=device,
            workers=_workers() if workers is None else workers,
            log_every=log_every,
            log_to=log,
            show=display,
        )
    if os.environ.get("RANK", "0") == "0":
        table([("class", "IoU"), *((name, percent(iou)) for name, iou in scores["iou"].items())])
        print(f"mIoU {percent(scores['miou'])}  mAcc {percent(scores['macc'])}  aAcc {percent(scores['aacc'])}")
        print(f"model    {out / 'final.safetensors'}, the best one {out / 'best.safetensors'}")
        print(f"pictures {out / 'preview' / str(scores['step']).zfill(6)}.png")


def evaluate(
    weights: Positional[Annotated[Path, arg(metavar="RUN|MODEL.safetensors")]],
    data: OmitArgPrefixes[Data],
    protocol: OmitArgPrefixes[Protocol],
    multi_scale: bool = False,
    precision: Precision = "float32",
    out: Path | None = None,
    predictions: Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int | None = None,
) -> None:
    """Test a model: apcnet evaluate RUN|MODEL.safetensors [PRESET] [flags].

    Of a run, the data and the way to test are its own; of other models, those of a preset.

    Args:
        weights: The folder of a run, or a model's file.
        data: What it is tested on.
        protocol: How.
        multi_scale: The published multi-scale test: six scales, each mirrored as well.
        precision: Of the matrix products (autocast).
        out: A folder for metrics.json, confusion.npy and confusion.png.
        predictions: A folder for the labels, as the benchmark's server wants them.
        device: Where to run; not given, on a GPU if there is one.
        workers: Processes that read images; not given, up to 8.
    """
    from apcnet import draw
    from apcnet.confusion import percent
    from apcnet.data.augment import TEST_RATIOS
    from apcnet.distributed import processes, rank
    from apcnet.inference import submission
    from apcnet.inference.evaluation import evaluate
    from apcnet.training.folder import model_file
    from apcnet.training.start import open_data

    if multi_scale:
        protocol = dataclasses.replace(protocol, ratios=TEST_RATIOS, flip=True)
    model = apcnet.load(model_file(weights))
    dataset = open_data(data, data.val_split)
    with processes(device) as device, bar("evaluating") as progress:
        matrix = evaluate(
            model.to(device),
            dataset,
            protocol,
            workers=_workers() if workers is None else workers,
            precision=precision,
            progress=progress,
            submission=predictions and submission.writer(data.dataset, dataset, predictions),
        )
        if rank() != 0:
            return
    scores = matrix.scores()
    table(scores.rows(dataset.classes))
    print(f"mIoU {percent(scores.miou)}  mAcc {percent(scores.macc)}  aAcc {percent(scores.aacc)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "metrics.json", scores.record(dataset))
        matrix.save(out / "confusion.npy")
        draw.save(draw.confusion(matrix.matrix, dataset.classes), out / "confusion.png")


def predict(
    model: Positional[Annotated[Path, arg(metavar="RUN|MODEL.safetensors")]],
    sources: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE|FOLDER ...")]],
    out: Path,
    protocol: OmitArgPrefixes[Protocol],
    overlay: Literal["jpg", "png", "none"] = "jpg",
    precision: Precision = "float32",
    device: Literal["cpu", "cuda"] | None = None,
) -> None:
    """Label images of any kind and size. Exit status 1: one of them cannot be read.

    Args:
        model: The model's file, or the folder of a run, whose images are then seen as the run's tests saw theirs.
        sources: Images, and folders with images.
        out: The folder for label maps and overlays.
        protocol: How the network sees an image.
        overlay: The kind of file for pictures of the labels over the image.
        precision: Of the matrix products (autocast).
        device: Where to run; not given, on a GPU if there is one.
    """
    from apcnet.distributed import processes
    from apcnet.inference.prediction import predict_files
    from apcnet.training.folder import model_file

    with processes(device) as device, bar("predicting") as progress:
        report = predict_files(
            apcnet.load(model_file(model)).to(device),
            sources,
            out,
            protocol,
            precision=precision,
            overlay=None if overlay == "none" else overlay,
            progress=progress,
        )
    print(f"{out}: {report.done} images")
    for failure in report.failures:
        _complain(failure)
    if report.failures:
        sys.exit(FOUND)


def presets(containing: Positional[Annotated[str, arg(metavar="TEXT")]] = "") -> None:
    """List what `apcnet train` knows by name, with the published mIoU, memory and speed, and who published them.

    Args:
        containing: Only names that contain it.
    """
    print(table_of_presets(containing), end="")


def info() -> None:
    """Say what is installed, what is built and why not, and which backend serves each operation."""
    from apc_kernels.info import report

    print(report())


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
    from apcnet.interop.convert import convert

    model = convert(
        source, out, align_corners=align_corners, output_stride=output_stride, folder=folder, progress=show_download
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
    from apcnet.export import export

    differences = export(
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
    from apcnet.data.doctor.check import check

    with bar("looking") as progress:
        report = check(name, root, splits=splits, examples=examples, workers=workers, progress=progress, **options)
    print(report.text(), end="")
    if json is not None:
        write_json(json, report.json())
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
    from apcnet.data.prepare import prepare

    with bar("preparing") as progress:
        written, kept = prepare(name, root, source, progress)
    print(f"{root}: {written} files written, {kept} were there already")


COMMANDS = (train, evaluate, predict, presets, convert, export, check, prepare, info)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What is wrong with its input is said in one line, without a traceback."""
    warnings.showwarning = _complain
    threads.sleep_while_waiting()
    try:
        arguments, defaults = _defaults(list(sys.argv[1:] if arguments is None else arguments))
        commands = {command.__name__: command for command in COMMANDS}
        commands |= {name: functools.partial(commands[name], **given) for name, given in defaults.items()}
        tyro.extras.subcommand_cli_from_dict(commands, prog="apcnet", description=__doc__, args=arguments)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        _complain(error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _defaults(arguments: list[str]) -> tuple[list[str], dict]:
    """Takes the names of presets and runs out of a command line: they say what the defaults of its other flags are."""
    command, rest = arguments[:1], arguments[1:]
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    if command == ["train"]:
        name = names[0] if names else "tiny"
        config = preset(name)
        for flag, following in itertools.zip_longest(rest, rest[1:]):
            if flag == "--init" or flag.startswith("--init="):
                config = dataclasses.replace(config, model=_model_of(flag.partition("=")[2] or following))
        return command + rest[len(names[:1]) :], {"train": {"config": config, "out": Path("runs") / name}}
    if command == ["evaluate"] and names:
        config = preset(names[1]) if len(names) > 1 else _config_of(Path(names[0]))
        return command + names[:1] + rest[len(names[:2]) :], {
            "evaluate": {"data": config.data, "protocol": config.evaluation}
        }
    if command == ["predict"] and names and Path(names[0]).is_dir():
        return arguments, {"predict": {"protocol": _config_of(Path(names[0])).evaluation}}
    return arguments, {}


def _model_of(path: str | None) -> Model:
    """The model in a file, as a run's config says it."""
    from apcnet.zoo import read

    if path is None:
        raise ValueError("init: expected a model's file after it")
    return Model.of(read(path)[0]["architecture"], init=Path(path))


def _config_of(path: Path) -> Config:
    """Of the run in a folder, or that a model's file lies in."""
    from apcnet.training.folder import read_config

    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise ValueError(f"{path}: it is in no run's folder; name the preset whose data it is to be tested on")
    return read_config(folder)


def _start_processes(gpus: int, device: str | None) -> None:
    """Becomes torchrun, with this command line in a process for each GPU."""
    import torch

    there = torch.cuda.device_count()
    if device == "cpu" or not 1 <= gpus <= there:
        raise ValueError(
            f"gpus: expected 1 to {there}, got {gpus}; several processes on CPUs: torchrun -m apcnet train …"
        )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "apcnet", *sys.argv[1:]])


def _workers() -> int:
    """As many as there are cores for, beside the processes that train."""
    return min(8, max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 0))


def _complain(message, *_) -> None:
    """Says in one line what is wrong; also what a warning says, without where it comes from."""
    print("apcnet:", *str(message).split(), file=sys.stderr)
