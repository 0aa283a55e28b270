"""Holds a run: its model and folder, the step it has reached, and what it saves, evaluates and reports there."""

import copy
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from apcnet.config import Config
from apcnet.data.sample import Dataset
from apcnet.data.statistics import Statistics
from apcnet.data.stream import Batch, Batches, loader
from apcnet.distributed import gather, rank, reached, settle, share_state, world_size
from apcnet.files import read_json, write_json
from apcnet.inference.measures import MeanLoss
from apcnet.progress import Show
from apcnet.training import checkpoint, report
from apcnet.training.environment import changes, environment, names_digest
from apcnet.training.folder import BEST, FINAL, AnotherRunError, config_changes, scoring_changed
from apcnet.training.log import Log, Writer
from apcnet.training.own import Own
from apcnet.training.signals import Interrupts
from apcnet.training.start import STATISTICS, augmentation, class_weights, initial_model
from apcnet.training.step import NotFiniteError, Trainer
from apcnet.training.validation import Validation, is_better, rated

METRICS = "metrics.json"


class Run:
    """Holds the model of a run, its folder, and the step it has reached."""

    def __init__(
        self,
        config: Config,
        own: Own,
        data: Dataset,
        val_data: Dataset,
        statistics: Statistics | None,
        out: Path,
        device: torch.device,
        workers: int,
        log_to: Writer | None,
        show: Show,
        interrupts: Interrupts,
    ):
        self.config, self.data, self.val_data, self.statistics = config, data, val_data, statistics
        self.own = own
        self.out, self.device, self.workers = out, device, workers
        self.is_main, self.interrupts = rank() == 0, interrupts
        self.show = show if self.is_main else lambda record: None
        weights = class_weights(config, self.data.classes)
        model = initial_model(config, self.data, statistics, own).to(device)
        if own.model is not None:
            share_state(model)
        self.trainer = Trainer(model, config, weights, own.loss)
        self.model = self.trainer.result
        self.validation = Validation(self.model, val_data, config, out, workers)
        self.step, self.evaluated = 0, 0
        self.best: checkpoint.Best | None = None
        self.waited = 0  # the number of evaluations after the best one
        self.scores: dict | None = None
        self.identity = {
            "config": config.to_json(),
            "images": len(self.data),
            "sample_names": names_digest(self.data),
            "class_weights": weights,
            "objects": own.names(),
        }
        self.environment = {**environment(device, self.data, self.val_data), **own.sources()}
        _check_processes(self.identity, self.environment)
        state = checkpoint.load(out, repair=self.is_main)
        if state is not None:
            self._resume(state)
        if name := self.trainer.not_finite():
            raise ValueError(f"{self._origin(state)}: expected finite numbers, found others in {name}")
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
                "eval_every": config.eval_every,
                "save_every": config.save_every,
                "folder": str(out),
                "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
                "processes": world_size(),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "images": len(self.data),
                "val_images": len(self.val_data),
            }
        )

    def _resume(self, state: checkpoint.State) -> None:
        """Continues from the state of a checkpoint, if it belongs to this run and fits its model."""
        before = Config.from_json(state["config"])
        if others := self.own.changes(state["objects"]):
            raise ValueError(
                f"out: {self.out} holds a run with other objects, {'; '.join(others)}. Pass the same ones to "
                "apcnet.train, or name another folder"
            )
        if changed := _differences(state, self.identity):
            raise AnotherRunError(self.out, before, changed)
        if self.config.steps < state["step"]:
            raise ValueError(
                f"steps: expected {state['step']} or more, which the run in {self.out} has taken, got "
                f"{self.config.steps}; type --steps {state['step']}, or add --new for another run"
            )
        try:
            self.trainer.restore(state)
        except ValueError as error:
            raise ValueError(f"{self._origin(state)}: {error}; start another run with --new") from None
        self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]
        self.waited = state["waited"]
        if scoring_changed(before, self.config):
            self.evaluated, self.best, self.waited = 0, None, 0
        if not self.is_main:
            return
        if before.steps != self.config.steps:
            warnings.warn(
                f"steps: {before.steps} → {self.config.steps}; from step {self.step} on, the learning rate follows the "
                "new number of steps",
                stacklevel=4,
            )
        for change in changes(state["environment"], self.environment):
            warnings.warn(f"{self.out}: results may no longer be bit-identical, {change}", stacklevel=4)

    def _origin(self, state: checkpoint.State | None) -> Path | str | None:
        """Returns the file that the weights come from, or None if they are random."""
        if state is not None:  # a damaged last.pt has been renamed
            return next(p for p in (self.out / checkpoint.LAST, self.out / checkpoint.PREVIOUS) if p.exists())
        return "model" if self.own.model else self.config.model.init or self.config.model.backbone_weights

    def batches(self) -> Iterator[Batch]:
        """Loads the batches of the remaining steps."""
        transform = augmentation(self.config.data, self.model, self.own.augment)
        batches = Batches(self.data, transform, self.config.seed, self.config.batch_size, rank(), world_size())
        steps = range(self.step, self.step if self.is_over else self.config.steps)
        return loader(batches, steps, self.workers, pin_memory=self.device.type == "cuda")

    @property
    def is_over(self) -> bool:
        """Tells whether the run has taken all steps, or has waited long enough for a better evaluation."""
        patience = self.config.patience
        return self.step == self.config.steps or (patience is not None and self.waited >= patience)

    def due(self, every: int) -> bool:
        """Tells whether this step ends an interval of so many steps, or the run."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def train_step(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """Takes one step; returns its losses, and whether a process asked to stop."""
        reached(self.step)
        try:
            result = self.trainer.step(self.step, batch.images, batch.masks, self.interrupts.signal is not None)
        except NotFiniteError as error:
            raise FloatingPointError(self._describe_failure(batch, error)) from None
        self.step += 1
        self.show({"event": "step", "step": self.step, "values": result[0]})
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
        """Saves a checkpoint, unless this step has one already or a number in it is not finite."""
        if self.saved == self.step:  # a second save would replace previous.pt by the same state
            return
        if name := self.trainer.not_finite():
            raise FloatingPointError(
                f"step {self.step}: {name} is not finite. {self._last_good()}. Try a lower --lr, or --clip with --new"
            )
        if self.is_main:
            progress = {"step": self.step, "evaluated": self.evaluated, "best": self.best, "waited": self.waited}
            state = {**progress, **self.identity, "environment": self.environment, **self.trainer.state()}
            checkpoint.save(self.out, cast(checkpoint.State, state))
        self.saved = self.step
        self.show({"event": "saved", "step": self.step})

    def _last_good(self) -> str:
        """Tells which state the run has saved."""
        if not self.saved:
            return "No checkpoint was saved"
        return f"{self.out / checkpoint.LAST} holds the state after step {self.saved}"

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
            settle()  # the workers are forked next

        def progress(done: int, total: int) -> None:
            if self.interrupts.signal is not None:  # the step is saved; the resumed run repeats the evaluation
                self.show({"event": "stopped", "step": self.step, "folder": str(self.out)})
                raise SystemExit(self.interrupts.status)
            self.show({"event": "evaluating", "done": done, "total": total})

        loss = MeanLoss() if self.config.best_by == "loss" else None
        matrix, images = self.validation.measure(progress, loss)
        scores = matrix.scores()
        best = rated(scores, loss, self.step)
        if is_better(best, self.best, self.config.best_by):
            self.best, self.waited = best, 0
            if self.is_main:
                self.model.save(self.out / BEST)
        else:
            self.waited += 1
        self.scores = {"step": self.step, **scores.record(self.val_data), "best": self.best}
        if loss is not None:
            self.scores["val_loss"] = loss.mean
        self.evaluated = self.step
        self._record(self.scores)
        self.validation.save_preview(self.step)
        self.validation.save_results(matrix, images)
        if self.log is not None:
            report.write([self.out])
            report.write_curves(self.out)
            for name, path in self.validation.pictures(self.step).items():
                self.log.picture(f"val/{name}", path, self.step)
        self.show({"event": "evaluated", "step": self.step})
        self.log_time, self.log_step = time.perf_counter(), self.step
        return self.scores

    def finish(self) -> dict:
        """Saves the final model and its scores, and returns the scores."""
        self.show({"event": "over", "step": self.step, "waited": self.waited})
        stored = gather(self._stored_scores() if self.is_main else None)[0]
        if self.scores is None and stored is not None:
            return stored
        scores = self.scores or self.evaluate()
        if self.log is not None:
            self.model.save(self.out / FINAL)
            write_json(self.out / METRICS, scores)
            report.write([self.out])  # with commands for the final model
            self.log.close()
        gather(None)  # when train returns in any process, all files are written
        return scores

    def _stored_scores(self) -> dict | None:
        """Returns the scores of a run that was finished before, or None if there are none that can be read."""
        if not (self.out / METRICS).is_file() or not (self.out / FINAL).is_file():
            return None
        try:
            scores = read_json(self.out / METRICS)
            iou, best, averages = scores["iou"], scores["best"], [scores[name] for name in ("miou", "macc", "aacc")]
            whole = scores["step"] == self.step and list(iou) == list(self.data.classes)
            numbers = [*averages, best["miou"], best["step"], *(value for value in iou.values() if value is not None)]
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        return scores if whole and all(type(number) in (int, float) for number in numbers) else None

    def _record(self, record: dict) -> None:
        if self.log is not None:
            self.log(record)
            for callback in self.own.callbacks:
                callback(copy.deepcopy(record))
        self.show(record)

    def _memory(self) -> int:
        """Returns the peak memory so far, in MiB: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        import resource  # not available on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def _describe_failure(self, batch: Batch, error: NotFiniteError) -> str:
        samples = gather([{"name": n, "position": p} for n, p in zip(batch.names, batch.positions, strict=True)])
        broken = self.trainer.not_finite()  # the update before may have overflown
        if broken is None:
            self.save()
        details = {
            "step": self.step,
            "values": {k: str(v) for k, v in error.values.items()},
            "samples": list(itertools.chain(*samples)),
        }
        if self.is_main:
            write_json(self.out / "failed.json", details)
        cause = "" if broken is None else f", and {broken} is not finite since the step before"
        return (
            f"step {self.step}: losses or gradients are not finite ({error}){cause}. {self._last_good()}, the samples "
            f"of this step are in {self.out / 'failed.json'}. Try a lower --lr, or --clip with --new"
        )


def _differences(state: Mapping[str, Any], identity: dict) -> list[str]:
    """Lists what a checkpoint and this run have not in common: fields of the config, and the data."""
    changed = config_changes(Config.from_json(state["config"]), Config.from_json(identity["config"]))
    data = "images", "sample_names", "class_weights"
    return changed + [f"{name}: {state[name]} → {identity[name]}" for name in data if state[name] != identity[name]]


def _check_processes(identity: dict, environment: dict) -> None:
    """Checks that all processes have the same config and the same data; the root of the data may differ."""
    mine = {**identity, **{name: environment[name] for name in ("training files", "validation files")}}
    mine["config"] = {**mine["config"], "data": {**mine["config"]["data"], "root": None}}
    others = gather(mine)
    for number, other in enumerate(others):
        if different := [name for name in mine if other[name] != others[0][name]]:
            raise ValueError(
                f"root: expected the same config and data in all processes, process {number} has other "
                f"{', '.join(different)} than process 0"
            )
