"""Reports the findings of `check`: as text for people, and as a dictionary for JSON."""

import math
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from apcnet.data.statistics import Statistics

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITY = {  # every kind of finding, in the order of the report; an error stops training or makes it worthless
    "split not opened": ERROR,
    "image missing": ERROR,
    "mask missing": ERROR,
    "unreadable image": ERROR,
    "unreadable mask": ERROR,
    "sizes differ": ERROR,
    "mask without indices": ERROR,
    "labels out of range": ERROR,
    "nothing to learn": ERROR,
    "mask of no image": WARNING,
    "labels shifted": WARNING,
    "most pixels ignored": WARNING,
    "palette disagrees": WARNING,
    "turned image": WARNING,
    "image in two splits": WARNING,
    "image twice in a split": WARNING,
    "class never trained": WARNING,
    "class never tested": NOTE,
    "mask ignored as a whole": NOTE,
    "warning of the decoder": NOTE,
}
RULE = (
    "ENet's 1 / ln(1.02 + share of the class's pixels), scaled so that the mean over all pixels is 1. "
    "The weights are bounded, so that no rare class outweighs the others, and the loss keeps its magnitude"
)


@dataclass
class Finding:
    """Describes one kind of defect in a split, with its cause, its number and some examples."""

    kind: str
    split: str
    count: int  # the number of files, pairs or classes, whichever the examples are
    cause: str
    examples: list[str]
    stored_values: dict[int, int]  # the pixels of each value, if they matter to the finding

    @property
    def severity(self) -> str:
        """Returns error, warning or note."""
        return SEVERITY[self.kind]


@dataclass(frozen=True)
class Split:
    """Counts the contents of a split's masks; masks that could not be read are left out."""

    samples: int  # the pairs of files
    masks_read: int
    pixels: tuple[int, ...]  # for each class
    images: tuple[int, ...]  # for each class, the images that contain it
    ignored_pixels: int
    stored_values: dict[int, int]  # the pixels of each value


@dataclass(frozen=True)
class Report:
    """Holds the result of a check: the counts of every split, and the findings from the most to the least severe."""

    dataset: str
    root: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    findings: tuple[Finding, ...]
    conversion: str | None = None  # the command that may convert the masks to ones that can be used
    images: Statistics | None = None  # the levels of the training images, if they are not 8-bit RGB

    @property
    def ok(self) -> bool:
        """Returns True if no finding is an error; there may still be warnings."""
        return not any(finding.severity == ERROR for finding in self.findings)

    def class_weights(self) -> tuple[str, list[float]] | None:
        """Returns the first training split, and a weight for each class computed from it by RULE."""
        for name, split in self.splits.items():
            if is_training(name) and sum(split.pixels):
                return name, weights_of(split.pixels)
        return None

    def json(self) -> dict:
        """Returns the report as a dictionary that JSON can hold."""
        report = {
            "dataset": self.dataset,
            "root": self.root,
            "ok": self.ok,
            "classes": self.classes,
            "findings": [{"severity": finding.severity, **asdict(finding)} for finding in self.findings],
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        if self.images:
            report["images"] = self.images.json()
        if weights := self.class_weights():
            report["class_weights"] = {"split": weights[0], "rule": RULE, "weights": weights[1]}
        return report

    def text(self) -> str:
        """Returns the report as text for a terminal."""
        lines = [f"{self.dataset} in {self.root}"]
        lines += [f"  {name}: {_extent(split)}" for name, split in self.splits.items()]
        if self.images:
            lines += [f"  images: {self.images}"]
            for measure, values in (("mean", self.images.mean), ("std", self.images.std)):
                lines.append(f"  {measure} of each channel: {' '.join(f'{value:.4g}' for value in values)}")
        for finding in self.findings:
            lines += ["", *_finding_as_lines(finding)]
        if any(split.masks_read for split in self.splits.values()):
            lines += ["", *self._table()]
        counts = [sum(finding.severity == severity for finding in self.findings) for severity in (ERROR, WARNING, NOTE)]
        counted = [f"{n} {what}{'s' * (n > 1)}" for n, what in zip(counts, (ERROR, WARNING, NOTE), strict=True) if n]
        conversion = [f"To convert the masks, type: {self.conversion}", ""] if self.conversion else []
        return "\n".join([*lines, "", *conversion, ", ".join(counted) or "No problems found.", ""])

    def complaint(self) -> str | None:
        """Returns the most severe error in one line, with the command to type next; None if there is no error."""
        errors = [finding for finding in self.findings if finding.severity == ERROR]
        if not errors:
            return None
        first, convertible = errors[0], any(finding.kind == errors[0].kind for finding in errors)
        step = self.conversion if self.conversion and convertible else None
        where = f"{first.kind}, {first.count} in {first.split}: {first.cause} ({first.examples[0]})"
        check = shlex.join(["apcnet", "check", self.dataset, self.root])
        return f"{where}; type: {step or check}"

    def warnings(self) -> list[str]:
        """Returns the warnings, each in one line."""
        return [
            f"{finding.kind}, {finding.count} in {finding.split}: {finding.cause} ({finding.examples[0]})"
            for finding in self.findings
            if finding.severity == WARNING
        ]

    def _table(self) -> list[str]:
        """Formats a table with the pixels, the images and the weight of each class."""
        weights = self.class_weights()
        columns = [["class", *self.classes]]
        for name, split in self.splits.items():
            columns.append([f"{name}: pixels", *(_share(n, sum(split.pixels)) for n in split.pixels)])
            columns.append(["images", *map(str, split.images)])
        if weights:
            columns.append(["weight", *(f"{weight:.3f}" for weight in weights[1])])
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join((name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])))
            for name, *figures in zip(*columns, strict=True)
        ]
        return [*lines, "", *textwrap.wrap(f"Weights from {weights[0]}: {RULE}.", 100)] if weights else lines


def is_training(split: str) -> bool:
    """Returns True if a split is used for training."""
    return split.startswith("train") or split == "all"


def weights_of(pixels: Sequence[int]) -> list[float]:
    """Computes class weights by RULE from the number of pixels of each class."""
    shares = [count / sum(pixels) for count in pixels]
    weights = [1 / math.log(1.02 + share) for share in shares]
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    return [round(weight / mean, 6) for weight in weights]


def _extent(split: Split) -> str:
    parts = [f"{split.samples} samples"]
    if split.masks_read < split.samples:
        parts.append(f"{split.samples - split.masks_read} masks could not be read")
    if split.ignored_pixels:
        parts.append(f"{_share(split.ignored_pixels, sum(split.stored_values.values()))} of the pixels ignored")
    return ", ".join(parts)


def _finding_as_lines(finding: Finding) -> list[str]:
    lines = [f"{finding.severity}: {finding.kind}, {finding.count} in {finding.split}", f"  {finding.cause}"]
    if finding.stored_values:
        lines.append(f"  stored values: {_histogram(finding.stored_values)}")
    lines += [f"    {example}" for example in finding.examples]
    if finding.count > len(finding.examples):
        lines.append(f"    and {finding.count - len(finding.examples)} more")
    return lines


def _histogram(values: dict[int, int], most: int = 40) -> str:
    parts = [f"{value} ({_share(count, sum(values.values()))})" for value, count in values.items()]
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")


def _share(part: int, whole: int) -> str:
    if not part:
        return "–"
    return f"{100 * part / whole:.2f} %" if part * 20000 >= whole else "<0.01 %"
