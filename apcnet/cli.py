"""Trains, evaluates and runs semantic segmentation models, converts and exports them, and checks datasets."""

import dataclasses
import functools
import importlib.util
import io
import itertools
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

import apcnet
from apcnet import threads
from apcnet.config import Config, Data, Model, Precision, Protocol
from apcnet.console import progress_bar, progress_steps, show_download, table
from apcnet.files import make_folder, printable, write_json
from apcnet.flags import refuse_minutes, ways_on
from apcnet.presets import preset
from apcnet.presets import table as table_of_presets

# The backbone weights of the preset `folder` where the package timm is installed, unless one of these flags is given.
OWN_WEIGHTS = "timm:resnet50c"
WEIGHTS = ("--backbone", "--backbone-weights", "--init", "--from-scratch")

# Errors of apc_kernels about APC_KERNELS_ISA and APC_KERNELS_BACKEND. To catch a class of their own, PyTorch would
# have to be imported, which takes a second.
ASKED_FOR = re.compile(r"APC_KERNELS_ISA=|\w+: the backend '\w+' was asked for, but ")

PROBLEMS_FOUND, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141  # exit statuses; wrong flags exit with 2 too

# A command is a function: its parameters are its flags, its docstring is their help. PyTorch takes a second to import,
# so each command imports what it needs.

Device = Annotated[Literal["cpu", "cuda"] | None, arg(help_behavior_hint="(default: a GPU if there is one)")]
Workers = Annotated[int | None, arg(help_behavior_hint="(default: one per core, at most 8)")]


def train(
    config: OmitArgPrefixes[Annotated[Config, arg(name="")]],
    out: Path,
    new: bool = False,
    gpus: int = 1,
    device: Device = None,
    workers: Workers = None,
    log_every: int = 50,
    log: Literal["tensorboard", "wandb", "mlflow"] | None = None,
    timeout: float = 600.0,
) -> None:
    """Train a model: apcnet train [PRESET] [flags]. The same command resumes a run that was stopped.

    Args:
        config: Describes the run.
        out: Write the run to this folder.
        new: Start another run; if the folder exists, append -2, -3, … to its name.
        gpus: Train on this many GPUs, one process each; on CPUs or several machines start torchrun -m apcnet train.
        device: Train on this device.
        workers: Load and augment images with this many processes per training process.
        log_every: Log the losses every so many steps.
        log: Log scores and pictures to TensorBoard, Weights & Biases or MLflow too, besides log.jsonl.
        timeout: End the run if no process gets further for this many seconds, and name the one that hangs.
    """
    threads.use_one_for_tiny(config.model.backbone)
    from apcnet.confusion import percent
    from apcnet.training import train
    from apcnet.training.folder import unused_folder

    under_torchrun = "WORLD_SIZE" in os.environ
    if new:
        if gpus > 1 or under_torchrun:
            raise ValueError("new: expected a single process; with several, name a new folder with --out")
        out = unused_folder(out)
    if gpus != 1 and not under_torchrun:
        _start_processes(gpus, device)
    scores = train(
        config,
        out,
        device=device,
        workers=_default_workers() if workers is None else workers,
        log_every=log_every,
        log_to=log,
        timeout=timeout,
    )
    if os.environ.get("RANK", "0") == "0":
        table([("class", "IoU"), *((name, percent(iou)) for name, iou in scores["iou"].items())])
        print(f"mIoU {percent(scores['miou'])}  mAcc {percent(scores['macc'])}  aAcc {percent(scores['aacc'])}")
        print(f"model    {out / 'final.safetensors'}, best {out / 'best.safetensors'}")
        print(f"report   {out / 'report.html'}")


