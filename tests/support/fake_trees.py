"""Makes small trees of files laid out as the benchmarks' downloads are, drawn from their names.

Each function makes one below a folder and returns what the masks hold, as they are stored, by split and name:
{"train": {"aachen/aachen_000000_000019": array, …}, …}. Names, suffixes and links are as unpleasant as real ones.
"""

import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Stored = dict[str, dict[str, np.ndarray]]
SIZE = (20, 28)
CITYSCAPES_IDS = (0, 4, 7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def draw(name: str, values: Iterable[int], size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Draws an image (H, W, 3) and a mask of blocks (H, W) that depend on the name."""
    rng, (height, width) = np.random.default_rng(zlib.crc32(name.encode())), size
    blocks = rng.choice(np.array(list(values)), (-(-height // 5), -(-width // 5))).astype(np.uint8)
    mask = np.kron(blocks, np.ones((5, 5), np.uint8))[:height, :width]
    colors = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    return colors[mask], mask


def save(array: np.ndarray, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def save_palette(mask: np.ndarray, path: Path) -> None:
    """Saves a mask as VOC stores it, as indices into colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette([part for i in range(256) for part in (i, 255 - i, 7 * i % 256)])  # makes it a palette image
    image.save(path)


def save_lines(lines: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cityscapes(root: Path, prepared: bool = True) -> Stored:
    """Makes labelIds, and labelTrainIds if prepared; returns the labelTrainIds if prepared, otherwise the labelIds."""
    stored: Stored = {}
    names = {
        "train": ("zurich/zurich_000001_000019", "aachen/aachen_000000_000019", "aachen/aachen_000002_000019"),
        "val": ("münster/münster_000000_000019", "frankfurt/frankfurt_000001_000019"),
    }
    for split, split_names in names.items():
        stored[split] = {}
        for name in split_names:
            image, mask = draw(name, range(19) if prepared else CITYSCAPES_IDS)
            mask[0, :3] = 255 if prepared else 1
            save(image, root / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
            labels = root / "gtFine" / split / f"{name}_gtFine_label.png"
            save(mask, labels.with_name(labels.name.replace("label", "labelTrainIds" if prepared else "labelIds")))
            save(image, labels.with_name(labels.name.replace("label", "color")))
            save(mask, labels.with_name(labels.name.replace("label", "instanceIds")))
            stored[split][name] = mask
    return stored


def ade20k(root: Path) -> Stored:
    """Makes ADE20K with capitals in some suffixes, and with hidden files."""
    stored: Stored = {}
    names = {"training": ("ADE_train_00000010", "ADE_train_00000002"), "validation": ("ADE_val_00000001",)}
    for folder, split in (("training", "train"), ("validation", "val")):
        stored[split] = {}
        for name in names[folder]:
            image, mask = draw(name, range(151))
            mask[0, :3] = 0, 1, 150
            save(image, root / "images" / folder / f"{name}.JPG", format="JPEG")
            save(mask, root / "annotations" / folder / f"{name}.png")
            (root / "images" / folder / f"._{name}.JPG").write_bytes(b"not an image")
            stored[split][name] = mask
    return stored


def voc2012(root: Path, prepared: bool = True) -> Stored:
    """Makes PASCAL VOC 2012, with more names of SBD in `trainaug` if prepared."""
    names = {"train": ("2007_000042", "2007_000032"), "val": ("2007_000033", "2007_000123")}
    stored: Stored = {}
    for split, split_names in names.items():
        stored[split] = {}
        for name in split_names:
            image, mask = draw(name, (*range(21), 255))
            save(image, root / "JPEGImages" / f"{name}.jpg")
            save_palette(mask, root / "SegmentationClass" / f"{name}.png")
            stored[split][name] = mask
        save_lines(split_names, root / "ImageSets" / "Segmentation" / f"{split}.txt")
    further = ("2008_000002", "2011_003271")
    for name in further:
        image, mask = draw(name, range(21))
        save(image, root / "JPEGImages" / f"{name}.jpg")
        if prepared:
            save(mask, root / "SegmentationClassAug" / f"{name}.png")
    save(draw("2009_000001", (0,))[0], root / "JPEGImages" / "2009_000001.jpg")  # one that has no mask
    if prepared:
        save_lines(further, root / "ImageSets" / "Segmentation" / "aug.txt")
        stored["trainaug"] = stored["train"] | {name: draw(name, range(21))[1] for name in further}
    return stored


def sbd(folder: Path) -> dict[str, np.ndarray]:
    """Makes SBD for voc2012(…, prepared=False), with some names of VOC's train and val, whose masks differ."""
    names = {"train": ("2008_000002", "2007_000033"), "val": ("2011_003271", "2007_000042")}
    masks = {}
    for split, split_names in names.items():
        save_lines(split_names, folder / f"{split}.txt")
        for name in split_names:
            masks[name] = draw(name, range(21))[1] if name > "2008" else np.full(SIZE, 3, np.uint8)
            (folder / "cls").mkdir(exist_ok=True)
            (folder / "cls" / f"{name}.mat").write_bytes(mat_file(masks[name]))
    return masks


def pascal_context(root: Path) -> Stored:
    """Makes Pascal Context as it is after preparation."""
    names = {"train": ("2008_000008", "2008_000002"), "val": ("2010_000001",)}
    stored: Stored = {}
    for split, split_names in names.items():
        stored[split] = {}
        for name in split_names:
            image, mask = draw(name, range(60))
            mask[0, :2] = 0, 59
            save(image, root / "JPEGImages" / f"{name}.jpg")
            save(mask, root / "SegmentationClassContext" / f"{name}.png")
            stored[split][name] = mask
        save_lines(split_names, root / "ImageSets" / "SegmentationContext" / f"{split}.txt")
    return stored


def pascal_in_detail(root: Path, categories: Iterable[int]) -> Stored:
    """Makes VOC 2010 with trainval_merged.json; one region lies under all. Returns masks of categories, 0 for none."""
    stored: Stored = {"train": {}, "val": {}}
    images, regions = [], []
    for number, name in enumerate(("2008_000008", "2010_000001", "2008_000002")):
        split = "val" if number == 1 else "train"
        image, index = draw(name, range(len(tuple(categories))))
        save(image, root / "JPEGImages" / f"{name}.jpg")
        mask = np.array([0, *categories])[index]
        code = {"file_name": f"{name}.jpg", "image_id": number, "height": SIZE[0], "width": SIZE[1], "phase": split}
        images.append(code)
        values = [value for value in np.unique(mask).tolist() if value]
        for value, covered in [(values[0], mask > 0), *((value, mask == value) for value in values[1:])]:
            segmentation = {"size": list(SIZE), "counts": run_lengths(covered)}
            regions.append(
                {
                    "id": len(regions),
                    "image_id": number,
                    "category_id": value,
                    "segmentation": segmentation,
                    "parts": [],
                }
            )
        stored[split][name] = mask
    root.mkdir(parents=True, exist_ok=True)
    (root / "trainval_merged.json").write_text(json.dumps({"images": images, "annos_segmentation": regions}))
    return stored


def folder(root: Path, listed: bool = False) -> Stored:
    """Makes a user's folder with spaces, a subfolder, a link and several formats; splits are folders or lists."""
    names = {"train": {"a photo": "JPG", "b/ünder": "png", "c.1": "jpeg"}, "val": {"d": "tif", "ee": "PNG"}}
    stored: Stored = {}
    for split, split_names in names.items():
        stored[split] = {}
        below = Path("") if listed else Path(split)
        for name, suffix in split_names.items():
            image, mask = draw(name, (0, 1, 2, 255))
            save(image, root / "images" / below / f"{name}.{suffix}")
            save(mask, root / "masks" / below / f"{name}.png")
            stored[split][name] = mask
        if listed:
            save_lines(split_names, root / f"{split}.txt")
    linked = root / "masks" / ("" if listed else "train") / "c.1.png"
    elsewhere = root / "elsewhere.png"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    save_lines(["# mine", "road 128 64 128", "", "traffic light 250 170 30", "sky 70 130 180"], root / "classes.txt")
    return stored


def mat_file(mask: np.ndarray) -> bytes:
    """Encodes GTcls.Segmentation in MATLAB's format 5, uncompressed."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    def variable(kind: int, shape: tuple[int, ...], name: bytes, *content: bytes) -> bytes:
        head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<2i", *shape)) + element(1, name)
        return element(14, head + b"".join(content))

    field = variable(9, mask.shape, b"", element(2, mask.tobytes(order="F")))
    names = struct.pack("<HHI", 5, 4, 32) + element(1, b"Segmentation".ljust(32, b"\0"))
    head = b"MATLAB 5.0 MAT-file, made by a test".ljust(124) + b"\x00\x01IM"
    return head + variable(2, (1, 1), b"GTcls", names, field)


def run_lengths(mask: np.ndarray) -> str:
    """Encodes a mask in COCO's compressed run-length code."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int)])
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    text = ""
    for i, length in enumerate(lengths):
        number, more = length - (lengths[i - 2] if i > 2 else 0), True
        while more:
            digit, number = number & 31, number >> 5
            more = number != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
    return text
