"""Reads Label Studio's exports: JSON, JSON-MIN, and brush labels as PNG, one file for each label of a task.

Labels become classes in alphabetic order, after the background. The names of PNG files hold the number of the task,
not the image: a JSON export beside them says which image a task is.
"""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from apcnet.data.imports.regions import Size, ellipse, label_studio_run_lengths, rectangle
from apcnet.data.imports.source import (
    Images,
    Item,
    Region,
    Source,
    missing_note,
    name_of,
    paint,
    read_json_with,
    split_in,
    with_background,
)
from apcnet.data.layout import files_below

KIND = "exports of Label Studio"

LABELS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")
BRUSH = re.compile(r"task-(\d+)-annotation-(\d+)-by-.*?-tag-(.+)-(\d+)")
ON_TOP = "pixels without label became the class background; where labels overlap, the smaller one is on top"


def files(root: Path) -> list[Path]:
    """Finds Label Studio's files in a folder: those of brush labels, or if there are none the exports as JSON."""
    found = sorted(files_below(root))
    brushes = [path for path in found if path.suffix == ".png" and BRUSH.fullmatch(path.stem)]
    return brushes or [path for path in found if path.suffix == ".json" and _tasks(path)]


def _tasks(path: Path) -> list[dict]:
    """Returns the tasks of a JSON export, or nothing if the file is something else."""
    with path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"["):  # COCO's gigabytes are not parsed for this
            return []
    content = read_json_with(path)
    if not isinstance(content, list) or not all(isinstance(task, dict) for task in content):
        return []
    return content if any("annotations" in task or "completions" in task or _min(task) for task in content) else []


def _min(task: dict) -> list[dict]:
    """Returns the regions of a task in JSON-MIN, which lists them under the name of the labelling control."""
    entries = [each for value in task.values() if isinstance(value, list) for each in value if isinstance(each, dict)]
    return [entry for entry in entries if any(kind in entry for kind in LABELS)]


def read(root: Path, paths: list[Path]) -> Source:
    """Reads exports, whose images lie anywhere below the root."""
    if paths[0].suffix == ".png":
        return _read_brushes(root, paths)
    tasks = [(path, task) for path in paths for task in _tasks(path)]
    results = [_results(task) for _, task in tasks]
    classes = with_background(sorted({label for result in results for one in result for label in _labels(one)}))
    images, items, missing, several = Images(root), [], [], 0
    for (path, task), result in zip(tasks, results, strict=True):
        name = _image_name(task)
        image = _find(images, name)
        if image is None:
            missing.append(name)
            continue
        several += len(task.get("annotations") or ()) > 1
        mask = partial(_mask, path, name, result, classes)
        items.append(Item(name_of(image, root), image, split_in(image, root), mask))
    notes = [ON_TOP, *([f"{several} tasks have several annotations: the last one was taken"] if several else [])]
    return Source("an export of Label Studio", classes, None, items, notes + missing_note(missing))


def _results(task: dict) -> list[dict]:
    """Returns the labelled regions of a task, of its last annotation that was not cancelled."""
    done = [one for one in task.get("annotations") or task.get("completions") or () if not one.get("was_cancelled")]
    if done:
        return [one for one in done[-1]["result"] if _labels(one)]
    return _min(task)


def _labels(one: dict) -> list[str]:
    value = one.get("value", one)
    return next((value[kind] for kind in LABELS if value.get(kind)), [])


def _image_name(task: dict) -> str:
    """Returns the name of the image of a task: the last text of its data that looks like a path of an image."""
    data = task.get("data", task)
    texts = [value for value in data.values() if isinstance(value, str) and re.search(r"\.\w{3,4}($|[?&])", value)]
    text = next((data[key] for key in ("image", "img", "photo") if isinstance(data.get(key), str)), None)
    address = urlsplit(text or (texts[-1] if texts else ""))
    inner = parse_qs(address.query).get("d")  # /data/local-files/?d=folder/a.jpg
    return unquote(inner[0] if inner else address.path).lstrip("/")


