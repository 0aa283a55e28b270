"""Checks a data set for `apcnet check`: decodes every file once and reports defects with their probable causes.

A file that cannot be read becomes a finding, not an exception, so that the report covers all files.
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
from apcnet.data.doctor.diagnosis import Inspection, Inspector, Problem, label_of, problem_of_values
from apcnet.data.doctor.report import SEVERITY, Finding, Report, Split, is_training
from apcnet.data.files import Files, Pair
from apcnet.data.folder import import_command
from apcnet.data.levels import Form
from apcnet.data.sample import IGNORE
from apcnet.data.shards import splits_of
from apcnet.data.statistics import Statistics
from apcnet.data.stream import loader

SAMPLE = 256  # of each split: the pairs of files that training judges before its first step; `check` judges all
MOST = 0.5  # the share of ignored pixels above which they may well be a class
CONVERTED = ("mask without indices", "labels out of range", "nothing to learn", "palette disagrees")  # by an import
SAME = "the decoded pixels are equal"


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
    """Reads every file of a data set and reports what is wrong; the report is the same for any number of workers.

    Two images count as the same if their decoded pixels are equal, whatever their names and compression.

    Args:
        name: The data set, as for `apcnet.data.open`.
        root: Its folder, as for `apcnet.data.open`.
        splits: The splits to check. None for train and val; for voc2012 trainaug replaces train if it exists; for
            folder, as for training, those that are made of all images if there are none; for shards all splits.
        workers: The number of processes that decode; 0 decodes in this process, None takes one for each core.
        examples: The number of files that each finding names; its count includes all.
        progress: Is called with the number of checked pairs of files, and of all pairs.
        options: More arguments of the data set, as for `apcnet.data.open`.

    Returns:
        The report: `report.ok`, `report.text()`, `report.json()`, `report.findings` and `report.class_weights()`.

    Example:
        >>> report = check("folder", "my data")
        >>> print(report.text())
    """
    check_choice(name, "name", (*data.ON_DISK, "shards"))
    if examples < 1:
        raise ValueError(f"examples: expected 1 or more, got {examples}")
    notes, opened, unused = _Notes(examples), {}, set()
    for split in dict.fromkeys(splits or _default_splits(name, root)):
        if (files := _open(name, root, split, options, notes, unused, asked=bool(splits))) is not None:
            opened[split] = files
    return _judge(name, root, opened, notes, workers, progress)


def judge(name: str, root: str | Path, opened: Mapping[str, Files], workers: int | None = None) -> Report:
    """Judges splits that training has opened as `check` does, from at most SAMPLE pairs of files of each."""
    some = {}
    for split, files in opened.items():
        chosen = files.pairs[:: -(-len(files) // SAMPLE)]
        some[split] = Files(chosen, files.classes, files.palette, files.labels)
    whole = all(len(some[split]) == len(files) for split, files in opened.items())
    return _judge(name, root, some, _Notes(1), workers, None, whole)


def _judge(
    name: str,
    root: str | Path,
    opened: Mapping[str, Files],
    notes: "_Notes",
    workers: int | None,
    progress: Callable[[int, int], None] | None,
    whole: bool = True,
) -> Report:
    """Inspects the files of all splits; only if these are `whole`, classes can be missing from them."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    inspections = _inspect_all(opened.values(), workers, progress)
    statistics = {}
    for split, files in opened.items():
        for pair in files.pairs:
            for problem in inspections[pair].problems:
                notes.add(split, problem, pair.name)
        masks = {pair.name: values for pair in files.pairs if (values := inspections[pair].values) is not None}
        statistics[split] = _count(files, masks)
        _note_labels(name, split, files, masks, statistics[split], notes, whole)
    _note_duplicates(opened, inspections, notes)
    classes = next((tuple(files.classes) for files in opened.values()), ())
    findings = notes.findings()
    convertible = name == "folder" and any(finding.kind in CONVERTED for finding in findings)
    conversion = import_command(root) if convertible else None
    return Report(name, str(root), classes, statistics, findings, conversion, _measure(opened, inspections))