def evaluate(
    weights: Positional[Annotated[Path, arg(metavar="RUN|MODEL.safetensors")]],
    data: OmitArgPrefixes[Data],
    protocol: OmitArgPrefixes[Protocol],
    multi_scale: bool = False,
    precision: Precision = "float32",
    boundary: bool = False,
    calibration: bool = False,
    loss: bool = False,
    out: Path | None = None,
    predictions: Path | None = None,
    device: Device = None,
    workers: Workers = None,
) -> None:
    """Evaluate a model on a dataset: apcnet evaluate RUN|MODEL.safetensors [PRESET] [flags].

    The dataset and the protocol are those of the run, or of the preset if one is given.

    Args:
        weights: Evaluate the model in this run folder or file.
        data: Describes the dataset to evaluate on.
        protocol: Describes how the model sees an image.
        multi_scale: Average over six scales and their mirror images, as the published multi-scale test does.
        precision: Run matrix products in this precision (autocast).
        boundary: Also compute boundary IoU, that of the pixels near a class's boundary.
        calibration: Also compute how far confidence and accuracy are apart (ECE).
        loss: Also compute the cross entropy of the labelled pixels.
        out: Write metrics.json, images.csv, confusion.npy and confusion.png to this folder.
        predictions: Write the predicted labels to this folder, in the format of the benchmark's server.
        device: Evaluate on this device.
        workers: Load images with this many processes.
    """
    from apcnet import draw
    from apcnet.confusion import percent
    from apcnet.data.augment import TEST_RATIOS
    from apcnet.distributed import process_group, rank
    from apcnet.inference import submission
    from apcnet.inference.evaluation import evaluate as evaluate_on
    from apcnet.inference.measures import BoundaryIoU, Calibration, MeanLoss, PerImage
    from apcnet.training.folder import model_file
    from apcnet.training.start import open_data

    if multi_scale:
        protocol = dataclasses.replace(protocol, ratios=TEST_RATIOS, flip=True)
    model = apcnet.load(model_file(weights))
    dataset = open_data(data, data.val_split)
    if out is not None:  # before hours of evaluation, not after them
        make_folder(out, "out")
    images = PerImage(dataset.classes)
    edges = BoundaryIoU(len(dataset.classes)) if boundary else None
    confidences, mean_loss = Calibration() if calibration else None, MeanLoss() if loss else None
    with process_group(device) as place, progress_bar("evaluating") as progress:
        matrix = evaluate_on(
            model.to(place),
            dataset,
            protocol,
            workers=_default_workers() if workers is None else workers,
            precision=precision,
            progress=progress,
            submission=predictions and submission.writer(data.dataset, dataset, predictions),
            images=images,
            boundary=edges,
            calibration=confidences,
            loss=mean_loss,
        )
        if rank() != 0:
            return
    scores = matrix.scores()
    record = scores.record(dataset)
    rows = [("class", "IoU", "Dice", "precision", "recall"), *scores.rows(dataset.classes)]
    totals = [("mIoU", scores.miou), ("mAcc", scores.macc), ("aAcc", scores.aacc), ("fwIoU", scores.fwiou)]
    if edges is not None:
        record |= edges.record(dataset.classes)
        more = ["boundary IoU", *map(percent, [*edges.iou.tolist(), record["mean_boundary_iou"]])]
        rows = [(*row, cell) for row, cell in zip(rows, more, strict=True)]
    if confidences is not None:
        record |= confidences.record()
        totals.append(("ECE", confidences.ece))
    if mean_loss is not None:
        record["loss"] = mean_loss.mean
    table(rows)
    shown = [f"{name} {percent(value)}" for name, value in totals]
    print("  ".join([*shown, f"loss {mean_loss.mean:.4f}"] if mean_loss is not None else shown))
    print(f"{int(matrix.matrix.sum()):,} labelled pixels of {len(dataset):,} images, scores in per cent")
    if out is not None:
        write_json(out / "metrics.json", record)
        images.save(out / "images.csv")
        matrix.save(out / "confusion.npy")
        draw.save(draw.confusion(matrix.matrix, dataset.classes), out / "confusion.png")


