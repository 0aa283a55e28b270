"""Cuts a raster into windows that overlap, and chooses labels by the mean of their scores, in strips of columns.

Memory holds the scores of a few windows, whatever the raster's width and height. Windows at the borders of strips are
computed for both sides. The mean is that of `apcnet.predict`, to the bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apc_kernels import upsample_argmax
from apcnet.config import Protocol
from apcnet.data.augment import view_sizes
from apcnet.inference.logits import resized, score_bands, windows_along
from apcnet.inference.protocol import of_classes, winning
from apcnet.inference.tiles import Tiles
from apcnet.models.segmentor import Segmentor, count_labels

STRIP_SCORES = 1 << 26  # of a strip's band of windows, classes × rows × columns: 256 MiB
STRIP_WINDOWS = 6  # a strip is at least as wide as so many of them: about one in eleven is computed twice
BLOCK = 256  # pixels of a side of the blocks of the files that are written; strips are a number of blocks wide
ROWS = 64  # whose labels are chosen at a time
CONFIDENCE_STEPS, NO_CONFIDENCE = 254, 255  # levels of a byte that mean 1 and no data

Rows = Iterator[tuple[int, list[np.ndarray]]]  # from top to bottom: the first one, and the arrays (h, w) that go there


class Tile(NamedTuple):
    """Holds the levels (C, h, w) of a window, and which of its pixels (h, w) have data; None if all have."""

    levels: Tensor
    valid: np.ndarray | None


class Strip(NamedTuple):
    """Holds columns of the result, start to stop, and those of all windows that add to them, first to end."""

    start: int
    stop: int
    first: int
    end: int


class Windows:
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
            pixels = min(int(max_pixels * math.prod(size) / largest), STRIP_SCORES // self.classes)
            side = max(1, math.isqrt(pixels))
            self.window, self.stride = (side, side), (max(1, 2 * side // 3),) * 2
        self.protocol = dataclasses.replace(protocol, window=None, stride=None)  # of one window

    def strips(self) -> list[Strip]:
        """Returns strips of whole blocks, each as wide as STRIP_SCORES and STRIP_WINDOWS allow."""
        width = self.size[1]
        lefts, side, _ = windows_along(width, self.window[1], self.stride[1])
        most = STRIP_SCORES // (self.classes * min(self.window[0], self.size[0]))
        most = max(most, side + (STRIP_WINDOWS - 1) * self.stride[1])

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

    def predicted(self, strip: Strip, tiles: Iterator[Tile], confidence: bool, advance: Callable[[], None]) -> Rows:
        """Yields rows of a strip from top to bottom: the first row, the labels and, on request, the confidence."""
        row: list[tuple[slice, np.ndarray | None]] = []  # the pixels with data in the last row of windows

        def scores(_: slice, columns: slice) -> Tensor:
            tile = next(tiles)
            row.append((columns, tile.valid))
            result = self._scores(tile)
            advance()
            return result

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
        if tile.valid is not None and not tile.valid.any():
            parameter = next(self.model.parameters(), torch.empty(0))
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            return torch.zeros(1, 1, 1, 1, dtype=dtype, device=parameter.device).expand(1, self.classes, *size)
        with torch.no_grad():
            scores = Tiles(self.model, self.factors, self.protocol, tile.levels.dtype)(tile.levels[None])
            return of_classes(scores if scores.shape[2:] == size else resized(self.model, scores, size))


def whole_blocks(parts: Rows, height: int) -> Rows:
    """Joins rows that come one part after another, and yields them in whole blocks, which are written once."""
    kept: list[np.ndarray] = []
    for top, arrays in parts:
        kept = [np.concatenate(pair) for pair in zip(kept, arrays, strict=True)] if kept else arrays
        end, count = top + len(arrays[0]), len(kept[0])
        whole = count if end == height else count - end % BLOCK
        if whole > 0:
            yield end - count, [array[:whole] for array in kept]
            kept = [array[whole:] for array in kept]


def confidence_levels(shares: np.ndarray) -> np.ndarray:
    """Converts probabilities to levels of a byte."""
    return np.round(shares * CONFIDENCE_STEPS).astype(np.uint8)


def no_data(classes: int) -> int:
    """Returns the label of pixels without data: 255, or 65535 if a class has that number."""
    return 255 if classes <= 255 else 65535
