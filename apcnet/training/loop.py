"""Trains a model from a config, in a loop that can be killed at any moment and still ends with the same bits.

Everything happens at a step, never by the clock, and every random number is a function of the seed and the step. So a
resumed run computes the same bits as one that was never killed, with any number of workers, given the same version of
PyTorch, type of processor, number of threads and number of processes.
"""

import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apcnet import draw
from apcnet.config import Config
from apcnet.data.levels import visible
from apcnet.data.sample import Dataset
from apcnet.data.statistics import Statistics
from apcnet.data.stream import Batch, Batches, loader
from apcnet.distributed import gather, process_group, rank, world_size
from apcnet.files import read_json, remove_leftovers, write_json
from apcnet.inference.evaluation import evaluate
from apcnet.inference.prediction import predict
from apcnet.training import checkpoint
from apcnet.training.folder import BEST, FINAL, AnotherRunError, claimed, config_changes, scoring_changed
from apcnet.training.log import Log, Writer
from apcnet.training.signals import Interrupts
from apcnet.training.start import (
    STATISTICS,
    augmentation,
    check,
    class_weights,
    initial_model,
    judge,
    open_data,
    read_statistics,
    warn_about_images,
)
from apcnet.training.step import NotFiniteError, Trainer

PREVIEW_IMAGES = 4


