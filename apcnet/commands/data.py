"""Checks, imports, prepares and packs datasets: the commands check, import-data, prepare and pack."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from apcnet.commands import PROBLEMS_FOUND, Workers
from apcnet.console import progress_bar, progress_steps
from apcnet.files import write_json
from apcnet.presets import recipe_for
from apcnet.threads import default_workers


def check(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    root: Positional[Annotated[str, arg(metavar="ROOT")]],
    splits: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = (),
    labels: dict[int, int] | None = None,
    json: Path | None = None,
    pictures: Path | None = None,
    preset: Annotated[str | None, arg(help_behavior_hint="(default: folder, or APCNet's recipe)")] = None,
    examples: int = 5,
    workers: Annotated[int | None, arg(help_behavior_hint="(default: one per core)")] = None,
) -> None:
    """Read every file of a dataset, and report problems and remedies. The exit status is 1 if it cannot be used.

    Args:
        name: Check this dataset: cityscapes, ade20k, voc2012, pascal_context, folder for your own, or shards.
        root: Read it from this folder, which holds leftImg8bit, images or JPEGImages, or shards from an address.
        splits: Check only these splits; by default those for training and evaluation.
        labels: Map values in masks to classes: `0 0 255 1` maps 0 to class 0 and 255 to class 1 (folder only).
        json: Write the report to this file too, with class weights for training.
        pictures: Draw the first crops of a training run to this file, NAME.png, as its augmentation makes them.
        preset: Draw them with the augmentation of this preset.
        examples: Name up to this many files per problem.
        workers: Decode files with this many processes.
    """
    options = {} if labels is None else {"labels": labels}
    if options and name != "folder":
        raise ValueError(f"labels: expected with folder only, got them with {name}")
    for flag, path in (("json", json), ("pictures", pictures)):
        if path is not None and not path.parent.is_dir():  # before hours of reading, not after them
            raise FileNotFoundError(f"{flag}: expected a file in an existing folder, got {path}")
    from apcnet.data.doctor.check import check as check_dataset

    with progress_bar("checking") as progress:
        report = check_dataset(
            name, root, splits=splits, examples=examples, workers=workers, progress=progress, **options
        )
    print(report.text(), end="")
    if json is not None:
        write_json(json, report.json())
    if not report.ok:
        sys.exit(PROBLEMS_FOUND)
    if pictures is not None:
        from apcnet import draw
        from apcnet.training.batches import sheet
        from apcnet.training.start import open_data

        config = recipe_for(name, preset)
        data = dataclasses.replace(config.data, dataset=name, root=root, labels=labels)
        draw.save(sheet(dataclasses.replace(config, data=data), open_data(data, data.split)), pictures)
        print(f"pictures {pictures}")


def prepare(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    source: Path | None = None,
) -> None:
    """Create the masks and lists that a benchmark's download lacks. Existing files are kept.

    Args:
        name: Prepare this dataset: cityscapes, voc2012 or pascal_context.
        root: Write to this folder, which holds leftImg8bit or JPEGImages.
        source: Read annotations from this folder of SBD that holds cls (voc2012), or JSON file (pascal_context).
    """
    from apcnet.data.prepare import prepare as prepare_dataset

    with progress_bar("preparing") as progress:
        written, kept = prepare_dataset(name, root, source, progress)
    print(f"{root}: {written} files written, {kept} already there")


def pack(
    name: Positional[Annotated[str, arg(metavar="NAME")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    root: Path | None = None,
    splits: Annotated[tuple[str, ...], arg(help_behavior_hint="(default: train val)")] = ("train", "val"),
    classes: Literal[59, 60] | None = None,
    labels: dict[int, int] | None = None,
    samples: int = 1000,
    workers: Workers = None,
) -> None:
    """Pack a dataset into tar files, to train on them from a disk, a web server or an object store.

    The files are WebDataset's. A pack that was stopped goes on.

    Args:
        name: Pack this dataset: cityscapes, ade20k, voc2012, pascal_context, folder or synthetic.
        out: Write the shards and their index to this folder, which is new or empty.
        root: Read the dataset from this folder; only synthetic needs none.
        splits: Pack these splits.
        classes: Use 59 classes, or 60 with the background (pascal_context only).
        labels: Map values in masks to classes: `0 0 255 1` maps 0 to class 0 and 255 to class 1 (folder only).
        samples: Put this many samples in each shard.
        workers: Decode and write with this many processes.
    """
    from apcnet.data.shards.pack import pack as pack_dataset

    for given, owner in (({"classes": classes}, "pascal_context"), ({"labels": labels}, "folder")):
        for option, value in given.items():
            if value is not None and name != owner:
                raise ValueError(f"{option}: expected with {owner} only, got {value} with {name}")
    options = {key: value for key, value in (("classes", classes), ("labels", labels)) if value is not None}
    with progress_bar("packing") as progress:
        packed = pack_dataset(
            name,
            out,
            root,
            splits=splits,
            samples=samples,
            workers=default_workers() if workers is None else workers,
            progress=progress,
            **options,
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in packed.samples.items())
    print(f"{out}: {counts} samples; {packed.written} shards written, {packed.kept} already there")
    print(shlex.join(["apcnet", "train", "--dataset", "shards", "--root", str(out)]), "trains on it")


def import_data(
    source: Positional[Annotated[Path, arg(metavar="SOURCE")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    classes: Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    groups: str | None = None,
) -> None:
    """Convert the annotations of other tools to a folder to train on. The source stays as it is.

    Reads COCO, YOLO segmentation, LabelMe, CVAT, Label Studio, Roboflow masks, VOC and Cityscapes folders, and images
    with masks of any values or colours. An import that was stopped goes on. The exit status is 1 if `apcnet check`
    finds that the result cannot be used.

    Args:
        source: Read this folder, or the file of annotations in it.
        out: Write images, masks, classes.txt and a sheet of examples to this folder.
        classes: Read the names of classes from this file, and their colours for coloured masks.
        val_share: Give this share of the images to val, if the source is not split into train and val.
        seed: Choose them by this seed.
        groups: Keep the images together in whose names this regular expression matches the same text.
    """
    from apcnet.data.doctor.check import check as check_dataset
    from apcnet.data.imports.convert import convert as convert_source

    with progress_steps() as progress:
        made = convert_source(
            source, out, classes=classes, val_share=val_share, seed=seed, groups=groups, progress=progress
        )
        progress("checking", 0, 1)
        report = check_dataset("folder", out, progress=lambda done, total: progress("checking", done, total))
    splits = ", ".join(f"{count} {split}" for split, count in sorted(made.splits.items(), reverse=True))
    print(f"{source} holds {made.format}: {sum(made.splits.values())} images, {len(made.classes)} classes")
    for note in made.notes:
        print(f"note: {note}")
    print(f"{out}: {splits}; {made.written} images written, {made.kept} already there; see {out / 'examples.png'}\n")
    print(report.text())
    if not report.ok:
        sys.exit(PROBLEMS_FOUND)
    print(shlex.join(["apcnet", "train", "folder", "--root", str(out)]), "trains on it")


import_data.__name__ = "import"  # the name of the command is a keyword of Python
