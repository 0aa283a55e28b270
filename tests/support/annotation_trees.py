"""Makes small data sets as annotation tools export them, each below a folder.

Every writer takes samples, each a name with an image (H, W, 3) and a mask (H, W) of class indices, 0 is background.
"""

import base64
import io
import json
import struct
from pathlib import Path

import numpy as np
from fake_trees import run_lengths, save, save_lines
from PIL import Image, ImageDraw

CLASSES = ("background", "cell", "vessel", "stone")
COLORS = ((0, 0, 0), (200, 30, 40), (40, 180, 60), (60, 80, 230))
VOC = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
Samples = dict[str, tuple[np.ndarray, np.ndarray]]


def draw_samples(count: int = 6, size: tuple[int, int] = (60, 84), seed: int = 0) -> Samples:
    """Draws images of ellipses and polygons on noise; class 3 is rare, and a vessel lies inside a cell."""
    rng, samples = np.random.default_rng(seed), {}
    for number in range(count):
        mask = Image.new("L", size[::-1])
        pen = ImageDraw.Draw(mask)
        x, y = rng.integers(6, 20, 2).tolist()
        pen.ellipse((x, y, x + 34, y + 26), 1)
        pen.rectangle((x + 12, y + 8, x + 20, y + 16), 2)
        pen.polygon([(60, 8), (78, 12), (72, 30)], 2)
        if number % 3 == 0:
            pen.rectangle((54, 40, 70, 52), 3)
        labels = np.array(mask)
        image = np.array(COLORS, np.int16)[labels] // 2 + rng.integers(20, 90, (*size, 3))
        samples[f"photo {number:02}"] = image.clip(0, 255).astype(np.uint8), labels
    return samples


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Traces the outer outlines (N, 2) of a boolean mask along the edges of its pixels; holes are left out."""
    padded = np.pad(mask, 1)
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in np.argwhere(padded):
        y, x = int(i) - 1, int(j) - 1
        around = ((-1, 0, (x, y), (x + 1, y)), (0, 1, (x + 1, y), (x + 1, y + 1)))
        around += ((1, 0, (x + 1, y + 1), (x, y + 1)), (0, -1, (x, y + 1), (x, y)))
        for down, right, start, end in around:
            if not padded[i + down, j + right]:
                edges.setdefault(start, []).append(end)
    loops = []
    while edges:
        start = place = next(iter(edges))
        loop = []
        while place in edges:
            loop.append(place)
            ends = edges[place]
            place = ends.pop()
            if not edges[loop[-1]]:
                del edges[loop[-1]]
            if place == start:
                break
        points = np.array(loop, float)
        x, y = points.T
        if (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() > 0:  # clockwise in an image: an outer outline
            loops.append(points)
    return loops


def write_images(samples: Samples, folder: Path, suffix: str = "jpg") -> None:
    for name, (image, _) in samples.items():
        save(image, folder / f"{name}.{suffix}")


def regions(mask: np.ndarray):
    """Yields the label and the outline of every region."""
    for label in range(1, len(CLASSES)):
        for points in outlines(mask == label):
            yield label, points


def coco(samples: Samples, root: Path, rle: str | None = None) -> None:
    """Writes COCO's JSON with polygons, or with run lengths: compressed, or as lists."""
    images, annotations = [], []
    for number, (name, (image, mask)) in enumerate(samples.items(), 1):
        images.append({"id": number, "file_name": f"{name}.jpg", "height": image.shape[0], "width": image.shape[1]})
        for label, segmentation in _segmentations(mask, rle):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 10 * label,
                    "segmentation": segmentation,
                    "iscrowd": int(rle is not None),
                }
            )
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(CLASSES) if i]
    write_images(samples, root / "images")
    (root / "annotations").mkdir(parents=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_default.json").write_text(json.dumps(content))


def _segmentations(mask: np.ndarray, rle: str | None):
    if rle is None:
        for label, points in regions(mask):
            yield label, [points.flatten().tolist()]
        return
    for label in range(1, len(CLASSES)):
        if (covered := mask == label).any():
            counts = run_lengths(covered) if rle == "text" else _lengths(covered.T.reshape(-1))
            yield label, {"size": list(mask.shape), "counts": counts}


def _lengths(flat: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int)])))
    return np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


def yolo(samples: Samples, root: Path) -> None:
    """Writes YOLO's text files, split into train and val."""
    for number, (name, (image, mask)) in enumerate(samples.items()):
        split = "val" if number % 3 == 2 else "train"
        save(image, root / "images" / split / f"{name}.jpg")
        size = np.array(mask.shape[::-1])
        lines = [f"{label - 1} {' '.join(map(str, (points / size).flatten()))}" for label, points in regions(mask)]
        save_lines(lines, root / "labels" / split / f"{name}.txt")
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES[1:]))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n\nnames:\n{names}")


