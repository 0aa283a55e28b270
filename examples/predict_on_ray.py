"""Predicts every image in a folder on Ray Data: several actors, on one machine or on a cluster.

python examples/predict_on_ray.py photos --model apcnet.safetensors --out seen --actors 2

The folder may be an address such as s3://bucket/photos, and every node has to reach the model file. Ray starts an actor
anew that has died, and gives its images to others. Without arguments the example makes images and a small model first.
Needs the extra `ray`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import ray
from PIL import Image

import apcnet
from apcnet.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", help="Predict all images in this folder and its sub-folders.")
    parser.add_argument("--model", type=Path, help="Use this model file, best.safetensors of a run say.")
    parser.add_argument("--out", type=Path, default=Path("seen"), help="Write label maps here.")
    parser.add_argument("--actors", type=int, default=2, help="Predict with up to this many actors.")
    parser.add_argument("--gpus", type=float, default=0, help="Give each actor this many GPUs.")
    parser.add_argument("--steps", type=int, default=300, help="Train the small model for this many steps.")
    args = parser.parse_args()
    if (args.images is None) != (args.model is None):
        parser.error("give a folder of images and --model, or neither of them")
    if args.images is None:
        args.images, args.model = str(scenes(args.out / "scenes")), small_model(args.out / "model", args.steps)

    folder = args.images if "://" in args.images else str(Path(args.images).resolve())
    place = folder.partition("://")[2] or folder  # as it stands in the rows
    files = ray.data.read_binary_files(folder, include_paths=True)
    predicted = files.map_batches(
        apcnet.Predictor,  # loaded once by each actor
        fn_constructor_args=[args.model.resolve()],
        batch_size=16,
        concurrency=(1, args.actors),  # a machine of few cores needs one to read
        num_gpus=args.gpus,
    )
    done = failed = 0
    for row in predicted.select_columns(["path", "labels", "error"]).iter_rows():
        if row["error"]:
            failed += 1
            print(f"{row['path']}: {row['error']}")
        else:
            done += 1
            out = (args.out / row["path"].partition(place)[2].lstrip("/")).with_suffix(".png")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(row["labels"])
    print(f"{args.out}: {done} images, {failed} failed")


def scenes(folder: Path) -> Path:
    """Writes some generated scenes, so that there is something to predict."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, _, name in list(apcnet.data.open("synthetic", split="test", length=40)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder


def small_model(folder: Path, steps: int) -> Path:
    config = replace(preset("tiny"), steps=steps, eval_every=steps, save_every=steps)
    apcnet.train(config, folder, device="cpu")
    return folder / "final.safetensors"


if __name__ == "__main__":
    main()
