"""Fine-tunes a trained model on images and masks of your own.

python examples/finetune_folder.py mydata --init apcnet.safetensors --out runs/mydata

A data set is a folder: images/train, images/val, masks/train, masks/val (PNG, a class index at each pixel, 255 where
nothing is to be learnt) and classes.txt with one name a line. The classes may be others than those of the model: its
classifier then starts afresh. Without arguments the example makes a small data set of three classes, and a model that
was trained for nine. A run that is killed goes on where it was: type the same command again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import apcnet
from apcnet.config import Config, Data, Model, Optimisation
from apcnet.presets import preset

CLASSES = {"ground": [0], "object": [1, 2, 6, 7, 8], "band": [3, 4, 5]}  # from the nine classes of generated scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, help="Train on the data set in this folder.")
    parser.add_argument("--init", type=Path, help="Start from this model file.")
    parser.add_argument("--out", type=Path, default=Path("runs/mine"), help="Keep the run in this folder.")
    parser.add_argument("--steps", type=int, default=100, help="Train for this many steps.")
    parser.add_argument("--crop", type=int, default=96, help="Train on square crops with this side.")
    args = parser.parse_args()
    if (args.root is None) != (args.init is None):
        parser.error("give the folder of a data set and --init, or neither of them")
    if args.root is None:
        args.root, args.init = make_data(args.out / "data"), make_model(args.out / "start", args.steps)

    config = Config(
        Model.of(apcnet.load(args.init).architecture, init=args.init),
        Data("folder", root=args.root, crop=(args.crop, args.crop), scale=(4 * args.crop, args.crop)),
        Optimisation(lr=0.01),
        steps=args.steps,
        eval_every=args.steps,
        save_every=args.steps,
    )
    scores = apcnet.train(config, args.out / "run")
    print(f"mIoU {scores['miou']:.1%} after {scores['step']} steps")
    for name, iou in scores["iou"].items():
        print(f"  {name:<12} {iou:.1%}")
    print(f"model: {args.out / 'run' / 'final.safetensors'}")


def make_data(root: Path) -> Path:
    """Writes generated scenes as a data set in a folder."""
    table = torch.full((256,), 255, dtype=torch.uint8)
    for index, members in enumerate(CLASSES.values()):
        table[members] = index
    for split, length in (("train", 32), ("val", 8)):
        images, masks = root / "images" / split, root / "masks" / split
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for image, mask, name in list(apcnet.data.open("synthetic", split=split, length=length)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{name}.png")
            Image.fromarray(table[mask.long()].numpy()).save(masks / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def make_model(folder: Path, steps: int) -> Path:
    """Trains a small model for the nine classes of generated scenes."""
    apcnet.train(replace(preset("tiny"), steps=steps, eval_every=steps, save_every=steps), folder)
    return folder / "final.safetensors"


if __name__ == "__main__":
    main()