def labelme(samples: Samples, root: Path) -> None:
    """Writes a JSON file beside each image: polygons, the largest first, and a mask for the stones."""
    write_images(samples, root)
    for name, (image, mask) in samples.items():
        shapes = []
        for label, points in sorted(regions(mask), key=lambda each: -np.ptp(each[1], axis=0).prod()):
            shape = {"label": CLASSES[label], "points": points.tolist(), "shape_type": "polygon", "mask": None}
            if label == 3:
                (left, top), (right, bottom) = points.min(0).astype(int), points.max(0).astype(int) - 1
                buffer = io.BytesIO()
                Image.fromarray(mask[top : bottom + 1, left : right + 1] == 3).save(buffer, "PNG")
                corners = [[int(left), int(top)], [int(right), int(bottom)]]
                picture = base64.b64encode(buffer.getvalue()).decode()
                shape |= {"points": corners, "shape_type": "mask", "mask": picture}
            shapes.append(shape)
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
        content |= {"imageHeight": image.shape[0], "imageWidth": image.shape[1]}
        (root / f"{name}.json").write_text(json.dumps(content))


def cvat_images(samples: Samples, root: Path) -> None:
    """Writes CVAT's "images 1.1": polygons with a z_order, and a mask for the stones."""
    write_images(samples, root / "images")
    labels = "".join(
        f"<label><name>{name}</name><color>#{r:02x}{g:02x}{b:02x}</color></label>"
        for name, (r, g, b) in zip(CLASSES[1:], COLORS[1:], strict=True)
    )
    parts = [f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"]
    for number, (name, (image, mask)) in enumerate(samples.items()):
        parts.append(f'<image id="{number}" name="{name}.jpg" width="{image.shape[1]}" height="{image.shape[0]}">')
        for label, points in reversed(list(regions(mask))):
            if label == 3:
                (left, top), (right, bottom) = points.min(0).astype(int), points.max(0).astype(int)
                part = mask[top:bottom, left:right] == 3
                rle = ", ".join(map(str, _lengths(part.reshape(-1))))
                parts.append(
                    f'<mask label="stone" rle="{rle}" left="{left}" top="{top}" width="{part.shape[1]}" '
                    f'height="{part.shape[0]}" z_order="0"></mask>'
                )
                continue
            text = ";".join(f"{x:.2f},{y:.2f}" for x, y in points)
            parts.append(f'<polygon label="{CLASSES[label]}" points="{text}" z_order="{label}"></polygon>')
        parts.append("</image>")
    (root / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n' + "".join([*parts, "</annotations>"])
    )


def cvat_masks(samples: Samples, root: Path) -> None:
    """Writes CVAT's "segmentation mask 1.1": coloured masks and labelmap.txt."""
    write_images(samples, root / "JPEGImages")
    for name, (_, mask) in samples.items():
        save(np.array(COLORS, np.uint8)[mask], root / "SegmentationClass" / f"{name}.png")
        save(np.array(COLORS, np.uint8)[mask][..., ::-1].copy(), root / "SegmentationObject" / f"{name}.png")
    save_lines(samples, root / "ImageSets" / "Segmentation" / "default.txt")
    colors = [",".join(map(str, color)) for color in COLORS]
    lines = [f"{name}:{color}::" for name, color in sorted(zip(CLASSES, colors, strict=True))]
    save_lines(["# label:color_rgb:parts:actions", *lines], root / "labelmap.txt")


def voc(samples: Samples, root: Path, palette: bool) -> None:
    """Writes VOC's folders, with palette masks or with the colours of that palette, and lists of names."""
    write_images(samples, root / "JPEGImages")
    for name, (_, mask) in samples.items():
        picture = Image.fromarray(mask if palette else np.array(VOC, np.uint8)[mask])
        if palette:
            picture.putpalette([part for color in VOC for part in color] + [0] * (768 - 12))
        (root / "SegmentationClass").mkdir(exist_ok=True)
        picture.save(root / "SegmentationClass" / f"{name}.png")
    names = list(samples)
    save_lines(names[:4], root / "ImageSets" / "Segmentation" / "train.txt")
    save_lines(names[4:], root / "ImageSets" / "Segmentation" / "val.txt")


def roboflow(samples: Samples, root: Path) -> None:
    """Writes Roboflow's "semantic segmentation masks": train and valid, each with _classes.csv."""
    for number, (name, (image, mask)) in enumerate(samples.items()):
        folder = root / ("valid" if number % 3 == 2 else "train")
        stem = f"{name.replace(' ', '_')}_jpg.rf.{number:032x}"
        save(image, folder / f"{stem}.jpg")
        save(mask, folder / f"{stem}_mask.png")
        save_lines(["Pixel Value, Class", *(f"{i}, {each}" for i, each in enumerate(CLASSES))], folder / "_classes.csv")


def label_studio(samples: Samples, root: Path, export: str) -> None:
    """Writes an export: "json" with polygons and brush labels, or "brush", PNG files beside the JSON of the tasks."""
    write_images(samples, root / "images")
    tasks = []
    for number, (name, (_, mask)) in enumerate(samples.items(), 17):
        result = []
        for label, points in regions(mask):
            shares = points / np.array(mask.shape[::-1]) * 100
            value = {"points": shares.tolist(), "closed": True, "polygonlabels": [CLASSES[label]]}
            if label == 3:
                value = {"format": "rle", "rle": brush_code(mask == 3), "brushlabels": [CLASSES[3]]}
            kind = "polygonlabels" if label < 3 else "brushlabels"
            result.append({"value": value, "type": kind, "from_name": "tag", "to_name": "image"})
            result[-1] |= {"original_height": mask.shape[0], "original_width": mask.shape[1]}
        if export == "brush":
            result = []
            for label in sorted(set(np.unique(mask).tolist()) - {0}):
                brushed = f"task-{number}-annotation-{number}-by-1-tag-{CLASSES[label]}-0.png"
                save(np.where(mask == label, np.uint8(255), np.uint8(0)), root / brushed)
        image = f"/data/upload/3/{number:08x}-{name.replace(' ', '%20')}.jpg"
        tasks.append({"id": number, "data": {"image": image}, "annotations": [{"id": number, "result": result}]})
    (root / "project-1.json").write_text(json.dumps(tasks))


def brush_code(mask: np.ndarray) -> list[int]:
    """Encodes a mask as Label Studio does: RGBA values, in runs of up to 256 values of 8 bits."""
    values = np.repeat(np.where(mask, 255, 0).reshape(-1), 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in (3, 4, 8, 16))
    i = 0
    while i < len(values):
        end = i + 1
        while end < len(values) and values[end] == values[i] and end - i < 60000:
            end += 1
        bits += f"1{3:02b}{end - i - 1:016b}{values[i]:08b}"
        i = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def cityscapes(samples: Samples, root: Path) -> None:
    """Writes Cityscapes' folders with labelIds that are the indices of the lines in classes.txt."""
    for number, (image, mask) in enumerate(samples.values()):
        split, stem = "val" if number % 3 == 2 else "train", f"town_{number:06}_000019"
        save(image, root / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png")
        save(mask, root / "gtFine" / split / "town" / f"{stem}_gtFine_labelIds.png")
        save(np.array(COLORS, np.uint8)[mask], root / "gtFine" / split / "town" / f"{stem}_gtFine_color.png")
    save_lines(CLASSES, root / "classes.txt")


def masks(samples: Samples, root: Path, encode, suffix: str = "png", classes=CLASSES, ending: str = "") -> None:
    """Writes folders images and masks; `encode` makes what a mask stores of its indices."""
    write_images(samples, root / "images")
    for name, (_, mask) in samples.items():
        save(encode(mask), root / "masks" / f"{name}{ending}.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    if classes:
        save_lines(classes, root / "classes.txt")


def camvid(samples: Samples, root: Path) -> None:
    """Writes CamVid's folders: coloured masks with the ending _L, and label_colors.txt."""
    for name, (image, mask) in samples.items():
        save(image, root / "701_StillsRaw_full" / f"{name}.png")
        save(np.array(COLORS, np.uint8)[mask], root / "LabeledApproved_full" / f"{name}_L.png")
    save_lines(
        (f"{r} {g} {b}\t\t{name}" for name, (r, g, b) in zip(CLASSES, COLORS, strict=True)), root / "label_colors.txt"
    )


def flat(samples: Samples, root: Path, ending: str = "_mask") -> None:
    """Writes images and masks into one folder."""
    for name, (image, mask) in samples.items():
        save(image, root / f"{name}.jpg")
        save(mask, root / f"{name}{ending}.png")
    save_lines(CLASSES, root / "classes.txt")


def mmsegmentation(samples: Samples, root: Path) -> None:
    """Writes the folders of mmsegmentation's guide to custom data sets."""
    for number, (name, (image, mask)) in enumerate(samples.items()):
        split = "val" if number % 3 == 2 else "train"
        save(image, root / "img_dir" / split / f"{name}.jpg")
        save(mask, root / "ann_dir" / split / f"{name}.png")


def sixteen_bits(path: Path, image: np.ndarray) -> None:
    """Writes a grey image of 16 bits as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint16)).save(path)


def bands(path: Path, image: np.ndarray) -> None:
    """Writes an image (H, W, C) of 16 bits and any number of bands as an uncompressed TIFF."""
    height, width, count = image.shape
    data = image.astype("<u2").tobytes()
    bits = 8 + len(data)
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, count, bits if count > 2 else 16 << 16 | 16),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
    ]
    entries += [(273, 4, 1, 8), (277, 3, 1, count), (278, 3, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1)]
    entries += [(338, 3, count - 1, bits + 2 * count if count > 3 else 0)]
    directory = bits + 4 * count
    body = data + struct.pack(f"<{count}H", *[16] * count) + bytes(2 * count)
    head = struct.pack("<2sHI", b"II", 42, directory)
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + body + struct.pack("<H", len(entries)) + listed + struct.pack("<I", 0))
