"""Measures the levels of images that are not 8-bit RGB: their range, mean and standard deviation in each channel."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Holds sums of an image, or of several, for each channel, in float64."""

    pixels: int
    mean: Tensor
    squares: Tensor  # of the differences to the mean, summed
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, levels: Tensor) -> "Moments":
        """Measures an image (C, H, W)."""
        flat = levels.flatten(1).double()
        mean = flat.mean(1)
        squares = (flat - mean[:, None]).square().sum(1)
        return cls(flat.shape[1], mean, squares, flat.amin(1), flat.amax(1))

    def plus(self, other: "Moments") -> "Moments":
        """Adds the sums of other images."""
        pixels = self.pixels + other.pixels
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.pixels / pixels)
        squares = self.squares + other.squares + apart.square() * (self.pixels * other.pixels / pixels)
        return Moments(pixels, mean, squares, self.low.minimum(other.low), self.high.maximum(other.high))


@dataclass(frozen=True)
class Statistics:
    """Describes the levels of the images of a data set: one number for each channel, and two for its range."""

    kind: str  # uint16, float32, …
    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[tuple[float, float], ...]

    @classmethod
    def over(cls, kind: str, images: Iterable[Moments]) -> "Statistics | None":
        """Merges the moments of all images of one number of channels, in order; None without images."""
        total = None
        for moments in images:
            if total is None:
                total = moments
            elif len(total.mean) == len(moments.mean):
                total = total.plus(moments)
        if total is None:
            return None
        std = (total.squares / total.pixels).sqrt()
        std = torch.where(std > 0, std, 1.0)  # a channel of one level
        ranges = zip(total.low.tolist(), total.high.tolist(), strict=True)
        return cls(kind, tuple(total.mean.tolist()), tuple(std.tolist()), tuple(ranges))

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __str__(self) -> str:
        low, high = min(low for low, _ in self.range), max(high for _, high in self.range)
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.kind}, levels {low:g} to {high:g}"

    def json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, given: dict) -> "Statistics":
        ranges = tuple((low, high) for low, high in given["range"])
        return cls(given["kind"], tuple(given["mean"]), tuple(given["std"]), ranges)
