"""Passes the records and pictures of a run on to TensorBoard, Weights & Biases or MLflow.

Scalars are grouped: train/loss, train/lr, val/miou, val/iou/road. Each service knows a run by its folder, so a resumed
run goes on in the same place. The packages are imported here only, and each is an extra.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

Writer = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "apcnet"


class Service(NamedTuple):
    """Holds the functions that pass on a record, a picture (its name, its file, the step), and the end of a run."""

    record: Callable[[dict[str, Any]], None]
    picture: Callable[[str, Path, int], None]
    close: Callable[[], None]


def open_service(writer: Writer, folder: Path, step: int) -> Service:
    """Opens a service for the run in a folder, which resumes at `step`; an error names a package that is missing."""
    try:
        return {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[writer](folder, step)
    except ImportError:
        raise ModuleNotFoundError(f"log: {writer} is not installed: pip install {writer}") from None


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record by their names; those of nested dicts have the names of both, with a slash."""
    return dict(_scalars(record, "val" if "miou" in record else "train"))


def _scalars(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and (prefix, name) not in (("val", "step"), ("train", "step")):
            yield f"{prefix}/{name}", value


def _tensorboard(folder: Path, step: int) -> Service:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def record(values: dict[str, Any]) -> None:
        for name, value in scalars(values).items():
            writer.add_scalar(name, value, values["step"])
        writer.flush()

    def picture(name: str, path: Path, step: int) -> None:
        with Image.open(path) as opened:
            writer.add_image(name, np.asarray(opened.convert("RGB")), step, dataformats="HWC")

    return Service(record, picture, writer.close)


def _wandb(folder: Path, step: int) -> Service:
    import wandb

    run = wandb.init(project=PROJECT, name=folder.name, dir=str(folder), id=_identity(folder), resume="allow")
    return Service(
        lambda values: run.log(scalars(values), step=values["step"]),
        lambda name, path, step: run.log({name: wandb.Image(str(path))}, step=step),
        run.finish,
    )


def _mlflow(folder: Path, step: int) -> Service:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client, tag = MlflowClient(), "apcnet.folder"
    experiment = client.get_experiment_by_name(PROJECT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
    found = client.search_runs([experiment_id], f"tags.`{tag}` = '{_identity(folder)}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, tags={tag: _identity(folder)}, run_name=folder.name)
    identity = run.info.run_id
    client.update_run(identity, "RUNNING")

    def record(values: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        allowed = ((re.sub(r"[^\w.\- /:]", "_", name), value) for name, value in scalars(values).items())
        metrics = [Metric(name, value, now, values["step"]) for name, value in allowed]
        for start in range(0, len(metrics), 1000):  # the most that MLflow takes at once
            client.log_batch(identity, metrics[start : start + 1000])

    def picture(name: str, path: Path, step: int) -> None:
        with Image.open(path) as opened:
            client.log_image(identity, opened, artifact_file=f"{name}/{step:06}.png")

    return Service(record, picture, lambda: client.set_terminated(identity))


def _identity(folder: Path) -> str:
    """Returns what a service knows the run in a folder by."""
    return hashlib.sha256(str(folder.resolve()).encode(errors="surrogatepass")).hexdigest()[:16]
