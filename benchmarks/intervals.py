"""What a few values, one for each seed, say about their mean: standard deviation and Student's confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

ENOUGH = 3  # values; of fewer an interval says nothing, and they are shown one by one


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, from the value of each."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation, if there are enough values."""
        return stdev(self.values) if len(self.values) >= ENOUGH else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which the mean lies at 95 % confidence, if there are enough values."""
        if self.deviation is None:
            return None
        half = student_quantile(0.975, len(self.values) - 1) * self.deviation / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies above or below 0; 0 where it does not, or where there is none."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return (low > 0) - (high < 0)


def paired(ours: Sequence[float], other: Sequence[float]) -> Estimate:
    """Of the differences, value by value: what both sides share, such as the data's order, cancels."""
    return Estimate(tuple(a - b for a, b in zip(ours, other, strict=True)))


def student_quantile(probability: float, freedom: int) -> float:
    """The t below which Student's distribution with so many degrees of freedom has this probability, ½ to 1."""
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability: expected 0.5 up to 1, without 1, got {probability}")
    if freedom < 1:
        raise ValueError(f"freedom: expected 1 or more, got {freedom}")
    within, low, high = 2 * probability - 1, 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _within(middle, freedom) < within:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(middle)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < √freedom·tan(angle)): a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3–4)."""
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2 == 0:
        for i in range(freedom // 2):
            total += term
            term *= cosine**2 * (2 * i + 1) / (2 * i + 2)
        return math.sin(angle) * total
    for i in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * i + 2) / (2 * i + 3)
    return 2 / math.pi * (angle + math.sin(angle) * cosine * total)