def train(
    config: Config,
    out: str | Path,
    *,
    device: str | None = None,
    workers: int = 0,
    log_every: int = 10,
    log_to: Writer | None = None,
    show: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Trains a model, and resumes the run in the folder if there is one.

    A folder belongs to a run after its first step. The run goes on with more steps, and with other values of any field
    in `apcnet.training.folder.MAY_CHANGE`; with another recipe it is refused.

    Args:
        config: The config of the run.
        out: The folder to write the run to; it is created if it does not exist.
        device: cpu or cuda; by default cuda if there is a GPU.
        workers: The number of processes that load batches, for each training process.
        log_every: The number of steps between two records of losses.
        log_to: tensorboard or wandb, to log there too, besides log.jsonl.
        show: A function that receives every record of the log, and events such as {"event": "started", …}.

    Returns:
        The scores after the last step: step, miou, macc, aacc (fractions), iou (by class name), best ({miou, step}),
        and with generated scenes context_miou.

    Raises:
        FloatingPointError: Losses or gradients are not finite; last.pt holds the state before that step, and
            failed.json names its samples.
        SystemExit: SIGINT or SIGTERM stopped the run, after the current step was finished and saved; the code is 128
            plus the signal's number.

    Example:
        >>> from apcnet.presets import preset
        >>> scores = apcnet.train(preset("tiny"), out="runs/tiny")
        >>> model = apcnet.load("runs/tiny/final.safetensors")
    """
    with process_group(device) as place, _reproducible(config, place), Interrupts() as interrupts:
        check(config, log_every, workers)
        data, val_data = (open_data(config.data, split) for split in (config.data.split, config.data.val_split))
        with claimed(Path(out), config) as record:
            statistics = read_statistics(Path(out))
            if not (Path(out) / checkpoint.LAST).exists():
                statistics = judge(config, {config.data.split: data, config.data.val_split: val_data}, workers)
            run = Run(config, data, val_data, statistics, Path(out), place, workers, log_to, show, interrupts)
            if run.step > 0:
                record()
            if run.due(config.eval_every) and run.evaluated < run.step:  # it was killed during the evaluation
                run.evaluate()
            if run.step == 0:
                warn_about_images(config, len(data), statistics)
                run.save_preview()
            for batch in run.batches():
                values, stop = run.train_step(batch)
                record()
                if run.step == 1:
                    run.save_statistics()
                if run.due(log_every):
                    run.record_losses(values)
                if run.due(config.save_every) or run.due(config.eval_every) or stop:
                    run.save()
                if stop:
                    run.stop()
                if run.due(config.eval_every):
                    run.evaluate()
            return run.finish()


class Run:
    """Holds the model of a run, its folder, and the step it has reached."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        val_data: Dataset,
        statistics: Statistics | None,
        out: Path,
        device: torch.device,
        workers: int,
        log_to: Writer | None,
        show: Callable[[dict], None],
        interrupts: Interrupts,
    ):
        self.config, self.data, self.val_data, self.statistics = config, data, val_data, statistics
        self.out, self.device, self.workers = out, device, workers
        self.is_main, self.interrupts = rank() == 0, interrupts
        self.show = show if self.is_main else lambda record: None
        weights = class_weights(config, self.data.classes)
        self.trainer = Trainer(initial_model(config, self.data, statistics).to(device), config, weights)
        self.model = self.trainer.result
        self.step, self.evaluated = 0, 0
        self.best: dict | None = None
        self.scores: dict | None = None
        self.identity = {"config": config.to_json(), "images": len(self.data), "class_weights": weights}
        state = checkpoint.load(out, repair=self.is_main)
        if state is not None:
            before = _check_state(state, self.identity, out)
            self.trainer.restore(state)
            self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]
            if scoring_changed(before, config):
                self.evaluated, self.best = 0, None
            if before.steps != config.steps and self.is_main:
                warnings.warn(
                    f"steps: {before.steps} → {config.steps}; from step {self.step} on, the learning rate follows the "
                    "new number of steps",
                    stacklevel=3,
                )
        self.saved = self.step
        if len(set(steps := gather(self.step))) > 1:
            raise ValueError(f"out: expected one folder for all processes, found checkpoints of steps {steps} in {out}")
        self.log = Log(out, self.step, state["evaluated"] if state else 0, log_to) if self.is_main else None
        self.log_time, self.log_step = time.perf_counter(), self.step
        self.show(
            {
                "event": "started",
                "step": self.step,
                "steps": config.steps,
                "batch_size": config.batch_size,
                "folder": str(out),
                "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
                "processes": world_size(),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "images": len(self.data),
                "val_images": len(self.val_data),
            }
        )

    def batches(self) -> Iterator[Batch]:
        """Loads the batches of the remaining steps."""
        transform = augmentation(self.config.data, self.model)
        batches = Batches(self.data, transform, self.config.seed, self.config.batch_size, rank(), world_size())
        steps = range(self.step, self.config.steps)
        return loader(batches, steps, self.workers, pin_memory=self.device.type == "cuda")

    def due(self, every: int) -> bool:
        """Tells whether this step ends an interval of so many steps, or the run."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def train_step(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """Takes one step; returns its losses, and whether a process asked to stop."""
        try:
            result = self.trainer.step(self.step, batch.images, batch.masks, self.interrupts.signal is not None)
        except NotFiniteError as error:
            self.save()
            raise FloatingPointError(self._describe_failure(batch, error)) from None
        self.step += 1
        return result

    def record_losses(self, values: dict[str, float]) -> None:
        """Records losses, speed and memory."""
        seconds = time.perf_counter() - self.log_time
        speed = self.config.batch_size * (self.step - self.log_step) / seconds
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # float16's norm
        self._record({"step": self.step, **finite, "images_per_second": round(speed, 2), "memory_mib": self._memory()})
        self.log_time, self.log_step = time.perf_counter(), self.step

    def save_statistics(self) -> None:
        """Saves the levels of the images that this run normalises by, unless they are 8-bit RGB."""
        if self.is_main and self.statistics is not None:
            write_json(self.out / STATISTICS, self.statistics.json())

    def save(self) -> None:
        """Saves a checkpoint, unless this step has one already."""
        if self.is_main and self.saved != self.step:  # a second save would replace previous.pt by the same state
            state = {"step": self.step, "evaluated": self.evaluated, "best": self.best}
            checkpoint.save(self.out, {**state, **self.identity, **self.trainer.state()})
        self.saved = self.step

    def stop(self) -> None:
        """Ends the process, after all processes have saved."""
        gather(None)  # torchrun ends all processes as soon as the first one exits
        self.show({"event": "stopped", "step": self.step, "folder": str(self.out)})
        raise SystemExit(self.interrupts.status)

    def evaluate(self) -> dict:
        """Evaluates the model, saves preview pictures, and saves the model if it is the best so far."""
        if world_size() > 1:  # on CPUs the batch norms of each process differ; those of the first one are used
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

        def progress(done: int, total: int) -> None:
            if self.interrupts.signal is not None:  # the step is saved; the resumed run repeats the evaluation
                self.show({"event": "stopped", "step": self.step, "folder": str(self.out)})
                raise SystemExit(self.interrupts.status)
            self.show({"event": "evaluating", "done": done, "total": total})

        matrix = evaluate(
            self.model,
            self.val_data,
            self.config.evaluation,
            workers=self.workers,
            precision=self.config.precision,
            channels_last=self.config.channels_last,
            progress=progress,
        )
        scores = matrix.scores()
        if math.isnan(scores.miou):
            split = self.config.data.val_split
            raise ValueError(f"val_split: expected labelled pixels, found none in {split}")
        if self.best is None or scores.miou > self.best["miou"]:
            self.best = {"miou": scores.miou, "step": self.step}
            if self.is_main:
                self.model.save(self.out / BEST)
        self.scores = {"step": self.step, **scores.record(self.val_data), "best": self.best}
        self.evaluated = self.step
        self._record(self.scores)
        self.save_preview()
        if self.is_main and self.step == self.config.steps:
            matrix.save(self.out / "confusion.npy")
            draw.save(draw.confusion(matrix.matrix, self.data.classes), self.out / "confusion.png")
        self.log_time, self.log_step = time.perf_counter(), self.step
        return self.scores

    def save_preview(self) -> None:
        """Saves a picture of some images with their labels, predictions and errors."""
        if not self.is_main:
            return
        samples = [self.val_data[index] for index in range(min(PREVIEW_IMAGES, len(self.val_data)))]
        images = [sample.image for sample in samples]
        predictions = predict(self.model, images, self.config.evaluation, precision=self.config.precision)
        rows = [
            (visible(sample.image, self.model.range), sample.mask, prediction.labels)
            for sample, prediction in zip(samples, predictions, strict=True)
        ]
        (self.out / "preview").mkdir(exist_ok=True)
        remove_leftovers(self.out / "preview")
        draw.save(
            draw.preview(rows, self.data.classes, self.data.palette), self.out / "preview" / f"{self.step:06}.png"
        )

    def finish(self) -> dict:
        """Saves the final model and its scores, and returns the scores."""
        metrics, final = self.out / "metrics.json", self.out / FINAL
        if self.scores is None and metrics.exists() and final.exists():  # the run was finished before
            return read_json(metrics)
        scores = self.scores or self.evaluate()
        if self.log is not None:
            self.model.save(final)
            write_json(metrics, scores)
            self.log.close()
        gather(None)  # when train returns in any process, all files are written
        return scores

    def _record(self, record: dict) -> None:
        if self.log is not None:
            self.log(record)
        self.show(record)

    def _memory(self) -> int:
        """Returns the peak memory so far, in MiB: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        import resource  # not available on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def _describe_failure(self, batch: Batch, error: NotFiniteError) -> str:
        samples = gather([{"name": n, "position": p} for n, p in zip(batch.names, batch.positions, strict=True)])
        details = {
            "step": self.step,
            "values": {k: str(v) for k, v in error.values.items()},
            "samples": list(itertools.chain(*samples)),
        }
        if self.is_main:
            write_json(self.out / "failed.json", details)
        return (
            f"step {self.step}: losses or gradients are not finite ({error}). The state before this step is in "
            f"{self.out / checkpoint.LAST}, its samples are in {self.out / 'failed.json'}. Try a lower --lr, or --clip "
            "with --new"
        )


def _check_state(state: dict, identity: dict, out: Path) -> Config:
    """Checks that a checkpoint belongs to this run, with the same data, and returns its config."""
    try:
        stored, config = (Config.from_json(each["config"]) for each in (state, identity))
        changed = config_changes(stored, config)
        changed += [
            f"{name}: {state[name]} → {identity[name]}"
            for name in ("images", "class_weights")
            if state[name] != identity[name]
        ]
    except KeyError as error:
        raise ValueError(
            f"out: expected the checkpoint of a run in {out / checkpoint.LAST}, it has no {error}"
        ) from None
    if changed:
        raise AnotherRunError(out, stored, changed)
    if config.steps < state["step"]:
        raise ValueError(
            f"steps: expected {state['step']} or more, which the run in {out} has taken, got {config.steps}; "
            f"type --steps {state['step']}, or add --new for another run"
        )
    return stored


@contextmanager
def _reproducible(config: Config, device: torch.device) -> Iterator[None]:
    """Seeds and configures PyTorch for a run, and afterwards restores its random state and settings."""
    settings: Any = torch.utils.deterministic  # type checkers do not see its one property
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms)
            torch.backends.cudnn.benchmark = cudnn
            settings.fill_uninitialized_memory = fill
