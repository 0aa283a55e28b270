"""Testing a model on a data set: one image after the other into one confusion matrix, on any number of processes.

Each process takes every world-th image, none twice, and at the end the counts are added up: they are integers, so that
the result does not depend on how many processes there were. Of the images only those exist that are being worked on
or that loaders have ready. What is done to one says a protocol (apcnet.inference.protocol).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from apc_kernels import augment
from apcnet import inference
from apcnet.config import Precision, Protocol
from apcnet.confusion import ConfusionMatrix
from apcnet.data.augment import check_sample, view_sizes
from apcnet.data.sample import IGNORE, Sample, SampleError
from apcnet.data.stream import loader
from apcnet.distributed import rank, world_size
from apcnet.inference.protocol import WHOLE


def evaluate(
    model: nn.Module,
    dataset: Sequence[Sample],
    protocol: Protocol = WHOLE,
    *,
    workers: int = 0,
    precision: Precision = "float32",
    channels_last: bool = False,
    progress: Callable[[int, int], None] | None = None,
    submission: Callable[[str, Tensor], None] | None = None,
) -> ConfusionMatrix:
    """The confusion matrix of a model on all images of a data set; every process of a group has to call this.

    `matrix.scores()` has the figures. Those of some classes alone, the context classes of the generated scenes say, are
    `scores.iou[list(dataset.context_classes)].nanmean()`.

    Args:
        model: a Segmentor, or a module like it: logits of normalised images, with `num_classes`, `align_corners`,
            `mean` and `std`. It is tested in evaluation mode, on the device it is on, and left in the mode it was in.
        dataset: of Samples, with `classes` and `names`.
        protocol: scales, windows, flips; not given: every image as large as it is, as a whole.
        workers: processes that read and resize images, beside this one.
        precision: of the matrix products: float32, bfloat16 or float16 (autocast).
        channels_last: hand images to the model in this layout.
        progress: is called with how many images this process has done, of how many.
        submission: is given the name and the labels, (H, W) on the CPU, of each image of this process, in their order
            (apcnet.inference.submission.writer makes one that writes files). The labels exist only then.
    """
    if not len(dataset):
        raise ValueError("dataset: expected one sample at least, it is empty")
    if len(dataset.classes) != model.num_classes:
        raise ValueError(f"dataset: has {len(dataset.classes)} classes, but the model tells {model.num_classes} apart")
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    mine = range(rank(), len(dataset), world_size())
    inputs = Inputs(dataset, protocol, model.mean, model.std)
    matrix = ConfusionMatrix(model.num_classes, IGNORE, device)
    report = progress or (lambda done, total: None)
    report(0, len(mine))
    with inference.in_evaluation(model, precision):
        for done, (views, mask, name) in enumerate(loader(inputs, mine, workers, pin_memory=on_gpu), 1):
            views = (view[None].to(device, memory_format=layout, non_blocking=True) for view in views)
            target = mask[None].to(device, non_blocking=True)
            if submission is None:
                matrix.add(inference.confusion(model, views, target, protocol, ignore_index=IGNORE))
            else:
                labels = inference.labels(model, views, protocol, size=target.shape[1:])
                matrix.update(labels, target)
                submission(name, labels[0].cpu())
            report(done, len(mine))
    return matrix.reduce()


class Inputs:
    """What loaders make of the samples of a data set: the image at every scale that it is tested at, (3, h, w)
    normalised, its mask as it is, (H, W), and its name."""

    def __init__(self, dataset: Sequence[Sample], protocol: Protocol, mean: Sequence[float], std: Sequence[float]):
        self.dataset, self.protocol, self.mean, self.std = dataset, protocol, mean, std

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, str]:
        try:
            image, mask, name = sample = self.dataset[index]
            check_sample(sample)
            wrong = mask[(mask >= len(self.dataset.classes)) & (mask != IGNORE)]
            if len(wrong):
                most = len(self.dataset.classes) - 1
                raise ValueError(f"expected labels of 0 to {most} and {IGNORE}, got {wrong[0]}")
            sizes = view_sizes(image.shape[1:], self.protocol.ratios, self.protocol.test_scale)
            return [augment(image, size, mean=self.mean, std=self.std) for size in sizes], mask, name
        except Exception as error:
            name = f"sample {self.dataset.names[index]!r} (number {index} of {len(self.dataset)})"
            raise SampleError(f"{name}: {type(error).__name__}: {error}") from error
