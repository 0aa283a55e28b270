"""Trains a model with Lightning, which `pip install lightning` brings.

python examples/lightning_module.py --steps 100

The module holds an apcnet model. Its training step returns the sum of the model's losses; validation counts a
confusion matrix from the logits, without upsampling them. Trainer's own features (several GPUs, precision, loggers,
checkpoints) work as usual. It trains on generated scenes; replace the data sets by your own.
"""

import argparse
import functools

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

import apc_kernels
import apcnet
from apcnet.data import augment


class Segmentation(lightning.LightningModule):
    """An apcnet model, its losses, and its mIoU."""

    def __init__(self, model: str, classes: int, lr: float, **options):
        super().__init__()
        self.save_hyperparameters()
        self.model, self.lr = apcnet.create(model, num_classes=classes, **options), lr
        self.register_buffer("matrix", torch.zeros(classes, classes, dtype=torch.int64), persistent=False)

    def training_step(self, batch, batch_index):
        losses = self.model(*batch)
        self.log_dict(losses, prog_bar=True)
        return sum(losses.values())

    def validation_step(self, batch, batch_index):
        images, masks = batch
        self.matrix += apc_kernels.upsample_confusion(self.model(images), masks)

    def on_validation_epoch_end(self):
        matrix = self.all_gather(self.matrix).view(-1, *self.matrix.shape).sum(0)  # of all processes
        union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
        self.log("miou", (matrix.diag() / union).nanmean(), prog_bar=True)
        self.matrix.zero_()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Scenes(Dataset):
    """Samples of a data set as pairs of normalised image and mask."""

    def __init__(self, data, transform):
        self.data, self.transform = data, transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(self.data[i], torch.Generator().manual_seed(i))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="Train for this many steps of 8 images.")
    args = parser.parse_args()
    lightning.seed_everything(0)
    train = apcnet.data.open("synthetic", split="train", length=8 * args.steps)
    val = apcnet.data.open("synthetic", split="val", length=32)
    crops = functools.partial(augment.train, crop_size=(96, 96), scale=(96, 96), ratio_range=(1, 1))
    small = {"backbone": "tiny", "width": 32, "channels": 32, "auxiliary_channels": 0}
    module = Segmentation("apcnet", len(train.classes), lr=3e-3, **small)
    trainer = lightning.Trainer(max_epochs=1, accelerator="auto", logger=False, enable_checkpointing=False)
    trainer.fit(
        module,
        DataLoader(Scenes(train, crops), batch_size=8),
        DataLoader(Scenes(val, lambda sample, _: (augment.normalise(sample.image), sample.mask)), batch_size=8),
    )
    print(f"mIoU {trainer.callback_metrics['miou'].item():.1%} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