def _find(images: Images, name: str) -> Path | None:
    """Finds an image by its name, or without the random digits that an upload puts before it."""
    bare = re.sub(r"^[0-9a-f]{8}-", "", Path(name).name)
    return images.find(name) or images.find(Path(name).name) or images.find(bare)


def _mask(path: Path, name: str, results: list[dict], classes: list[str], size: Size) -> np.ndarray:
    regions = []
    for one in results:
        try:
            value = one.get("value", one)
            pixels = _pixels({**one, **value}, value, size)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: image {name}: {error}") from error
        if pixels is not None:
            regions.append((classes.index(_labels(one)[0]), pixels))
    return paint(regions, size, by_area=True)


def _pixels(one: dict, value: dict, size: Size) -> np.ndarray | list[np.ndarray] | None:
    """Returns the pixels of a region, whose coordinates are percentages of the size."""
    height, width = size
    if "rle" in value:
        stored = one.get("original_height", height), one.get("original_width", width)
        if stored != size:
            raise ValueError(f"expected brush labels of {width}×{height}, got {stored[1]}×{stored[0]}")
        return label_studio_run_lengths(value["rle"], size)
    if "points" in value:
        return [np.array(value["points"], float) * (width / 100, height / 100)]
    if "radiusX" in value:
        x, y, across, down = (value[key] / 100 for key in ("x", "y", "radiusX", "radiusY"))
        return ellipse(x * width, y * height, across * width, down * height, size)
    if "width" in value:
        x, y, across, down = (value[key] / 100 for key in ("x", "y", "width", "height"))
        return rectangle(x * width, y * height, (x + across) * width, (y + down) * height, size)
    return None


def _read_brushes(root: Path, paths: list[Path]) -> Source:
    parts = defaultdict(list)
    for path in paths:
        task, _, label, _ = BRUSH.fullmatch(path.stem).groups()  # pyright: ignore[reportOptionalMemberAccess] # by files
        parts[int(task)].append((label, path))
    classes = with_background(sorted({label for found in parts.values() for label, _ in found}))
    images, notes = Images(root), [ON_TOP]
    images.files -= set(paths)
    tasks = [task for path in files_below(root) if path.suffix == ".json" for task in _tasks(path)]
    named = {task["id"]: _find(images, _image_name(task)) for task in tasks if "id" in task}
    if not named:
        named = _by_number(images.files, parts)
    if not named:
        named = dict(zip(sorted(parts), sorted(images.files), strict=False))
        if len(images.files) != len(parts):
            raise ValueError(
                f"{root}: expected an export as JSON beside the brush labels, which says what image a task is: "
                f"{len(parts)} tasks and {len(images.files)} images cannot be paired by their order; export JSON too"
            )
        notes.append("no JSON says which image a task is: they were paired in order; see examples.png, and check them")
    items = []
    for task, found in sorted(parts.items()):
        image = named.get(task)
        if image is not None:
            labelled = [(classes.index(label), path) for label, path in found]
            items.append(Item(name_of(image, root), image, split_in(image, root), partial(_brushed, labelled)))
    missing = [f"task {task}" for task in parts if named.get(task) is None]
    return Source("brush labels of Label Studio", classes, None, items, notes + missing_note(missing))


def _by_number(images: set[Path], tasks: dict) -> dict[int, Path]:
    """Pairs tasks with images whose names end with their numbers; nothing unless all do."""
    numbered = {int(match[1]): path for path in images if (match := re.search(r"(\d+)$", path.stem))}
    return numbered if tasks.keys() <= numbered.keys() and len(numbered) == len(images) else {}


def _brushed(labelled: list[tuple[int, Path]], size: Size) -> np.ndarray:
    regions: list[Region] = []
    for label, path in labelled:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.getchannel("A") if picture.mode.endswith("A") else picture.convert("L"))
        if pixels.shape != size:
            raise ValueError(f"{path}: expected the size of the image, {size[1]}×{size[0]}, got {pixels.shape[::-1]}")
        regions.append((label, pixels > 127))
    return paint(regions, size, by_area=True)
