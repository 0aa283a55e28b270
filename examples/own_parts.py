"""Trains with a data set, model, loss, augmentation and callback of one's own.

python examples/own_parts.py --steps 200 --out runs/discs

Each is a plain object or function; the rest is apcnet's: a run that can be killed, logs, checkpoints, evaluations and a
report. The data are bright discs on noise, drawn when they are asked for. Replace any part, or leave it out.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import apcnet
from apcnet.config import Config, Data, Optimisation

SIDE, CROP = 64, 48


class Discs:
    """Gives images and masks: what a data set needs is a length, samples and the names of the classes."""

    classes = ("ground", "disc")

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(1000 * self.seed + index)
        y, x, radius = (torch.randint(8, SIDE // 2, (3,), generator=random) + torch.tensor([8, 8, 0])).tolist()
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        mask = ((rows - y) ** 2 + (columns - x) ** 2 < radius**2).to(torch.uint8)
        image = torch.randint(0, 120, (3, SIDE, SIDE), generator=random) + 60 * mask
        return image.to(torch.uint8), mask


class Net(nn.Module):
    """Returns logits at a quarter of the images' size; any size will do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.Conv2d(16, 2, 3, padding=1),
        )

    def forward(self, images):
        return self.layers(images)


def loss(output, target):
    """Returns a cross entropy and a soft Dice loss of the discs; their sum is minimised."""
    logits = F.interpolate(output.logits, target.shape[1:], mode="bilinear")
    disc, true = logits.softmax(1)[:, 1], (target == 1).float()
    dice = 1 - (2 * (disc * true).sum() + 1) / (disc.sum() + true.sum() + 1)
    return {"cross_entropy": F.cross_entropy(logits, target.long(), ignore_index=255), "dice": dice}


def augment(image, mask, generator):
    """Returns a random crop, turned at random; every choice comes from the generator."""
    top, left, turns = torch.randint(SIDE - CROP + 1, (3,), generator=generator).tolist()
    image, mask = image[:, top : top + CROP, left : left + CROP], mask[top : top + CROP, left : left + CROP]
    return image.rot90(turns % 4, (1, 2)), mask.rot90(turns % 4)


def tell(record):
    """Prints the scores of every evaluation."""
    if "miou" in record:
        print(f"after {record['step']} steps: discs {record['iou']['disc']:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/discs"), help="Keep the run in this folder.")
    parser.add_argument("--steps", type=int, default=150, help="Train for at most this many steps.")
    parser.add_argument("--patience", type=int, help="Stop after this many evaluations without a better mean Dice.")
    args = parser.parse_args()

    config = Config(
        data=Data(crop=(CROP, CROP)),
        optimisation=Optimisation(lr=0.05),
        steps=args.steps,
        eval_every=50,
        save_every=50,
        best_by="dice",
        patience=args.patience,
    )
    scores = apcnet.train(
        config,
        args.out,
        data=Discs(256, seed=0),
        val_data=Discs(32, seed=1),
        model=Net,
        loss=loss,
        augment=augment,
        callbacks=[tell],
        progress=False,
    )
    print(f"mIoU {scores['miou']:.1%} after {scores['step']} steps, report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
