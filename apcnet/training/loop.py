"""Trains a model from a config, in a loop that can be killed at any moment and still ends with the same bits.

Everything happens at a step, never by the clock, and every random number is a function of the seed and the step. So a
resumed run computes the same bits as one that was never killed, with any number of workers, given the same version of
PyTorch, type of processor, number of threads and number of processes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from apcnet.config import Config
from apcnet.distributed import gather, process_group
from apcnet.progress import Show, shown
from apcnet.training import checkpoint
from apcnet.training.environment import reproducible
from apcnet.training.folder import claimed
from apcnet.training.log import Writer
from apcnet.training.own import Augmentation, Callback, Loss, Own
from apcnet.training.run import Run
from apcnet.training.signals import Interrupts
from apcnet.training.start import check, judge, open_both, read_statistics, warn_about_images
from apcnet.watch import PATIENCE


def train(
    config: Config,
    out: str | Path,
    *,
    data: object = None,
    val_data: object = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    loss: Loss | None = None,
    augment: Augmentation | None = None,
    callbacks: Sequence[Callback] = (),
    device: str | None = None,
    workers: int = 0,
    log_every: int = 10,
    log_to: Writer | None = None,
    timeout: float = PATIENCE,
    progress: bool | Show = True,
) -> dict:
    """Trains a model, and resumes the run in the folder if there is one.

    A folder belongs to a run after its first step. The run goes on with more steps, and with other values of any field
    in `apcnet.training.folder.MAY_CHANGE`; with another recipe it is refused.

    Own objects take the places of built-in parts. A checkpoint holds their names: a resumed run refuses others, and
    warns if their source or settings have changed. The bits of a run then depend on these objects too: they must not
    draw random numbers other than as described here, nor remember earlier calls.

    Args:
        config: The config of the run.
        out: The folder to write the run to; it is created if it does not exist.
        data: A data set to train on, in place of the config's: `len(data)`, `data[i]` -> (image, mask) or a Sample, and
            `data.classes`, the names of the classes. Images are (3, H, W) uint8 RGB or (C, H, W) float32 levels, masks
            (H, W) uint8 with 255 for pixels to ignore. `data.names` and `data.palette` are used if there are any.
        val_data: A data set to evaluate on; it is needed with `data`.
        model: A module, or a function that makes one after the seed was set. It maps normalised images to logits
            (B, K, h, w) or an `apcnet.models.Output`; its `mean`, `std` and `align_corners` count if it has them.
        loss: A function (output, target) -> dict of names and scalar tensors, whose sum is minimised: a mean over the
            images of the batch. The output is an `apcnet.models.Output`, the target (B, h, w) uint8.
        augment: A function (image, mask, generator) -> (image, mask) in place of the built-in augmentation: from the
            images of the data to crops of the config's size, which are then normalised. It draws from the generator,
            or from the global ones of PyTorch, NumPy and Python, which are seeded before each call.
        callbacks: Functions that receive every record of the log, in the first process. They change no bits.
        device: cpu or cuda; by default cuda if there is a GPU.
        workers: The number of processes that load batches, for each training process.
        log_every: The number of steps between two records of losses.
        log_to: tensorboard or wandb, to log there too, besides log.jsonl.
        timeout: With several processes, the seconds without progress after which they exit and name the one that hangs.
        progress: Show the progress in the terminal or the notebook; or a function that receives every record of the
            log, and events such as {"event": "started", …}.

    Returns:
        The scores after the last step: step, miou, macc, aacc (fractions), iou (by class name), best ({miou, step}),
        and with generated scenes context_miou.

    Raises:
        FloatingPointError: Losses, gradients or weights are not finite; last.pt holds the last state whose numbers are,
            and failed.json names the samples of the step.
        SystemExit: SIGINT, SIGTERM or SIGHUP stopped the run, after the current step was finished and saved; the code
            is 128 plus the signal's number.

    Example:
        >>> from apcnet.presets import preset
        >>> scores = apcnet.train(preset("tiny"), out="runs/tiny")
        >>> model = apcnet.load("runs/tiny/final.safetensors")
    """
    own = Own(data, val_data, model, loss, augment, callbacks)
    config = own.config(config)
    with (
        shown(progress) as show,
        process_group(device, timeout) as place,
        reproducible(config, place),
        Interrupts() as interrupts,
    ):
        check(config, log_every, workers)
        train_data, val_data = open_both(config.data, own)
        with claimed(Path(out), config) as record:
            statistics = read_statistics(Path(out))
            found = gather((Path(out) / checkpoint.LAST).exists())
            if True in found and False in found:
                raise ValueError(
                    f"out: expected one folder for all processes, found {checkpoint.LAST} in {out} by process "
                    f"{found.index(True)}, but not by process {found.index(False)}"
                )
            if not found[0]:
                statistics = judge(config, train_data, val_data, workers)
            run = Run(
                config, own, train_data, val_data, statistics, Path(out), place, workers, log_to, show, interrupts
            )
            if run.step > 0:
                record(run.environment)
            if run.due(config.eval_every) and run.evaluated < run.step:  # it was killed during the evaluation
                run.evaluate()
            if run.step == 0:
                warn_about_images(config, len(train_data), statistics)
                run.validation.save_preview(0)
            for batch in run.batches():
                values, stop = run.train_step(batch)
                record(run.environment)
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
                    if run.is_over:
                        break
            return run.finish()
