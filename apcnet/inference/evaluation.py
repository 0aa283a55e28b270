"""Evaluates a model on a data set: counts every image into one confusion matrix, on any number of processes.

Each of N processes takes every N-th image, and the counts are summed at the end. They are integers, so the result does
not depend on the number of processes. Memory holds only the current image and those that loaders have ready. A protocol
(apcnet.inference.protocol) defines the scales, windows and flips.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apcnet import inference
from apcnet.config import Precision, Protocol
from apcnet.confusion import ConfusionMatrix
from apcnet.data.augment import check_channels, check_sample, view, view_sizes
from apcnet.data.own import own_data
from apcnet.data.sample import IGNORE, Dataset, SampleError
from apcnet.data.stream import loader
from apcnet.distributed import rank, reached, world_size
from apcnet.inference.measures import BoundaryIoU, Calibration, MeanLoss, PerImage
from apcnet.inference.protocol import WHOLE
from apcnet.models.segmentor import Segmentor, count_labels


def evaluate(
    model: Segmentor,
    dataset: Dataset,
    protocol: Protocol = WHOLE,
    *,
    workers: int = 0,
    precision: Precision = "float32",
    channels_last: bool = False,
    progress: Callable[[int, int], None] | None = None,
    submission: Callable[[str, Tensor], None] | None = None,
    images: PerImage | None = None,
    boundary: BoundaryIoU | None = None,
    calibration: Calibration | None = None,
    loss: MeanLoss | None = None,
) -> ConfusionMatrix:
    """Computes the confusion matrix of a model on a data set; every process of a group must call it.

    Args:
        model: A Segmentor, or a module that maps normalised images to logits and has `num_classes`, `align_corners`,
            `mean` and `std`. It runs in evaluation mode on its own device; its mode is restored afterwards.
        dataset: A data set, such as `apcnet.data.open` returns, or one of your own as for `apcnet.train`.
        protocol: Scales, windows and flips; by default the model sees each whole image at its own size.
        workers: Number of additional processes that read and resize images.
        precision: Precision of the matrix products: "float32", "bfloat16" or "float16" (autocast).
        channels_last: Pass images to the model in the channels_last layout.
        progress: Called with the number of images that this process has finished, and its total.
        submission: Called with the name and the labels, (H, W) on the CPU, of each image of this process, in order;
            `apcnet.inference.submission.writer` returns one that writes files.
        images, boundary, calibration, loss: Measures (apcnet.inference.measures) to take besides, empty ones: they hold
            the results over all processes afterwards. The network runs once, whatever is asked for.

    Returns:
        The confusion matrix over all processes; `matrix.scores()` computes IoU and accuracy.

    Example:
        >>> matrix = evaluate(model, apcnet.data.open("ade20k", "ADEChallengeData2016"))
        >>> matrix.scores().miou
        >>> loss = MeanLoss()
        >>> evaluate(model, dataset, loss=loss)
        >>> loss.mean
    """
    dataset = own_data(dataset, "dataset")
    if not len(dataset):
        raise ValueError("dataset: expected at least one sample, got none")
    classes = count_labels(model)
    if len(dataset.classes) != classes:
        raise ValueError(f"dataset: expected {classes} classes, as the model has, got {len(dataset.classes)}")
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    mine = range(rank(), len(dataset), world_size())
    is_rgb = getattr(model, "range", None) is None and len(model.mean) == 3
    inputs = Inputs(dataset, protocol, model.mean, model.std, is_rgb)
    matrix = ConfusionMatrix(classes, IGNORE, device)
    report = progress or (lambda done, total: None)
    report(0, len(mine))
    with inference.in_evaluation(model, precision):
        model = inference.prepare(model) if precision == "float32" else model
        for done, (views, mask, name) in enumerate(loader(inputs, mine, workers, pin_memory=on_gpu), 1):
            views = (view[None].to(device, memory_format=layout, non_blocking=True) for view in views)
            target = mask[None].to(device, non_blocking=True)
            seen = inference.assess(
                model,
                views,
                target,
                protocol,
                labels=submission is not None or boundary is not None,
                confidence=calibration is not None,
                loss=loss is not None,
                ignore_index=IGNORE,
            )
            matrix.add(seen.counts)
            if images is not None:
                images.update(name, seen.counts)
            if submission is not None:
                submission(name, seen.labels[0].cpu())
            if boundary is not None:
                boundary.update(seen.labels[0], target[0])
            if calibration is not None:
                calibration.update(seen.confidence[0], seen.labels[0], target[0])
            if loss is not None:
                loss.update(seen.loss, int(seen.counts.sum()))
            reached()
            report(done, len(mine))
    for measure in (images, boundary, calibration, loss):
        if measure is not None:
            measure.reduce()
    return matrix.reduce()


class Inputs:
    """Prepares samples for loaders: normalised views (3, h, w) at every ratio, the original mask (H, W), the name."""

    def __init__(
        self, dataset: Dataset, protocol: Protocol, mean: Sequence[float], std: Sequence[float], is_rgb: bool = True
    ):
        self.dataset, self.protocol, self.mean, self.std, self.is_rgb = dataset, protocol, mean, std, is_rgb

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, str]:
        try:
            image, mask, name = sample = self.dataset[index]
            check_sample(sample)
            wrong = mask[(mask >= len(self.dataset.classes)) & (mask != IGNORE)]
            if len(wrong):
                most = len(self.dataset.classes) - 1
                raise ValueError(f"expected labels of 0 to {most} and {IGNORE}, got {wrong[0]}")
            sizes = view_sizes(image.shape[1:], self.protocol.ratios, self.protocol.test_scale)
            check_channels(image, len(self.mean), self.is_rgb)
            return [view(image, size, self.mean, self.std) for size in sizes], mask, name
        except Exception as error:
            name = f"sample {self.dataset.names[index]!r} (number {index} of {len(self.dataset)})"
            raise SampleError(f"{name}: {type(error).__name__}: {error}") from error
