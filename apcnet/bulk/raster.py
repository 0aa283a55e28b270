"""Predicts the labels of rasters of any size, window by window: GeoTIFF and other large images.

Windows overlap, and their scores are averaged as `apcnet.predict` averages those of a protocol's window: the labels are
the same. A raster goes in strips of columns, so that memory holds the scores of a few windows whatever the raster's
width and height. Windows at the borders of strips are computed for both sides.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apc_kernels import upsample_argmax
from apcnet import draw, inference
from apcnet.bulk.geotiff import (
    BLOCK,
    NO_CONFIDENCE,
    Raster,
    Tile,
    confidence_file,
    confidence_levels,
    gdal,
    label_file,
    no_data,
)
from apcnet.bulk.overlap import Behind, ahead
from apcnet.config import Precision, Protocol
from apcnet.data.augment import view, view_sizes
from apcnet.inference.logits import resized, score_bands, windows_along
from apcnet.inference.prediction import prepared_model
from apcnet.inference.protocol import WHOLE, of_classes, winning
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import Segmentor, count_labels

STRIP_SCORES = 1 << 28  # of a strip's band of windows, classes × rows × columns: 1 GiB
ROWS = 64  # whose labels are chosen at a time
SUFFIXES = (".tif", ".tiff")

Rows = Iterator[tuple[int, list[np.ndarray]]]  # from top to bottom: the first one, and the arrays (h, w) that go there


def predict_raster(
    model: Segmentor | str | Path,
    source: str | Path,
    out: str | Path,
    protocol: Protocol = WHOLE,
    *,
    bands: Sequence[int] | None = None,
    confidence: bool = False,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predicts a raster of any size, and writes its labels to a TIFF at the same place on earth.

    The result is tiled and compressed. It has the source's coordinate system and transform, the classes' colours as a
    palette, and their names as tags CLASS_0, CLASS_1 and so on. Pixels without data in the source (no-data value, mask,
    opacity 0, NaN) have none in the result: label 255, or 65535 with more than 255 classes. Needs the package rasterio.

    Args:
        model: A model of `apcnet.create` or `apcnet.load` on any device, or the path of its file.
        source: A GeoTIFF, or any other raster that GDAL reads.
        out: Where to write the labels, NAME.tif; the file appears once it is whole.
        protocol: Window and stride, in pixels of the raster, and the ratios and flips at which each window is seen. By
            default windows overlap by a third. A raster keeps its resolution: a test_scale is an error.
        bands: Numbers of the bands that are the model's channels, in their order, from 1; by default all bands but
            that of opacity.
        confidence: Also write the probability of every pixel's label to NAME_confidence.tif.
        max_pixels: Largest number of pixels that the network sees at once, if the protocol has no window.
        precision: Precision of the matrix products: "float32", "bfloat16" or "float16" (autocast).
        progress: Called with the number of finished windows and the total.

    Example:
        >>> windows = Protocol(window=(512, 512), stride=(384, 384))
        >>> predict_raster("model.safetensors", "city.tif", "labels.tif", windows)
    """
    out = Path(out)
    outputs = [out, out.with_name(f"{out.stem}_confidence{out.suffix}")][: 1 + confidence]
    _check(source, outputs, protocol)
    with prepared_model(model, max_pixels, precision, several=True) as prepared, gdal(), ExitStack() as stack:
        raster = stack.enter_context(closing(Raster(source, prepared, bands)))
        windows = _Windows(prepared, raster.size, protocol, max_pixels)
        classes = getattr(prepared, "classes", None) or [f"class {i}" for i in range(windows.classes)]
        palette = getattr(prepared, "palette", None) or draw.palette(windows.classes)
        files = [stack.enter_context(label_file(raster, out, classes, palette))]
        files += [stack.enter_context(confidence_file(raster, path)) for path in outputs[1:]]
        write = stack.enter_context(Behind())
        strips = windows.strips()
        places = [place for strip in strips for place in windows.places(strip)]
        tiles = stack.enter_context(closing(ahead(raster.read(*place) for place in places)))
        counted = _counted(tiles, len(places), progress)
        for strip in strips:
            for top, parts in _whole_blocks(windows.predicted(strip, counted, confidence), raster.size[0]):
                for file, part in zip(files, parts, strict=True):
                    write(file.write, top, strip.start, part)


class Strip(NamedTuple):
    """Holds columns of the result, start to stop, and those of all windows that add to them, first to end."""

    start: int
    stop: int
    first: int
    end: int


