"""How images and masks are found on disk and paired by name: everything that belongs together, or an error.

Files whose names begin with a dot are not data. Links are followed, suffixes may be written in any case, and the order
of samples is that of their names, whatever the order the file system lists them in.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apcnet.data.classes import Color
from apcnet.data.files import Files, Pair

Job = tuple[Path, Callable[[], np.ndarray | list[str]]]  # a file to prepare; what makes its mask, or its lines
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_root(root: str | Path | None, holds: str, places: Iterable[str] = ()) -> Path:
    """The folder that holds a folder of the name `holds`: root itself, or one of the places below it."""
    if root is None:
        raise TypeError(f"root: expected the folder that holds {holds}, got None")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {root}")
    for folder in (root, *(root / place for place in places)):
        if (folder / holds).is_dir():
            return folder
    others = "".join(f" nor in its {place}" for place in places)
    raise FileNotFoundError(f"root: there is no folder {holds} in {root}{others}")


def images_in(folder: Path, ending: str = "") -> dict[str, Path]:
    """The image files in a folder and those below it, by name: the path from there without its suffix.

    Only those are taken whose names end with `ending`, which is cut off as well.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in _files_below(folder, ()):
        stem, suffix = os.path.splitext(path.relative_to(folder).as_posix())
        if suffix.lower() not in SUFFIXES or not stem.endswith(ending):
            continue
        name = stem[: len(stem) - len(ending)]
        if name in found:
            raise ValueError(f"{folder}: two images of one name, {found[name].name} and {path.name}")
        found[name] = path
    return found


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder}: is a link to a folder that it is in")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, (*above, real))
        else:
            yield path


def names_in(file: Path) -> list[str]:
    """The names that a file lists, one a line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected names, one a line, got something that is no text: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{file}: lists no names")
    if len(set(names)) < len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"{file}: lists {_some(twice)} more than once")
    return names


@dataclass(frozen=True)
class Listing:
    """A split of a data set as it is found on disk: names, and what goes by them, whether it is complete or not."""

    names: Iterable[str]  # of the samples; they become a sorted list
    images: Mapping[str, Path]  # by name
    masks: Mapping[str, Path]
    image_folder: Path  # where images and masks come from, to say so in an error
    mask_folder: Path | str
    classes: Sequence[str]
    palette: Sequence[Color]
    labels: np.ndarray | None = None  # as Files takes them
    hint: str = ""  # what to do where masks are missing

    def __post_init__(self):
        object.__setattr__(self, "names", sorted(self.names))
        if not self.names:
            raise FileNotFoundError(f"there are no images in {self.image_folder}")

    def missing(self) -> list[tuple[str, list[str], Path | str]]:
        """Of images and of masks: what they are called, the names that have none, and where it was looked for."""
        images = [name for name in self.names if name not in self.images]
        masks = [name for name in self.names if name not in self.masks]
        return [("image", images, self.image_folder), ("mask", masks, self.mask_folder)]

    def complete(self) -> Files:
        """The samples that have both files."""
        names = [name for name in self.names if name in self.images and name in self.masks]
        pairs = [Pair(name, self.images[name], self.masks[name]) for name in names]
        return Files(pairs, self.classes, self.palette, self.labels)

    def open(self) -> Files:
        """All samples; it is an error if one lacks a file."""
        complaints = [
            f"{len(names)} of {len(self.names)} samples have no {kind} in {folder}: {_some(names)}"
            for kind, names, folder in self.missing()
            if names
        ]
        if complaints:
            raise FileNotFoundError("; ".join(complaints) + self.hint)
        return self.complete()


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
