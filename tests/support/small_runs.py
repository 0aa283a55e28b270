"""Makes training runs that take a second: generated scenes, and a network of a few thousand parameters."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from apcnet.config import Config, Data, Model, Optimisation
from apcnet.data.synthetic import Synthetic

IMAGES = {"train": 7, "val": 5}


def write_images(root: Path) -> Path:
    """Writes generated scenes as a folder dataset."""
    for split, count in IMAGES.items():
        scenes = Synthetic(split, size=(48, 56))
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image, mask, name = scenes[index]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / split / f"{name}.png")
            Image.fromarray(mask.numpy()).save(root / "masks" / split / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(Synthetic.classes) + "\n")
    return root


def small(root: Path, **changes) -> Config:
    """Returns the config of a small run on such a folder; it draws the order, augmentation and dropout at random."""
    given = {
        "model": Model("apcnet", "tiny", width=8, channels=8, dropout=0.2, auxiliary_channels=8),
        "data": Data("folder", root, crop=(48, 48), scale=(56, 48)),
        "optimisation": Optimisation(lr=0.02),
        "steps": 12,
        "batch_size": 4,
        "eval_every": 6,
        "save_every": 3,
    }
    return Config(**given | changes)


def flags(config: Config) -> list[str]:
    """Returns the command line of a small run."""
    model, data = config.model, config.data
    return [
        *("train", "folder", "--root", data.root, "--backbone", "tiny", "--width", model.width),
        *("--channels", model.channels, "--dropout", model.dropout, "--auxiliary-channels", model.auxiliary_channels),
        *("--crop", *data.crop, "--scale", *data.scale, "--test-scale", "None", "--lr", config.optimisation.lr),
        *("--steps", config.steps, "--batch-size", config.batch_size, "--eval-every", config.eval_every),
        *("--save-every", config.save_every, "--log-every", 1),
    ]


def without_pictures(monkeypatch) -> None:
    """Trains without pictures and report pages, which take most of the time of a small run."""
    monkeypatch.setattr("apcnet.training.validation.Validation._save_pictures", lambda own, indices, path: ([], []))
    monkeypatch.setattr("apcnet.training.run.report.write", lambda runs: None)
    monkeypatch.setattr("apcnet.training.run.report.write_curves", lambda run: None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(*arguments: object, processes: int = 1, **options) -> subprocess.Popen:
    """Starts `apcnet …` in one or several processes of one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "apcnet", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def train_rank(rank: int, world: int, file: str, results: dict) -> None:
    """Trains as one of several processes: with frozen batch norms, with batch norms in training, and in two parts."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results[rank] = [train_some_steps(rank, world, *settings) for settings in ((True,), (False,), (True, 2))]
    torch.distributed.destroy_process_group()


def train_some_steps(
    rank: int, world: int, frozen_norms: bool, accumulate: int = 1, steps: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains a model without dropout on every `world`-th image of some batches; returns its weights and losses."""
    import apcnet
    from apcnet.training.step import Trainer

    torch.manual_seed(0)
    model = apcnet.create("apcnet", "tiny", 3, width=8, channels=8, dropout=0.0, auxiliary_channels=8).train()
    if frozen_norms:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    settings = Optimisation(lr=0.01, reduction="mean", accumulate=accumulate)
    trainer = Trainer(model, Config(steps=steps, batch_size=4, optimisation=settings))
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        target = torch.randint(0, 3, (4, 32, 32), generator=generator, dtype=torch.uint8)
        target[torch.rand(target.shape, generator=generator) < 0.3] = 255
        target[0, :25] = 255  # unequal numbers of labelled pixels in the two processes
        images = torch.randn(4, 3, 32, 32, generator=generator)
        losses.append(trainer.step(step, images[rank::world], target[rank::world])[0]["loss"])
    return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.tensor(losses)
