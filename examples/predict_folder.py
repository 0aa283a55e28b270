"""Predicts every image in a folder: label maps and overlays.

python examples/predict_folder.py photos --model apcnet.safetensors --out seen

Without arguments it trains a small model on generated scenes, half a minute on one core, and predicts four new scenes.
`apcnet predict MODEL FOLDER` does the same from the command line.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image

import apcnet
from apcnet.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path, help="Predict all images in this folder and its sub-folders.")
    parser.add_argument("--model", type=Path, help="Use this model file, best.safetensors of a run say.")
    parser.add_argument("--out", type=Path, default=Path("seen"), help="Write label maps and overlays here.")
    parser.add_argument("--steps", type=int, default=300, help="Train the small model for this many steps.")
    args = parser.parse_args()
    if (args.images is None) != (args.model is None):
        parser.error("give a folder of images and --model, or neither of them")
    if args.images is None:
        args.images, args.model = scenes(args.out / "scenes"), small_model(args.out / "model", args.steps)

    model = apcnet.load(args.model)  # the architecture, the classes and their colours are in the file
    for path in sorted(args.images.rglob("*.[pj][np]g")):
        seen = apcnet.predict(model, path)  # labels at the image's own size
        out = args.out / path.relative_to(args.images).with_suffix(".png")
        out.parent.mkdir(parents=True, exist_ok=True)
        seen.save(out)
        seen.overlay(opacity=0.6).save(out.with_name(f"{out.stem}_overlay.png"))
        most = ", ".join(f"{name} {share:.0%}" for name, share in list(seen.shares().items())[:3])
        print(f"{path.name} -> {out}: {most}")


def scenes(folder: Path) -> Path:
    """Writes four generated scenes, so that there is something to predict."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, _, name in list(apcnet.data.open("synthetic", split="test", length=4)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder


def small_model(folder: Path, steps: int) -> Path:
    config = replace(preset("tiny"), steps=steps, eval_every=steps, save_every=steps)
    apcnet.train(config, folder, device="cpu")
    return folder / "final.safetensors"


if __name__ == "__main__":
    main()
