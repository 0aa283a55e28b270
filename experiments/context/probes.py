"""Probes why a head misses what another finds on regional scenes: repeats a run of `--full` with one change.

To label fabric in an image with two cues, a position has to know which half it lies in, and which cue that half shows.
The probes separate the two:

- which half: the labels of fabric are the two halves instead of the three cues, so that only the surroundings count.
- position given: two channels of the backbone's last map hold the coordinates of each position, from -1 to 1.

A third probe, four times as long, is a normal run with three seeds, to see if a head learns the task at all. Probes are
in none of the other tables; the report shows them separately.
"""

import torch
from torch import Tensor, nn

from apcnet.config import Config
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.stream import Batches
from apcnet.data.synthetic import BAND, FABRIC, Synthetic
from apcnet.inference.evaluation import evaluate
from apcnet.training.start import augmentation, initial_model, open_data
from apcnet.training.step import Trainer

HALF, PLACED = "which half", "position given"


class Halves(Synthetic):
    """Relabels the fabric of regional scenes by the half it lies in: two classes instead of three."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample._replace(mask=halves(sample.mask))


def halves(mask: Tensor) -> Tensor:
    """Relabels fabric as class 6 in the half that holds the upper left corner, and as 7 in the other half."""
    corner = mask[1, 1] - BAND  # the cue of its half: bands lie along the border
    fabric = (mask >= FABRIC) & (mask != IGNORE)
    return torch.where(fabric, FABRIC + (mask - FABRIC != corner), mask).to(mask.dtype)


class Placed(nn.Module):
    """Replaces two channels of a backbone's last map by the coordinates of its positions."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        *features, x = self.backbone(images)
        rows, columns = (torch.linspace(-1, 1, side) for side in x.shape[2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(x)
        return [*features, torch.cat([place.expand(len(x), -1, -1, -1), x[:, 2:]], 1)]


def train(config: Config, change: str) -> dict:
    """Trains as apcnet.train does, with a change that no config has, and returns the content of metrics.json."""
    data, held_out = (open_data(config.data, split) for split in (config.data.split, config.data.val_split))
    model = initial_model(config, data)
    augmented = augmentation(config.data, model)

    def relabelled(sample: Sample, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image, mask = augmented(sample, generator)  # first: in a mirror image the halves have changed places
        return image, halves(mask)

    if change == PLACED:
        model.backbone = Placed(model.backbone)
    if change == HALF:
        held_out = Halves(config.data.val_split, **config.data.open_options())
    transform = relabelled if change == HALF else augmented
    trainer = Trainer(model, config)
    batches = Batches(data, transform, config.seed, config.batch_size)
    for step in range(config.steps):
        batch = batches[step]
        trainer.step(step, batch.images, batch.masks)
    iou = evaluate(trainer.result, held_out, config.evaluation).scores().iou
    fabric = iou[FABRIC : FABRIC + 2] if change == HALF else iou[list(Synthetic.context_classes)]
    return {"step": config.steps, "context_miou": float(fabric.mean())}
