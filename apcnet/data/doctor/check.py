"""`apcnet check`: the doctor. It decodes every file of a data set once and says what is wrong, and why it probably is.

A file that cannot be read is a finding and no exception: the report is about all files, whatever the first one is like.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from apcnet import data
from apcnet.choices import check_choice
from apcnet.data import layout, voc2012
from apcnet.data.classes import UNKNOWN
from apcnet.data.doctor.diagnosis import Look, Looks, Problem, label_of, problem_of_values
from apcnet.data.doctor.report import SEVERITY, Finding, Report, Split, is_training
from apcnet.data.files import Files, Pair
from apcnet.data.sample import IGNORE
from apcnet.data.stream import loader

ALL = "all"  # what the split None is called, all images of a folder
SAME = "equal pixels once decoded"


def check(
    name: str,
    root: str | Path,
    *,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    examples: int = 5,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> Report:
    """Looks at every file of a data set; the report is the same for any number of workers.

    Two images are the same if their decoded pixels are, whatever the files are called and how they were compressed.

    Args:
        name, root, options: of the data set, as for `apcnet.data.open`.
        splits: which to look at; None: train and val, of voc2012 trainaug in place of train where it is there, of
            folder those of the two that are there, or all images where none is.
        workers: processes that decode; 0: decode in this one, None: a process for each core.
        examples: how many files each finding names; its count is of all.
        progress: is called with how many pairs of files were looked at, and how many there are.
    """
    check_choice(name, "name", data.ON_DISK)
    if examples < 1:
        raise ValueError(f"examples: expected 1 or more, got {examples}")
    notes, opened, unused = _Notes(examples), {}, set()
    for split in dict.fromkeys(splits or _default_splits(name, root)):
        if (files := _open(name, root, split, options, notes, unused)) is not None:
            opened[split] = files
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    looks = _look_at_all(opened.values(), workers, progress)
    statistics = {}
    for split, files in opened.items():
        for pair in files.pairs:
            for problem in looks[pair].problems:
                notes.add(split, problem, pair.name)
        seen = {pair.name: looks[pair].values for pair in files.pairs if looks[pair].values is not None}
        statistics[split] = _count(files, seen)
        _note_labels(name, split, files, seen, statistics[split], notes)
    _note_duplicates(opened, looks, notes)
    classes = next((files.classes for files in opened.values()), ())
    return Report(name, str(root), classes, statistics, notes.findings())


class _Notes:
    """Problems as they come, counted by split, kind and cause, and named until there are enough examples."""

    def __init__(self, examples: int):
        self.examples, self.found = examples, {}

    def add(self, split: str, problem: Problem, name: str, values: Mapping[int, int] | None = None) -> None:
        new = Finding(problem.kind, split, 0, problem.cause, [], dict(values or {}))
        finding = self.found.setdefault((split, problem.kind, problem.cause), new)
        finding.count += 1
        if len(finding.examples) < self.examples:
            example = f"{name}: {problem.detail}" if problem.detail else name
            finding.examples.append(example.encode(errors="backslashreplace").decode())  # names may be no UTF-8

    def findings(self) -> tuple[Finding, ...]:
        """In the order of the kinds, and those of one kind as they came."""
        kinds = list(SEVERITY)
        return tuple(sorted(self.found.values(), key=lambda finding: kinds.index(finding.kind)))


def _default_splits(name: str, root: str | Path) -> Sequence[str]:
    if name == "voc2012":
        lists = layout.find_root(root, "JPEGImages", voc2012.PLACES) / "ImageSets" / "Segmentation"
        augmented = any((lists / f"{each}.txt").is_file() for each in ("trainaug", "aug"))
        return ("trainaug" if augmented else "train", "val")
    if name == "folder":
        found = layout.find_root(root, "images")
        places = {split: (found / f"{split}.txt", found / "images" / split) for split in ("train", "val")}
        return [split for split, (names, images) in places.items() if names.is_file() or images.is_dir()] or (ALL,)
    return ("train", "val")


def _open(name: str, root: str | Path, split: str, options: dict, notes: _Notes, unused: set[Path]) -> Files | None:
    """What is complete of a split; what is not is noted."""
    try:
        listing = data.ON_DISK[name](root, None if split == ALL else split, **options)
    except (OSError, ValueError) as error:
        if str(error).partition(":")[0] in ("root", "split", *options):
            raise  # an argument is wrong, and not the data
        notes.add(split, Problem("split not opened", "none of its files were looked at"), str(error))
        return None
    for kind, samples, folder in listing.missing():
        for sample in samples:
            hint = listing.hint if kind == "mask" else ""
            notes.add(split, Problem(f"{kind} missing", f"there is none in {folder}{hint}"), sample)
    for sample in sorted(listing.masks.keys() - listing.images.keys() - set(listing.names)):
        if listing.masks[sample] not in unused:  # several splits may share a folder of masks
            unused.add(listing.masks[sample])
            problem = Problem("mask of no image", f"not used, there is none in {listing.image_folder}")
            notes.add(split, problem, sample)
    return listing.complete()


def _look_at_all(
    opened: Iterable[Files], workers: int, progress: Callable[[int, int], None] | None
) -> dict[Pair, Look]:
    """Once at each pair, also at those that several splits have."""
    opened, report = list(opened), progress or (lambda done, total: None)
    pairs = list(dict.fromkeys(pair for files in opened for pair in files.pairs))
    looks = {}
    report(0, len(pairs))
    if pairs:
        source = Looks(pairs, opened[0].palette, opened[0].labels)
        for pair, look in zip(pairs, loader(source, range(len(pairs)), workers), strict=True):
            looks[pair] = look
            report(len(looks), len(pairs))
    return looks


def _count(files: Files, seen: Mapping[str, Mapping[int, int]]) -> Split:
    """What the values of a split's masks add up to, by value and by class."""
    values, images = Counter(), Counter()
    for mask in seen.values():
        values.update(mask)
        images.update(_labels_in(mask, files))
    pixels = Counter()
    for value, count in values.items():
        pixels[label_of(value, files.labels)] += count
    count = range(len(files.classes))
    return Split(
        samples=len(files),
        masks_read=len(seen),
        pixels=tuple(pixels[label] for label in count),
        images=tuple(images[label] for label in count),
        ignored_pixels=pixels[IGNORE],
        stored_values=dict(sorted(values.items())),
    )


