"""Training: from a config to weights, in a loop that can be killed at any moment and ends with the same bits.

Everything happens at a step, nothing by the clock, and whatever is random follows from the seed and the step. So a
run that was killed and is started again does what it would have done, to the bit, with any number of workers, on the
same version of PyTorch, kind of processor, number of threads and of processes.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from apcnet import draw
from apcnet.config import Config
from apcnet.data.stream import Batch, Batches, loader
from apcnet.distributed import gather, process_group, rank, world_size
from apcnet.files import read_json, remove_leftovers, write_json
from apcnet.inference.evaluation import evaluate
from apcnet.inference.prediction import predict
from apcnet.training import checkpoint
from apcnet.training.folder import BEST, FINAL, changes, claim
from apcnet.training.log import Log, Writer
from apcnet.training.signals import Interrupts
from apcnet.training.start import augmentation, check, class_weights, open_data, starting_model
from apcnet.training.step import Descent, NotFiniteError

PREVIEWED = 4  # images


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
    """Trains from the first step, or from where the run in a folder was stopped.

    Args:
        config: what the run is.
        out: its folder, made if need be.
        device: cpu or cuda; None: cuda where there is one.
        workers: processes that make batches, beside each training process.
        log_every: steps from one record of losses to the next.
        log_to: tensorboard or wandb, beside log.jsonl.
        show: is given every record of the log, and {"event": …, …} of what is happening besides.

    Returns:
        the scores after the last step: step, miou, macc, aacc (fractions), iou of each class by name, of synthetic
        context_miou, and best: {miou, step}.

    Raises:
        FloatingPointError: losses or gradients are not finite; last.pt holds the state before that step, failed.json
            says on what it happened.
        SystemExit: 128 and the signal's number after SIGINT or SIGTERM; the step was finished and saved.
    """
    with process_group(device) as device, _reproducible(config, device), Interrupts() as interrupts:
        run = Run(config, Path(out), device, workers, log_every, log_to, show, interrupts)
        if run.due(config.eval_every) and run.evaluated < run.step:  # it was killed while it evaluated
            run.evaluate()
        if run.step == 0:
            run.draw()
        for batch in run.batches():
            values, stop = run.learn(batch)
            if run.due(log_every):
                run.log_step(values)
            if run.due(config.save_every) or run.due(config.eval_every) or stop:
                run.save()
            if stop:
                run.stop()
            if run.due(config.eval_every):
                run.evaluate()
        return run.finish()


class Run:
    """A folder, a model in it, and the step it has come to."""

    def __init__(self, config, out, device, workers, log_every, log_to, show, interrupts):
        self.config, self.out, self.device, self.workers = config, out, device, workers
        self.chief, self.interrupts = rank() == 0, interrupts
        self.show = show if self.chief else lambda record: None
        check(config, log_every, workers)
        self.data, self.held_out = (open_data(config.data, s) for s in (config.data.split, config.data.val_split))
        self.lock = claim(out, config)
        weights = class_weights(config, self.data.classes)
        self.descent = Descent(starting_model(config, self.data).to(device), config, weights)
        self.model = self.descent.result
        self.step, self.evaluated, self.best, self.scores = 0, 0, None, None
        self.means = {"config": config.to_json(), "images": len(self.data), "class_weights": weights}
        state = checkpoint.load(out, mend=self.chief)
        if state is not None:
            _check_state(state, self.means, out)
            self.descent.restore(state)
            self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]
        self.saved = self.step
        if len(set(steps := gather(self.step))) > 1:
            raise ValueError(f"out: the processes find different checkpoints in {out}, of steps {steps}")
        self.log = Log(out, self.step, self.evaluated, log_to) if self.chief else None
        self.since, self.logged = time.perf_counter(), self.step
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
                "val_images": len(self.held_out),
            }
        )

    def batches(self) -> Iterator[Batch]:
        """Those of the steps that are left."""
        transform = augmentation(self.config.data, self.model)
        batches = Batches(self.data, transform, self.config.seed, self.config.batch_size, rank(), world_size())
        steps = range(self.step, self.config.steps)
        return loader(batches, steps, self.workers, pin_memory=self.device.type == "cuda")

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def learn(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """A step. What it was, and whether a process was told to stop."""
        try:
            step = self.descent.step(self.step, batch.images, batch.masks, self.interrupts.signal is not None)
        except NotFiniteError as error:
            self.save()
            raise FloatingPointError(self._explain(batch, error)) from None
        self.step += 1
        return step

    def log_step(self, values: dict[str, float]) -> None:
        seconds = time.perf_counter() - self.since
        speed = self.config.batch_size * (self.step - self.logged) / seconds
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # float16's norm
        self._tell({"step": self.step, **values, "images_per_second": round(speed, 2), "memory_mib": self._memory()})
        self.since, self.logged = time.perf_counter(), self.step

    def save(self) -> None:
        if self.chief and self.saved != self.step:  # the one before is not to be lost for the same once more
            state = {"step": self.step, "evaluated": self.evaluated, "best": self.best}
            checkpoint.save(self.out, {**state, **self.means, **self.descent.state()})
        self.saved = self.step

    def stop(self) -> None:
        gather(None)  # a process that ends sooner would have the others ended while they save
        self.show({"event": "stopped", "step": self.step, "folder": str(self.out)})
        raise SystemExit(self.interrupts.status)

    def evaluate(self) -> None:
        """Scores and pictures of the model as it is, and the model's file if it is the best."""
        if (
            world_size() > 1
        ):  # batch norms on CPUs have statistics of their own in each process; the first one's are kept
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

        def progress(done: int, total: int) -> None:
            if self.interrupts.signal is not None:  # all is saved, and it is evaluated when the run goes on
                self.show({"event": "stopped", "step": self.step, "folder": str(self.out)})
                raise SystemExit(self.interrupts.status)
            self.show({"event": "evaluating", "done": done, "total": total})

        matrix = evaluate(
            self.model,
            self.held_out,
            self.config.evaluation,
            workers=self.workers,
            precision=self.config.precision,
            channels_last=self.config.channels_last,
            progress=progress,
        )
        scores = matrix.scores()
        if math.isnan(scores.miou):
            split = self.config.data.val_split
            raise ValueError(f"val_split: no pixel of {split} has a label, there is nothing to go by")
        if self.best is None or scores.miou > self.best["miou"]:
            self.best = {"miou": scores.miou, "step": self.step}
            if self.chief:
                self.model.save(self.out / BEST)
        self.scores = {"step": self.step, **scores.record(self.held_out), "best": self.best}
        self.evaluated = self.step
        self._tell(self.scores)
        self.draw()
        if self.chief and self.step == self.config.steps:
            matrix.save(self.out / "confusion.npy")
            draw.save(draw.confusion(matrix.matrix, self.data.classes), self.out / "confusion.png")
        self.since, self.logged = time.perf_counter(), self.step

    def draw(self) -> None:
        """Images, truth, predictions and errors."""
        if not self.chief:
            return
        rows = []
        for index in range(min(PREVIEWED, len(self.held_out))):
            sample = self.held_out[index]
            seen = predict(self.model, sample.image, self.config.evaluation, precision=self.config.precision)
            rows.append((sample.image, sample.mask, seen.labels))
        (self.out / "preview").mkdir(exist_ok=True)
        remove_leftovers(self.out / "preview")
        draw.save(
            draw.preview(rows, self.data.classes, self.data.palette), self.out / "preview" / f"{self.step:06}.png"
        )

    def finish(self) -> dict:
        """What is kept of a run that has come to its last step."""
        metrics, final = self.out / "metrics.json", self.out / FINAL
        if self.scores is None and metrics.exists() and final.exists():  # it had come there before
            return read_json(metrics)
        if self.scores is None:
            self.evaluate()
        if self.chief:
            self.model.save(final)
            write_json(metrics, self.scores)
            self.log.close()
        gather(None)  # all is written when train returns, in every process
        return self.scores

    def _tell(self, record: dict) -> None:
        if self.chief:
            self.log(record)
        self.show(record)

    def _memory(self) -> int:
        """The most that was needed so far, in MiB: of the GPU's memory, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        import resource  # which there is not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def _explain(self, batch: Batch, error: NotFiniteError) -> str:
        samples = gather([{"name": n, "position": p} for n, p in zip(batch.names, batch.positions, strict=True)])
        about = {
            "step": self.step,
            "values": {k: str(v) for k, v in error.values.items()},
            "samples": list(itertools.chain(*samples)),
        }
        if self.chief:
            write_json(self.out / "failed.json", about)
        return (
            f"step {self.step}: losses or gradients are not finite ({error}). The state before it is in {self.out}/"
            f"{checkpoint.LAST}, its samples in {self.out}/failed.json. Try --new with a lower --lr or --clip"
        )


def _check_state(state: dict, means: dict, out: Path) -> None:
    """A checkpoint has to be of this run, and of the data that it began with."""
    try:
        other = [*changes(Config.from_json(state["config"]), Config.from_json(means["config"]))]
        other += [
            f"{name}: {state[name]} → {means[name]}"
            for name in ("images", "class_weights")
            if state[name] != means[name]
        ]
    except KeyError as error:
        raise ValueError(f"out: {out / checkpoint.LAST} is no checkpoint of a run, it has no {error}") from None
    if other:
        raise ValueError(f"out: {out} holds another run, {'; '.join(other)}. Name another folder")


@contextmanager
def _reproducible(config: Config, device: torch.device) -> Iterator[None]:
    """PyTorch as a run wants it, and afterwards as it was: random state, and which algorithms may be used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms)
            torch.backends.cudnn.benchmark = cudnn
            torch.utils.deterministic.fill_uninitialized_memory = fill
