"""Trains a model in a loop of your own: apcnet's model and data, PyTorch's loader and optimiser.

python examples/training_loop.py --model pspnet --steps 200

It trains on generated scenes. Replace the two calls of apcnet.data.open by your data set's: "cityscapes", "ade20k",
"voc2012", "pascal_context" or "folder" with a root. The losses never form upsampled logits, nor does the evaluation.
"""

import argparse
import functools

import torch
from torch.utils.data import DataLoader, Dataset

import apc_kernels
import apcnet
from apcnet.data import augment


class Crops(Dataset):
    """Random crops of a data set, flipped and distorted as in mmsegmentation; item i is a function of i alone."""

    def __init__(self, data, transform, length: int):
        self.data, self.transform, self.length = data, transform, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.transform(self.data[i % len(self.data)], torch.Generator().manual_seed(i))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="apcnet", help="Train apcnet, pspnet, encnet, semantic_fpn or fcn.")
    parser.add_argument("--steps", type=int, default=150, help="Train for this many steps of 8 images.")
    parser.add_argument("--lr", type=float, default=2e-2, help="Use this learning rate at its highest.")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    train, val = (apcnet.data.open("synthetic", split=split, length=n) for split, n in (("train", 4096), ("val", 64)))
    model = apcnet.create(args.model, "tiny", len(train.classes), width=32, channels=32, auxiliary_channels=0)
    model.classes, model.palette = train.classes, train.palette  # saved with the weights
    model.to(device)
    transform = functools.partial(augment.train, crop_size=(96, 96), scale=(96, 96), ratio_range=(1, 1))
    batches = DataLoader(Crops(train, transform, 8 * args.steps), batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)

    model.train()
    for step, (images, masks) in enumerate(batches):
        losses = model(images.to(device), masks.to(device))  # decode.loss_ce, and others that a model has
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == args.steps - 1:
            print(f"step {step}  loss {loss.item():.3f}")

    model.eval()
    matrix = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64, device=device)
    with torch.no_grad():
        for image, mask, _ in list(val):
            logits = model(augment.normalise(image, model.mean, model.std)[None].to(device))
            matrix += apc_kernels.upsample_confusion(logits, mask[None].to(device))
    right, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
    print(f"mIoU {(right / union).nanmean():.1%}, pixel accuracy {right.sum() / matrix.sum():.1%}")


if __name__ == "__main__":
    main()
