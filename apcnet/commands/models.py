"""Trains and runs models, and compares runs: the commands train, evaluate, predict, compare, presets and info."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

import apcnet
from apcnet import threads
from apcnet.commands import PROBLEMS_FOUND, Device, Workers
from apcnet.config import Config, Data, Precision, Protocol
from apcnet.console import print_error, progress_bar, table
from apcnet.files import make_folder
from apcnet.presets import table as table_of_presets


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
        workers=threads.default_workers() if workers is None else workers,
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
    weights: Positional[Annotated[Path, arg(metavar="RUN|MODEL")]],
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
    """Evaluate a model on a dataset: apcnet evaluate RUN|MODEL [PRESET] [flags].

    The dataset and the protocol are those of the run, or of the preset if one is given.

    Args:
        weights: Evaluate the model in this run folder or file, also of `apcnet export`, or of this name: hf:USER/MODEL,
            or a preset with published weights.
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
    from apcnet.data.augment import TEST_RATIOS
    from apcnet.distributed import process_group, rank
    from apcnet.inference import submission
    from apcnet.inference.evaluation import evaluate as evaluate_on
    from apcnet.inference.measures import BoundaryIoU, Calibration, MeanLoss, PerImage
    from apcnet.inference.results import Results
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
            workers=threads.default_workers() if workers is None else workers,
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
    results = Results(dataset, matrix, images, edges, confidences, mean_loss)
    table(results.rows())
    print(results.totals())
    print(f"{int(matrix.matrix.sum()):,} labelled pixels of {len(dataset):,} images, scores in per cent")
    if out is not None:
        results.save(out)


def predict(
    model: Positional[Annotated[Path, arg(metavar="RUN|MODEL")]],
    sources: Positional[
        Annotated[tuple[str, ...], arg(metavar="FILE|FOLDER|PATTERN|URL|@LIST ...", help_behavior_hint="")]
    ],
    out: Path,
    protocol: OmitArgPrefixes[Protocol],
    overlay: Literal["jpg", "png", "none"] = "jpg",
    confidence: bool = False,
    probabilities: bool = False,
    bands: tuple[int, ...] | None = None,
    overwrite: bool = False,
    shard: Annotated[str, arg(metavar="I/N")] = "1/1",
    batch_size: int = 1,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Predict the labels of images of any format and size, and of videos. The same command goes on after a stop.

    The exit status is 1 if a source cannot be read.

    Args:
        model: Use the model in this run folder or file, also of `apcnet export`, or of this name: hf:USER/MODEL, or a
            preset with published weights. A run treats images as in its evaluation.
        sources: Predict these images, videos and GeoTIFFs, camera:0 for a camera, all images in these folders, and what
            the lines of these @lists name.
        out: Write label maps, overlays and the manifest of finished images to this folder.
        protocol: Describes how the network sees an image.
        overlay: Save overlays of image and labels in this format.
        confidence: Save the probability of every pixel's label too, as grey levels.
        probabilities: Save the probabilities of all classes too, as float16 arrays (K, H, W) in .npy files.
        bands: Take these bands of rasters as the model's channels, in this order, counted from 1; by default all.
        overwrite: Predict everything again, and replace what an earlier command has written.
        shard: Predict one part of the images of several: 1/4 to 4/4 for four processes on any machines.
        batch_size: Pass up to this many images of one size through the network together.
        precision: Run matrix products in this precision (autocast).
        device: Predict on this device.
    """
    from apcnet.bulk import predict_files
    from apcnet.bulk.processes import PATIENCE, parse_shard, split
    from apcnet.distributed import process_group, rank
    from apcnet.training.folder import model_file
    from apcnet.watch import report as tell_torchrun

    part = parse_shard(shard)
    with process_group(device, PATIENCE) as place, progress_bar("predicting") as progress:
        network = apcnet.load(model_file(model)).to(place)
        report = split(
            lambda part, progress: predict_files(
                network,
                sources,
                out,
                protocol,
                precision=precision,
                overlay=None if overlay == "none" else overlay,
                confidence=confidence,
                probabilities=probabilities,
                bands=bands,
                batch_size=batch_size,
                shard=part,
                overwrite=overwrite,
                progress=progress,
            ),
            part,
            progress,
        )
        if rank() != 0:
            return
    before = f", {report.skipped} of them finished before" if report.skipped else ""
    print(f"{out}: {report.counts()}{before}")
    for failure in report.failures:
        print_error(failure)
    if report.failures:
        tell_torchrun(f"cannot predict everything, see the lines above: {report.failures[0]}")
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

    if not runs:
        raise ValueError("runs: expected the folders of one run or more, got none: apcnet compare RUN RUN")
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
