"""Defines a data set, model, loss, augmentation and callback such as users pass to `apcnet.train`.

Run as a program, it trains with all of them in the folder it is given, for tests that kill it.
"""

import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import apcnet
from apcnet.config import Config, Data, Optimisation
from apcnet.data.synthetic import Synthetic
from apcnet.models import Output


class Scenes:
    """Holds generated scenes as pairs of image and mask, with nothing but what a data set needs."""

    classes = Synthetic.classes

    def __init__(self, split: str, length: int):
        self.scenes = Synthetic(split, length=length, size=(48, 52))

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        image, mask, _ = self.scenes[index]
        return image, mask


class Net(nn.Module):
    """Returns logits at half the size of the images."""

    def __init__(self, classes: int = 9):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.classifier = nn.Conv2d(8, classes, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.classifier(self.stem(images))


class TwoHeads(Net):
    """Returns the logits of two heads."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(8, 9, 1)

    def forward(self, images):
        features = self.stem(images)
        return Output(self.classifier(features), aux=self.second(features))


class Smoothed:
    """Computes a cross entropy with smoothed labels, and a penalty of large logits."""

    def __init__(self, smoothing: float = 0.1):
        self.smoothing = smoothing

    def __call__(self, output, target):
        logits = F.interpolate(output.logits, target.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, target.long(), ignore_index=255, label_smoothing=self.smoothing)
        return {"smoothed": loss, "size": 1e-3 * output.logits.square().mean()}


def noisy(image, mask, generator):
    """Crops and flips by Python's global generator, and adds noise by PyTorch's and the generator."""
    top = random.randint(0, image.shape[1] - 32)
    image, mask = image[:, top : top + 32, :32], mask[top : top + 32, :32]
    if random.random() < 0.5:
        image, mask = image.flip(2), mask.flip(1)
    noise = torch.randint(-9, 9, image.shape) + torch.randint(-9, 9, image.shape, generator=generator)
    return (image + noise).clamp(0, 255).to(torch.uint8), mask


def config(**changes) -> Config:
    """Returns the config of a small run."""
    given = {"steps": 12, "batch_size": 4, "eval_every": 6, "save_every": 3, "optimisation": Optimisation(lr=0.05)}
    return Config(**{"data": Data(crop=(32, 32)), **given, **changes})


def objects() -> dict:
    """Returns one object of each kind."""
    return {
        "data": Scenes("train", 11),
        "val_data": Scenes("val", 3),
        "model": Net,
        "loss": Smoothed(),
        "augment": noisy,
    }


def main(folder: Path, steps: int, workers: int) -> None:
    def note(record):
        with folder.with_suffix(".records").open("a") as file:
            file.write(json.dumps(record) + "\n")

    torch.set_num_threads(1)
    apcnet.train(config(steps=steps), folder, **objects(), callbacks=[note], workers=workers, log_every=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
