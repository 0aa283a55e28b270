"""How images and masks are found on disk and paired by name: everything that belongs together, or an error.

Files whose names begin with a dot are not data. Links are followed, suffixes may be written in any case, and the order
of samples is that of their names, whatever the order the file system lists them in.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from apcnet.data.files import Pair

Note = Callable[[str, str, Path | None, str], None]  # of a kind, a name, its path if it has one, and a folder
_note: ContextVar[Note | None] = ContextVar("note", default=None)
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

    Args:
        folder: where to look.
        ending: files are taken whose names end with it; it is cut off as well.
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


@contextmanager
def leaving_out(note: Note) -> Iterator[None]:
    """Within it data sets open without the samples that lack a file, after a note of each; else they do not open."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


def pair_up(
    names: Iterable[str],
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    image_folder: Path,
    mask_folder: Path | str,
    hint: str = "",
) -> list[Pair]:
    """The pairs of these names, sorted.

    Args:
        names: whose pairs are wanted.
        images: by name.
        masks: by name.
        image_folder: where images come from, to say so in an error.
        mask_folder: the same of masks.
        hint: what to do where masks are missing.
    """
    names = sorted(names)
    if not names:
        raise FileNotFoundError(f"there are no images in {image_folder}")
    if note := _note.get():
        for kind, found, folder in (
            ("image missing", images, image_folder),
            ("mask missing", masks, f"{mask_folder}{hint}"),
        ):
            for name in names:
                if name not in found:
                    note(kind, name, None, str(folder))
        for name in sorted(masks.keys() - images.keys() - set(names)):
            note("mask of no image", name, masks[name], str(image_folder))
        names = [name for name in names if name in images and name in masks]
    complaints = []
    for kind, found, folder in (("image", images, image_folder), ("mask", masks, mask_folder)):
        missing = [name for name in names if name not in found]
        if missing:
            complaints.append(f"{len(missing)} of {len(names)} samples have no {kind} in {folder}: {_some(missing)}")
    if complaints:
        raise FileNotFoundError("; ".join(complaints) + hint)
    return [Pair(name, images[name], masks[name]) for name in names]


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