class _Notes:
    """Collects problems, counts them by split, kind and cause, and keeps the first few as examples."""

    def __init__(self, examples: int):
        self.examples, self.found = examples, {}

    def add(self, split: str, problem: Problem, name: str, values: Mapping[int, int] | None = None) -> None:
        new = Finding(problem.kind, split, 0, problem.cause, [], dict(values or {}))
        finding = self.found.setdefault((split, problem.kind, problem.cause), new)
        finding.count += 1
        if len(finding.examples) < self.examples:
            example = f"{name}: {problem.detail}" if problem.detail else name
            finding.examples.append(example.encode(errors="backslashreplace").decode())  # names may not be UTF-8

    def findings(self) -> tuple[Finding, ...]:
        """Returns the findings in the order of SEVERITY; those of one kind in the order they were added."""
        kinds = list(SEVERITY)
        return tuple(sorted(self.found.values(), key=lambda finding: kinds.index(finding.kind)))


def _default_splits(name: str, root: str | Path) -> Sequence[str]:
    if name == "shards":
        return splits_of(root)
    if name == "voc2012":
        lists = layout.find_root(root, "JPEGImages", voc2012.PLACES) / "ImageSets" / "Segmentation"
        augmented = any((lists / f"{each}.txt").is_file() for each in ("trainaug", "aug"))
        return ("trainaug" if augmented else "train", "val")
    return ("train", "val")


def _open(
    name: str, root: str | Path, split: str, options: dict, notes: _Notes, unused: set[Path], asked: bool
) -> Files | None:
    """Opens the samples of a split that are complete, and notes the files that are missing."""
    try:
        if name == "shards":  # packed from complete samples
            return data.open(name, root, split, **options)
        listing = data.ON_DISK[name](root, split, **options)
    except (OSError, ValueError) as error:
        if str(error).partition(":")[0] in ("root", "classes", *(["split"] if asked else []), *options):
            raise  # an argument is wrong, not the data
        notes.add(split, Problem("split not opened", "none of its files were checked"), str(error))
        return None
    for kind, samples, folder in listing.missing():
        for sample in samples:
            hint = listing.hint if kind == "mask" else ""
            notes.add(split, Problem(f"{kind} missing", f"not found in {folder}{hint}"), sample)
    for sample in sorted(listing.masks.keys() - listing.images.keys() - set(listing.names)):
        if listing.masks[sample] not in unused:  # several splits may share a folder of masks
            unused.add(listing.masks[sample])
            problem = Problem("mask of no image", f"not used, because {listing.image_folder} has no image of its name")
            notes.add(split, problem, sample)
    return listing.complete()


def _inspect_all(
    opened: Iterable[Files], workers: int, progress: Callable[[int, int], None] | None
) -> dict[Pair, Inspection]:
    """Inspects each pair of files once, even if it belongs to several splits."""
    opened, report = list(opened), progress or (lambda done, total: None)
    pairs = list(dict.fromkeys(pair for files in opened for pair in files.pairs))
    inspections = {}
    report(0, len(pairs))
    if pairs:
        inspector = Inspector(pairs, opened[0].palette, opened[0].labels, _form_of(opened))
        for pair, inspection in zip(pairs, loader(inspector, range(len(pairs)), workers), strict=True):
            inspections[pair] = inspection
            report(len(inspections), len(pairs))
    return inspections


def _form_of(opened: Iterable[Files]) -> Form | None:
    """Returns the form of the first image that can be read; the others are judged by it."""
    for files in opened:
        try:
            return files.form
        except (OSError, ValueError):  # which becomes a finding of this image
            continue
    return None


