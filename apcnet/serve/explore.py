"""Computes what the page of `apcnet explore` shows: labels of one or two models, and what their heads see.

Every number comes from a public function: labels and confidence from `apcnet.predict`, affinities, similarities and
assignments from `model.context_maps`. They are sent as they are, in records with arrays.
"""

import json
import math
import struct
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from apcnet import draw, inference
from apcnet.config import Protocol
from apcnet.data.augment import view, view_sizes
from apcnet.data.synthetic import Synthetic
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.serve.network import Served

USUAL_SIDE = 1024  # of the input for a larger picture, unless the page asks for another size
ENLARGED = 4  # times the picture's size is the largest input, or SMALL_SIDE
SMALL_SIDE = 512
SAMPLES = [(family, index) for index in (2, 0, 5, 7) for family in ("regional", "whole")]  # of the validation split

ALIGNMENT = 8


def about(name: str, served: Served) -> dict:
    """Describes a model for the page."""
    model = served.model
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    architecture = getattr(model, "architecture", None) or {"model": type(model).__name__}
    words = [architecture.get("model"), architecture.get("backbone"), f"{millions:.2f} million parameters"]
    return {
        "name": name,
        "text": " · ".join(filter(None, words[: 3 if millions else 2])),
        "classes": served.classes,
        "palette": served.palette,
        "clear": sorted(draw.backgrounds(served.classes, served.palette)),
    }


def sample(index: int) -> Tensor:
    """Draws a generated scene, (3, H, W) uint8."""
    family, number = SAMPLES[index]
    return Synthetic("val", family=family)[number].image


def see(models: Sequence[Served], image: Tensor, side: int = 0) -> dict:
    """Predicts the labels of an image (3, H, W) uint8 by one or two models, and finds where the two differ.

    Args:
        models: One or two models.
        image: The image.
        side: Longest side of the network's input, at most `largest_side`; 0 for the image's own size, or USUAL_SIDE if
            that is larger.

    Returns:
        Sizes, and for each model its labels, confidence (255 for 1) and seconds.
    """
    protocol = _protocol(image, side)
    (size,) = view_sizes(image.shape[1:], protocol.ratios, protocol.test_scale)
    record: dict = {"height": image.shape[1], "width": image.shape[2], "input": size, "largest": largest_side(image)}
    record["models"] = []
    for served in models:
        start = time.perf_counter()
        (seen,) = served.predict([image], protocol, True)
        seconds = time.perf_counter() - start
        assert seen.confidence is not None  # it was asked for
        confidence = (seen.confidence * 255).round().to(torch.uint8)
        record["models"].append({"labels": seen.labels, "confidence": confidence, "seconds": seconds})
    record["differs"] = None
    if len(models) == 2:
        differs = _differs(models, [found["labels"] for found in record["models"]])
        record["differs"] = {"mask": differs.to(torch.uint8), "share": differs.double().mean().item()}
    return record


def largest_side(image: Tensor) -> int:
    """Returns the longest side of the largest input: the network sees it whole, without tiles."""
    short, long = sorted(image.shape[1:])
    return min(math.isqrt(MAX_PIXELS * long // short), max(SMALL_SIDE, ENLARGED * long))


def look_inside(models: Sequence[Served], image: Tensor, side: int = 0) -> dict:
    """Computes what the head of each model gathers from elsewhere in an image; None for heads without such maps."""
    protocol = _protocol(image, side)
    (size,) = view_sizes(image.shape[1:], protocol.ratios, protocol.test_scale)
    return {"models": [_context(served, image, size) for served in models]}


def pack(record: dict) -> bytes:
    """Packs a record with tensors in it into bytes.

    8 bytes hold the length of the JSON that follows. A tensor is {"dtype", "shape", "start"} in it; `start` counts the
    bytes from the end of the JSON. All numbers are little-endian and aligned to 8 bytes.
    """
    arrays: list[bytes] = []

    def refer(value: object) -> dict:
        if not isinstance(value, Tensor):
            raise TypeError(f"record: expected tensors and what JSON holds, got {type(value).__name__}")
        start = sum(map(len, arrays))
        arrays.append(_padded(value.contiguous().numpy().tobytes(), b"\0"))
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "start": start}

    text = _padded(json.dumps(record, default=refer).encode(), b" ")
    return b"".join([struct.pack("<Q", len(text)), text, *arrays])


def _protocol(image: Tensor, side: int) -> Protocol:
    side = min(side or min(max(image.shape[1:]), USUAL_SIDE), largest_side(image))
    return Protocol(test_scale=(side, side))


def _context(served: Served, image: Tensor, size: tuple[int, int]) -> dict | None:
    model = served.prepared
    if not hasattr(getattr(model, "head", None), "context_maps"):  # exported files have no head
        return None
    images = view(image, size, served.model.mean, served.model.std)[None].to(next(model.parameters()))
    with inference.in_evaluation(model, served.precision):
        maps = model.context_maps(images)
    rows, columns = maps.places(image.shape[1:])
    record = {"size": maps.size, "rows": rows.int(), "columns": columns.int(), "scales": []}
    if maps.assignments is not None:
        return record | {"kind": "assignments", "codewords": maps.assignments[0].float().cpu()}
    kind = "affinities" if maps.affinities else "similarities"
    record["scales"] = [
        {"scale": scale, "boxes": maps.boxes(scale), "maps": values[0].float().cpu()}
        for scale, values in zip(maps.scales, getattr(maps, kind), strict=True)
    ]
    return record | {"kind": kind}


def _differs(models: Sequence[Served], labels: Sequence[Tensor]) -> Tensor:
    """Marks the pixels whose classes have different names."""
    names = {name: i for i, name in enumerate(dict.fromkeys(name for served in models for name in served.classes))}
    first, second = (
        torch.tensor([names[name] for name in served.classes])[found.long()]
        for served, found in zip(models, labels, strict=True)
    )
    return first != second


def _padded(content: bytes, filler: bytes) -> bytes:
    return content + filler * (-len(content) % ALIGNMENT)
