"""Why a head misses what another finds on regional scenes: a run of `--full` once more, with one thing changed.

To label fabric in a picture with two cues, a position has to know which half it lies in, and what is seen in that half.
The probes take the two apart:

- which half: fabric's labels are the two halves instead of the three cues. Only what lies around a position tells.
- position given: two channels of the backbone's last map hold where a position lies, from -1 to 1.

A third one, four times as long, is a usual run, for three seeds: whether a head learns it at all. They enter none of
the other tables; the report shows them by themselves.
"""

import torch
from torch import Tensor, nn

import apcnet
from apcnet.config import Config
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.stream import Batches
from apcnet.data.synthetic import BAND, FABRIC, Synthetic
from apcnet.training.start import augmentation, open_data, starting_model
from apcnet.training.step import Descent

HALF, PLACED = "which half", "position given"


class Halves:
    """Regional scenes whose fabric is labelled by the half it lies in: two classes where there were three."""

    def __init__(self, scenes: Synthetic):
        self.scenes, self.classes, self.names = scenes, scenes.classes, scenes.names

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.scenes[index]
        return Sample(image, halves(mask), name)


def halves(mask: Tensor) -> Tensor:
    """Fabric becomes class 6 in the half that holds the upper left corner, 7 in the other one."""
    corner = mask[1, 1] - BAND  # the cue of its half: bands lie along the border
    fabric = (mask >= FABRIC) & (mask != IGNORE)
    return torch.where(fabric, FABRIC + (mask - FABRIC != corner), mask).to(mask.dtype)


class Placed(nn.Module):
    """A backbone whose last map says where its positions lie."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        *features, x = self.backbone(images)
        height, width = x.shape[2:]
        rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
        columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
        shape = len(x), 1, height, width
        return [*features, torch.cat([rows.expand(shape), columns.expand(shape), x[:, 2:]], 1)]


def train(config: Config, change: str) -> dict:
    """Trains as apcnet.train does, with a change that no config has; what its metrics.json is to hold."""
    data, held_out = (open_data(config.data, split) for split in (config.data.split, config.data.val_split))
    model = starting_model(config, data)
    transform = augmentation(config.data, model)
    if change == PLACED:
        model.backbone = Placed(model.backbone)
    if change == HALF:  # after augmentation: in a mirror image the halves have changed places
        augmented, held_out = transform, Halves(held_out)

        def transform(sample: Sample, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            image, mask = augmented(sample, generator)
            return image, halves(mask)

    descent = Descent(model, config)
    batches = Batches(data, transform, config.seed, config.batch_size)
    for step in range(config.steps):
        batch = batches[step]
        descent.step(step, batch.images, batch.masks)
    iou = apcnet.evaluate(descent.result, held_out, config.evaluation).scores().iou
    fabric = iou[FABRIC : FABRIC + 2] if change == HALF else iou[list(Synthetic.context_classes)]
    return {"step": config.steps, "context_miou": float(fabric.mean())}