def _labels_in(mask: Mapping[int, int], files: Files) -> set[int]:
    return {label_of(value, files.labels) for value in mask}


def _note_labels(
    name: str, split: str, files: Files, seen: Mapping[str, Mapping[int, int]], counted: Split, notes: _Notes
) -> None:
    """What is wrong with the values in masks that could be read."""
    problem = problem_of_values(counted.stored_values, name, files)
    for sample, mask in seen.items():
        unknown = [value for value in mask if label_of(value, files.labels) == UNKNOWN]
        if unknown:
            where = ", ".join(f"{value} at {mask[value]} pixels" for value in unknown[:3])
            detail = where + (f", and {len(unknown) - 3} more values" if len(unknown) > 3 else "")
            notes.add(split, problem._replace(detail=detail), sample, counted.stored_values)
        elif problem and problem.kind != "labels out of range":
            notes.add(split, problem, sample, counted.stored_values)
        elif _labels_in(mask, files) == {IGNORE}:
            notes.add(split, Problem("mask ignored as a whole", "nothing in it is of a class"), sample)
    kind, cause = (
        ("class never trained", "no pixel of these classes: networks do not learn them")
        if is_training(split)
        else ("class never tested", "no pixel of these classes: they have no IoU, and the mean is over the others")
    )
    if seen:
        for label, pixels in enumerate(counted.pixels):
            if not pixels:
                notes.add(split, Problem(kind, cause), files.classes[label])


def _note_duplicates(opened: Mapping[str, Files], looks: Mapping[Pair, Look], notes: _Notes) -> None:
    places = defaultdict(lambda: defaultdict(list))  # of each image: the names it has, by split
    for split, files in opened.items():
        for pair in files.pairs:
            if digest := looks[pair].digest:
                places[digest][split].append(pair.name)
    for splits in places.values():
        for split, names in splits.items():
            for name in names[1:]:
                notes.add(split, Problem("image twice in a split", SAME, f"the same as {names[0]}"), name)
        for first, second in combinations(splits, 2):
            if is_training(first) and is_training(second):
                continue  # trainaug has all that is in train
            seen = ": what is tested was seen in training" if is_training(first) or is_training(second) else ""
            problem = Problem("image in two splits", SAME + seen, f"the same as {splits[second][0]} of {second}")
            notes.add(f"{first} and {second}", problem, f"{splits[first][0]} of {first}")