def predict(
    model: Positional[Annotated[Path, arg(metavar="RUN|MODEL.safetensors")]],
    sources: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE|FOLDER ...", help_behavior_hint="")]],
    out: Path,
    protocol: OmitArgPrefixes[Protocol],
    overlay: Literal["jpg", "png", "none"] = "jpg",
    confidence: bool = False,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Predict the labels of images of any format and size. The exit status is 1 if an image cannot be read.

    Args:
        model: Use the model in this file or run folder; with a run, images are treated as in its evaluation.
        sources: Predict these images, and all images in these folders.
        out: Write label maps and overlays to this folder.
        protocol: Describes how the network sees an image.
        overlay: Save overlays of image and labels in this format.
        confidence: Save the probability of every pixel's label too, as grey levels.
        precision: Run matrix products in this precision (autocast).
        device: Predict on this device.
    """
    from apcnet.distributed import process_group
    from apcnet.inference.prediction import predict_files
    from apcnet.training.folder import model_file

    with process_group(device) as place, progress_bar("predicting") as progress:
        report = predict_files(
            apcnet.load(model_file(model)).to(place),
            sources,
            out,
            protocol,
            precision=precision,
            overlay=None if overlay == "none" else overlay,
            confidence=confidence,
            progress=progress,
        )
    print(f"{out}: {report.done} images")
    for failure in report.failures:
        _print_error(failure)
    if report.failures:
        sys.exit(PROBLEMS_FOUND)


def compare(
    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN ...", help_behavior_hint="")]],
    out: Path = Path("compare.html"),
) -> None:
    """Write one page with the curves, scores and pictures of several runs.

    Args:
        runs: Show the runs in these folders.
        out: Write the page to this file.
    """
    from apcnet.training import report

    print(report.write(runs, out))


def presets(containing: Positional[Annotated[str, arg(metavar="TEXT", help_behavior_hint="")]] = "") -> None:
    """List the presets of `apcnet train`, with published mIoU, memory, speed and their source.

    Args:
        containing: List only presets whose names contain this text.
    """
    print(table_of_presets(containing), end="")


def info() -> None:
    """Show which versions are installed, which native libraries are built, and which backend runs each operation."""
    from apc_kernels.info import report

    print(report())


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
    from apcnet.interop.convert import convert as convert_checkpoint

    model = convert_checkpoint(
        source, out, align_corners=align_corners, output_stride=output_stride, folder=folder, progress=show_download
    )
    assert model.architecture is not None  # every converted model has one
    about = ", ".join(f"{name} {value}" for name, value in model.architecture.items())
    print(f"{out}: {about}, {'with' if model.classes else 'without'} class names")


def export(
    model: Positional[Annotated[Path, arg(metavar="MODEL.safetensors")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    format: Literal["exportedprogram", "onnx"] | None = None,
    size: tuple[int, int] = (512, 512),
    dynamic: bool = True,
    output: Literal["logits", "upsampled", "labels"] = "logits",
    normalise: bool = False,
) -> None:
    """Export a model to a file that runs without this package, and compare the results of the two.

    Args:
        model: Export this model file, written by `apcnet convert`, `apcnet train` or model.save.
        out: Write the exported model to this file, NAME.pt2 or NAME.onnx.
        format: Write an ExportedProgram (.pt2) or ONNX (.onnx); by default the suffix of OUT decides.
        size: Trace the model with an image of this height and width.
        dynamic: Accept batches of images of any number and size; otherwise one image of the traced size.
        output: Return logits at the model's resolution, or logits or labels at the image's size.
        normalise: Accept uint8 RGB images and normalise them inside the model.
    """
    from apcnet.export import export as export_model

    differences = export_model(
        apcnet.load(model), out, format=format, size=size, dynamic=dynamic, output=output, normalise=normalise
    )
    compared = ", ".join(f"{value:.1e} at {height}×{width}" for (height, width), value in differences.items())
    print(f"{out}: {output}, {f'off by {compared}' if compared else 'not compared'}")


def check(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    root: Positional[Annotated[str, arg(metavar="ROOT")]],
    splits: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = (),
    labels: dict[int, int] | None = None,
    json: Path | None = None,
    examples: int = 5,
    workers: Annotated[int | None, arg(help_behavior_hint="(default: one per core)")] = None,
) -> None:
    """Read every file of a dataset, and report problems and remedies. The exit status is 1 if it cannot be used.

    Args:
        name: Check this dataset: cityscapes, ade20k, voc2012, pascal_context, folder for your own, or shards.
        root: Read it from this folder, which holds leftImg8bit, images or JPEGImages, or shards from an address.
        splits: Check only these splits; by default those for training and evaluation.
        labels: Map values in masks to classes: `0 0 255 1` maps 0 to class 0 and 255 to class 1 (folder only).
        json: Write the report to this file too, with class weights for training.
        examples: Name up to this many files per problem.
        workers: Decode files with this many processes.
    """
    options = {} if labels is None else {"labels": labels}
    if options and name != "folder":
        raise ValueError(f"labels: expected with folder only, got them with {name}")
    if json is not None and not json.parent.is_dir():  # before hours of reading, not after them
        raise FileNotFoundError(f"json: expected a file in an existing folder, got {json}")
    from apcnet.data.doctor.check import check as check_dataset

    with progress_bar("checking") as progress:
        report = check_dataset(
            name, root, splits=splits, examples=examples, workers=workers, progress=progress, **options
        )
    print(report.text(), end="")
    if json is not None:
        write_json(json, report.json())
    if not report.ok:
        sys.exit(PROBLEMS_FOUND)


def prepare(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    source: Path | None = None,
) -> None:
    """Create the masks and lists that a benchmark's download lacks. Existing files are kept.

    Args:
        name: Prepare this dataset: cityscapes, voc2012 or pascal_context.
        root: Write to this folder, which holds leftImg8bit or JPEGImages.
        source: Read annotations from this folder of SBD that holds cls (voc2012), or JSON file (pascal_context).
    """
    from apcnet.data.prepare import prepare as prepare_dataset

    with progress_bar("preparing") as progress:
        written, kept = prepare_dataset(name, root, source, progress)
    print(f"{root}: {written} files written, {kept} already there")


def pack(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    root: Path | None = None,
    splits: Annotated[tuple[str, ...], arg(help_behavior_hint="(default: train val)")] = ("train", "val"),
    classes: Literal[59, 60] | None = None,
    labels: dict[int, int] | None = None,
    samples: int = 1000,
    workers: Workers = None,
) -> None:
    """Pack a dataset into tar files, to train on them from a disk, a web server or an object store.

    The files are WebDataset's. A pack that was stopped goes on.

    Args:
        name: Pack this dataset: cityscapes, ade20k, voc2012, pascal_context, folder or synthetic.
        out: Write the shards and their index to this folder, which is new or empty.
        root: Read the dataset from this folder; only synthetic needs none.
        splits: Pack these splits.
        classes: Use 59 classes, or 60 with the background (pascal_context only).
        labels: Map values in masks to classes: `0 0 255 1` maps 0 to class 0 and 255 to class 1 (folder only).
        samples: Put this many samples in each shard.
        workers: Decode and write with this many processes.
    """
    from apcnet.data.shards.pack import pack as pack_dataset

    for given, owner in (({"classes": classes}, "pascal_context"), ({"labels": labels}, "folder")):
        for option, value in given.items():
            if value is not None and name != owner:
                raise ValueError(f"{option}: expected with {owner} only, got {value} with {name}")
    options = {key: value for key, value in (("classes", classes), ("labels", labels)) if value is not None}
    with progress_bar("packing") as progress:
        packed = pack_dataset(
            name,
            out,
            root,
            splits=splits,
            samples=samples,
            workers=_default_workers() if workers is None else workers,
            progress=progress,
            **options,
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in packed.samples.items())
    print(f"{out}: {counts} samples; {packed.written} shards written, {packed.kept} already there")
    print(shlex.join(["apcnet", "train", "--dataset", "shards", "--root", str(out)]), "trains on it")


def import_data(
    source: Positional[Annotated[Path, arg(metavar="SOURCE")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    classes: Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    groups: str | None = None,
) -> None:
    """Convert the annotations of other tools to a folder to train on. The source stays as it is.

    Reads COCO, YOLO segmentation, LabelMe, CVAT, Label Studio, Roboflow masks, VOC and Cityscapes folders, and images
    with masks of any values or colours. An import that was stopped goes on. The exit status is 1 if `apcnet check`
    finds that the result cannot be used.

    Args:
        source: Read this folder, or the file of annotations in it.
        out: Write images, masks, classes.txt and a sheet of examples to this folder.
        classes: Read the names of classes from this file, and their colours for coloured masks.
        val_share: Give this share of the images to val, if the source is not split into train and val.
        seed: Choose them by this seed.
        groups: Keep the images together in whose names this regular expression matches the same text.
    """
    from apcnet.data.doctor.check import check as check_dataset
    from apcnet.data.imports.convert import convert as convert_source

    with progress_steps() as progress:
        made = convert_source(
            source, out, classes=classes, val_share=val_share, seed=seed, groups=groups, progress=progress
        )
        progress("checking", 0, 1)
        report = check_dataset("folder", out, progress=lambda done, total: progress("checking", done, total))
    splits = ", ".join(f"{count} {split}" for split, count in sorted(made.splits.items(), reverse=True))
    print(f"{source} holds {made.format}: {sum(made.splits.values())} images, {len(made.classes)} classes")
    for note in made.notes:
        print(f"note: {note}")
    print(f"{out}: {splits}; {made.written} images written, {made.kept} already there; see {out / 'examples.png'}\n")
    print(report.text())
    if not report.ok:
        sys.exit(PROBLEMS_FOUND)
    print(shlex.join(["apcnet", "train", "folder", "--root", str(out)]), "trains on it")


import_data.__name__ = "import"  # the name of the command is a keyword of Python
COMMANDS = (train, evaluate, predict, compare, presets, convert, export, check, import_data, prepare, pack, info)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command, and reports wrong input in one line, without a traceback."""
    warnings.showwarning = _print_error
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # names of files need not be valid in any encoding
    threads.sleep_while_waiting()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, `head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        sys.exit(CLOSED_PIPE)
    except ConnectionError as error:  # an OSError, but another process of the run has failed
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, ModuleNotFoundError, FloatingPointError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if not ASKED_FOR.match(str(error)):
            raise
        _fail(str(error).partition("\n")[0])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(arguments: list[str]) -> None:
    commands = {command.__name__: command for command in COMMANDS}
    if arguments and arguments[0] in commands:
        typed, name, arguments = ["apcnet", *arguments], arguments[0], arguments[1:]
        arguments, defaults = _defaults(name, arguments)
        command = functools.partial(commands[name], **defaults)
        try:
            tyro.cli(command, prog=f"apcnet {name}", args=arguments)
        except ValueError as error:
            raise ValueError(f"{error}{_ways_on(error, typed, defaults)}") from None
    else:
        tyro.extras.subcommand_cli_from_dict(commands, prog="apcnet", description=__doc__, args=arguments)


def _defaults(command: str, arguments: list[str]) -> tuple[list[str], dict]:
    """Removes the name of a preset from a command's arguments; returns the rest, and the defaults of its flags.

    The preset, or the config of the run that is named, determines the defaults.
    """
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    if command == "train":
        refuse_minutes(arguments)
        name = names[0] if names else "tiny"
        config = preset(name)
        for flag, following in itertools.zip_longest(arguments, arguments[1:]):
            if flag == "--init" or flag.startswith("--init="):
                config = dataclasses.replace(config, model=_read_model(flag.partition("=")[2] or following))
        chosen = {word.partition("=")[0].replace("_", "-") for word in arguments}
        if name == "folder" and not chosen & set(WEIGHTS) and importlib.util.find_spec("timm"):
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone_weights=OWN_WEIGHTS))
        return arguments[len(names[:1]) :], {"config": config, "out": Path("runs") / name}
    if command == "evaluate" and names:
        config = preset(names[1]) if len(names) > 1 else _read_run_config(Path(names[0]))
        return names[:1] + arguments[len(names[:2]) :], {"data": config.data, "protocol": config.evaluation}
    if command == "predict" and names and Path(names[0]).is_dir():
        return arguments, {"protocol": _read_run_config(Path(names[0])).evaluation}
    return arguments, {}


def _ways_on(error: ValueError, typed: list[str], defaults: dict) -> str:
    """Returns the commands to type after an AnotherRunError, and nothing after other errors."""
    stored, fields = getattr(error, "stored", None), getattr(error, "fields", [])
    if stored is None:
        return ""
    go_on, new = ways_on(typed, stored, fields, defaults["config"])
    return f". To go on with it: {go_on}; to start another run: {new}" if fields else f". To start another run: {new}"


def _read_model(path: str | None) -> Model:
    """Reads the architecture of a model file, as a config describes it."""
    from apcnet.zoo import read

    if path is None:
        raise ValueError("init: expected the path of a model file, got none")
    architecture = read(path)[0]["architecture"]
    try:
        return Model.of(architecture, init=Path(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {printable(error)}") from None


def _read_run_config(path: Path) -> Config:
    """Reads the config of a run from its folder or from the folder of its model file."""
    from apcnet.training.folder import read_config

    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{path}: expected a run folder or a model in one, found no config.json; for other models, name the preset "
            "to evaluate with: apcnet evaluate MODEL.safetensors PRESET --root FOLDER"
        )
    return read_config(folder)


def _start_processes(gpus: int, device: str | None) -> None:
    """Replaces this process by torchrun, which runs the same command in one process per GPU."""
    import torch

    available = torch.cuda.device_count()
    if device == "cpu" or not 1 <= gpus <= available:
        raise ValueError(
            f"gpus: expected 1 or more of the {available} GPUs that PyTorch finds, got {gpus}; to train in several "
            "processes on CPUs, type torchrun --nproc-per-node N -m apcnet train …"
        )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "apcnet", *sys.argv[1:]])


def _default_workers() -> int:
    """Returns one worker per core, without the cores of the training processes, and at most 8."""
    return min(8, max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 0))


def _fail(message: str) -> NoReturn:
    """Prints an error and exits; torchrun, if it started this process, repeats the error at the end of its report."""
    _print_error(message)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from apcnet.watch import report

        report(message)
    sys.exit(BAD_INPUT)


def _print_error(message, *_) -> None:
    """Prints an error or a warning in one line."""
    print("apcnet:", *str(message).split(), file=sys.stderr)