def _measure(opened: Mapping[str, Files], inspections: Mapping[Pair, Inspection]) -> Statistics | None:
    """Measures the levels of the training images, or of all images without a training split."""
    form = _form_of(opened.values())
    splits = [files for split, files in opened.items() if is_training(split)] or list(opened.values())
    moments = [inspections[pair].moments for files in splits for pair in files.pairs]
    return None if form is None else Statistics.over(form.kind, filter(None, moments))


def _count(files: Files, masks: Mapping[str, Mapping[int, int]]) -> Split:
    """Adds up the values of a split's masks, by value and by class."""
    values, images = Counter(), Counter()
    for mask in masks.values():
        values.update(mask)
        images.update(_labels_in(mask, files))
    pixels = Counter()
    for value, count in values.items():
        pixels[label_of(value, files.labels)] += count
    count = range(len(files.classes))
    return Split(
        samples=len(files),
        masks_read=len(masks),
        pixels=tuple(pixels[label] for label in count),
        images=tuple(images[label] for label in count),
        ignored_pixels=pixels[IGNORE],
        stored_values=dict(sorted(values.items())),
    )


def _labels_in(mask: Mapping[int, int], files: Files) -> set[int]:
    return {label_of(value, files.labels) for value in mask}


def _note_labels(
    name: str,
    split: str,
    files: Files,
    masks: Mapping[str, Mapping[int, int]],
    counted: Split,
    notes: _Notes,
    whole: bool,
) -> None:
    """Notes the problems of the values in masks that could be read."""
    problem = problem_of_values(counted.stored_values, name, files)
    for sample, mask in masks.items():
        unknown = [value for value in mask if label_of(value, files.labels) == UNKNOWN]
        if problem and problem.kind == "labels out of range":
            if unknown:
                where = ", ".join(f"{value} at {mask[value]} pixels" for value in unknown[:3])
                detail = where + (f", and {len(unknown) - 3} more values" if len(unknown) > 3 else "")
                notes.add(split, problem._replace(detail=detail), sample, counted.stored_values)
                continue
        elif problem:
            notes.add(split, problem, sample, counted.stored_values)
            continue
        if _labels_in(mask, files) == {IGNORE}:
            notes.add(split, Problem("mask ignored as a whole", "no pixel has a class"), sample)
    kind, cause = (
        ("class never trained", "no pixel has these classes, so a network cannot learn them")
        if is_training(split)
        else ("class never tested", "no pixel has these classes: they have no IoU, the mean is over the others")
    )
    ignored = counted.ignored_pixels / max(1, sum(counted.stored_values.values()))
    if MOST < ignored < 1 and not problem:
        values = ", ".join(str(v) for v in counted.stored_values if label_of(v, files.labels) == IGNORE)
        hint = "; if it is a class, list it in classes.txt and add --labels VALUE INDEX …" if name == "folder" else ""
        problem = Problem("most pixels ignored", f"the value {values} is ignored{hint}")
        notes.add(split, problem, f"{ignored:.0%} of all pixels")
    if masks and whole:
        for label, pixels in enumerate(counted.pixels):
            if not pixels:
                notes.add(split, Problem(kind, cause), files.classes[label])


def _note_duplicates(opened: Mapping[str, Files], inspections: Mapping[Pair, Inspection], notes: _Notes) -> None:
    places = defaultdict(lambda: defaultdict(list))  # the names of each image, by split
    for split, files in opened.items():
        for pair in files.pairs:
            if digest := inspections[pair].digest:
                places[digest][split].append(pair.name)
    for splits in places.values():
        for split, names in splits.items():
            for name in names[1:]:
                notes.add(split, Problem("image twice in a split", SAME, f"the same as {names[0]}"), name)
        for first, second in combinations(splits, 2):
            if is_training(first) and is_training(second):
                continue  # trainaug contains train
            leak = ": a test image was seen in training" if is_training(first) or is_training(second) else ""
            problem = Problem("image in two splits", SAME + leak, f"the same as {splits[second][0]} of {second}")
            notes.add(f"{first} and {second}", problem, f"{splits[first][0]} of {first}")