class _Windows:
    """Cuts a raster into strips and windows, and predicts these as `apcnet.predict` does tiles of a large image."""

    def __init__(self, model: Segmentor, size: tuple[int, int], protocol: Protocol, max_pixels: int):
        self.model, self.size, self.classes = model, size, count_labels(model)
        views = view_sizes(size, protocol.ratios)
        self.factors = [max(each) / max(size) for each in views]
        largest = max(map(math.prod, views))
        if protocol.window and protocol.stride:
            self.window, self.stride = protocol.window, protocol.stride
        elif largest <= max_pixels:
            self.window, self.stride = size, size
        else:
            pixels = min(int(max_pixels * math.prod(size) / largest), STRIP_SCORES // (3 * self.classes))
            side = max(1, math.isqrt(pixels))
            self.window, self.stride = (side, side), (max(1, 2 * side // 3),) * 2
        self.protocol = dataclasses.replace(protocol, window=None, stride=None)  # of one window

    def strips(self) -> list[Strip]:
        """Returns strips of whole blocks, each as wide as STRIP_SCORES allows, but one block at least."""
        width = self.size[1]
        lefts, side, _ = windows_along(width, self.window[1], self.stride[1])
        most = STRIP_SCORES // (self.classes * min(self.window[0], self.size[0]))

        def strip(start: int, stop: int) -> Strip:
            adding = [left for left in lefts if left < stop and left + side > start]
            return Strip(start, stop, adding[0], adding[-1] + side)

        strips: list[Strip] = []
        for stop in [*range(BLOCK, width, BLOCK), width]:
            longer = strip(strips[-1].start if strips else 0, stop)
            if strips and longer.end - longer.first <= most:
                strips[-1] = longer
            else:
                strips.append(strip(strips[-1].stop if strips else 0, stop))
        return strips

    def places(self, strip: Strip) -> Iterator[tuple[slice, slice]]:
        """Yields the rows and columns of the windows of a strip, in the order in which `score_bands` asks for them."""
        tops, height, _ = windows_along(self.size[0], self.window[0], self.stride[0])
        lefts, width, _ = windows_along(strip.end - strip.first, self.window[1], self.stride[1])
        for top in tops:
            for left in lefts:
                start = strip.first + left
                yield slice(top, top + height), slice(start, start + width)

    def predicted(
        self, strip: Strip, tiles: Iterator[Tile], confidence: bool
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields rows of a strip from top to bottom: the first row, the labels and, on request, the confidence."""
        row: list[tuple[slice, np.ndarray | None]] = []  # the pixels with data in the last row of windows

        def scores(_: slice, columns: slice) -> Tensor:
            tile = next(tiles)
            row.append((columns, tile.valid))
            return self._scores(tile)

        cut = slice(strip.start - strip.first, strip.stop - strip.first)
        size = self.size[0], strip.end - strip.first
        for top, band in score_bands(scores, size, self.window, self.stride):
            valid = np.ones((band.shape[2], size[1]), bool)
            for columns, part in row:
                if part is not None:
                    valid[:, columns] = part[: band.shape[2]]
            row.clear()
            for start in range(0, band.shape[2], ROWS):
                rows = slice(start, start + ROWS)
                yield top + start, self._results(band[:, :, rows, cut], ~valid[rows, cut], confidence)

    def _results(self, scores: Tensor, empty: np.ndarray, confidence: bool) -> list[np.ndarray]:
        """Returns labels and, on request, levels of confidence; pixels without data have none."""
        corners, missing = self.model.align_corners, no_data(self.classes)
        labels = upsample_argmax(scores, scores.shape[2:], align_corners=corners)
        results = [labels[0].cpu().numpy().astype(np.uint8 if missing == 255 else np.uint16)]
        results[0][empty] = missing
        if confidence:
            results.append(confidence_levels(winning(scores, labels, corners, self.protocol.averages)[0].cpu().numpy()))
            results[1][empty] = NO_CONFIDENCE
        return results

    def _scores(self, tile: Tile) -> Tensor:
        """Computes the scores (1, K, h, w) of a window; those of one without data do not count, and are 0."""
        size = tile.levels.shape[1:]
        parameter = next(self.model.parameters(), torch.empty(0))
        if tile.valid is not None and not tile.valid.any():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            return torch.zeros(1, 1, 1, 1, dtype=dtype, device=parameter.device).expand(1, self.classes, *size)
        sizes = ([max(1, round(side * factor)) for side in size] for factor in self.factors)
        views = (view(tile.levels, each, self.model.mean, self.model.std)[None].to(parameter) for each in sizes)
        with torch.no_grad():
            if self.protocol.averages:
                return inference.probabilities(self.model, views, self.protocol, size=size)
            (only,) = views
            logits = self.model(only) if self.protocol.single_resize else inference.whole_logits(self.model, only)
            return of_classes(resized(self.model, logits, size))


def _check(source: str | Path, outputs: Sequence[Path], protocol: Protocol) -> None:
    """Checks the names of the files and the protocol."""
    if outputs[0].suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: expected NAME.tif, got {outputs[0]}")
    for path in outputs:
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise ValueError(f"out: {path} is the raster that is read; choose another name")
    if protocol.test_scale is not None:
        raise ValueError(
            f"test_scale: expected None, since a raster keeps its resolution, got {protocol.test_scale}; use ratios"
        )


def _counted(tiles: Iterator[Tile], total: int, progress: Callable[[int, int], None] | None) -> Iterator[Tile]:
    """Yields tiles, and reports those that are done when the next one is asked for."""
    for done, tile in enumerate(tiles, 1):
        yield tile
        if progress is not None:
            progress(done, total)


def _whole_blocks(parts: Iterator[tuple[int, list[np.ndarray]]], height: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Joins rows that come one part after another, and yields them in whole blocks, which are written once."""
    kept: list[np.ndarray] = []
    for top, arrays in parts:
        kept = [np.concatenate(pair) for pair in zip(kept, arrays, strict=True)] if kept else arrays
        end, count = top + len(arrays[0]), len(kept[0])
        whole = count if end == height else count - end % BLOCK
        if whole > 0:
            yield end - count, [array[:whole] for array in kept]
            kept = [array[whole:] for array in kept]
