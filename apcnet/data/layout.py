"""Finds images and masks on disk and pairs them by name, or raises an error that says what is missing.

Files whose names begin with a dot are skipped. Links are followed, suffixes may be in upper or lower case, and samples
are sorted by name, whatever order the file system lists them in.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from apcnet.data.classes import Color
from apcnet.data.files import Files, Pair

Job = tuple[Path, Callable[[], np.ndarray | list[str]]]  # a file to prepare, and the function that makes its content
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_root(root: str | Path | None, holds: str, places: Iterable[str] = ()) -> Path:
    """Finds the folder that directly holds `holds`: root itself, or one of the `places` below it."""
    if root is None:
        raise TypeError(f"root: expected the folder that holds {holds}, got None")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: expected an existing folder, got {root}")
    for folder in (root, *(root / place for place in places)):
        if (folder / holds).is_dir():
            return folder
    others = "".join(f" nor in its {place}" for place in places)
    raise FileNotFoundError(f"root: expected the folder that holds {holds}, but there is none in {root}{others}")


def images_in(folder: Path, ending: str = "") -> dict[str, Path]:
    """Finds the image files in a folder and its subfolders, by name: the relative path without its suffix.

    Takes only the files whose names end with `ending`, and cuts it off as well.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the folder {folder}, but there is none")
    found: dict[str, Path] = {}
    for path in files_below(folder):
        stem, suffix = os.path.splitext(path.relative_to(folder).as_posix())
        if suffix.lower() not in SUFFIXES or not stem.endswith(ending):
            continue
        name = stem[: len(stem) - len(ending)]
        if name in found:
            raise ValueError(
                f"{folder}: expected one image of each name, got {found[name].name} and {path.name}; remove one of them"
            )
        found[name] = path
    return found


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders, without those whose names begin with a dot."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder}: links to a folder that contains it; remove the link")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, (*above, real))
        else:
            yield path


def names_in(file: Path) -> list[str]:
    """Reads the names that a file lists, one on each line."""
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names of files may hold any bytes
    if "\0" in text:
        raise ValueError(f"{file}: expected text with one name on each line, got other bytes")
    names = [line.strip() for line in text.split("\n") if line.strip()]
    if not names:
        raise ValueError(f"{file}: expected one name on each line, but lists no names")
    if len(set(names)) < len(names):
        repeated = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"{file}: expected each name once, but lists {_first_few(repeated)} more than once")
    return names


class Listing:
    """Holds the files of a split as they are found on disk, complete or not.

    Args:
        names: The names of the samples, in any order.
        images: The image files by name.
        masks: The mask files by name.
        image_folder: The place of the images, for error messages.
        mask_folder: The place of the masks, for error messages.
        classes, palette, labels: As for `files.Files`.
        hint: What to do if masks are missing; it is added to the error message.
    """

    def __init__(
        self,
        names: Iterable[str],
        images: Mapping[str, Path],
        masks: Mapping[str, Path],
        image_folder: Path,
        mask_folder: Path | str,
        classes: Sequence[str],
        palette: Sequence[Color],
        labels: np.ndarray | None = None,
        hint: str = "",
    ):
        self.names = sorted(names)
        self.images, self.masks = images, masks
        self.image_folder, self.mask_folder = image_folder, mask_folder
        self.classes, self.palette, self.labels = classes, palette, labels
        self.hint = hint
        if not self.names:
            raise FileNotFoundError(f"expected images in {image_folder}, found none")

    def missing(self) -> list[tuple[str, list[str], Path | str]]:
        """Lists, for images and for masks: the kind of file, the names without one, and the folder to look in."""
        images = [name for name in self.names if name not in self.images]
        masks = [name for name in self.names if name not in self.masks]
        return [("image", images, self.image_folder), ("mask", masks, self.mask_folder)]

    def complete(self) -> Files:
        """Makes a data set of the samples that have both files."""
        names = [name for name in self.names if name in self.images and name in self.masks]
        pairs = [Pair(name, self.images[name], self.masks[name]) for name in names]
        return Files(pairs, self.classes, self.palette, self.labels)

    def open(self) -> Files:
        """Makes a data set of all samples; raises an error if a file is missing."""
        complaints = [
            f"{len(names)} of {len(self.names)} samples have no {kind} in {folder}: {_first_few(names)}"
            for kind, names, folder in self.missing()
            if names
        ]
        if complaints:
            raise FileNotFoundError("; ".join(complaints) + self.hint)
        return self.complete()


def _first_few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
