"""Estimates a mean from a few runs, one for each seed: standard deviation and Student's confidence interval."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from experiments.context.run import FAMILIES, HEADS

MEASURES = {"miou": "all classes", "context_miou": "context classes", "other_miou": "other classes"}
ENOUGH = 3  # seeds; with fewer, an interval means nothing
# The 0.975 quantile of Student's distribution, by degrees of freedom.
STUDENT = {2: 4.302652729749, 3: 3.182446305284, 4: 2.776445105198}


@dataclass(frozen=True)
class Estimate:
    """Holds the value of each seed, and estimates their mean."""

    values: tuple[float, ...]

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Subtracts seed by seed, so that what both sides share, such as the order of the data, cancels."""
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """Returns the standard deviation of the sample."""
        return stdev(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % confidence interval of the mean."""
        half = STUDENT[len(self.values) - 1] * self.deviation / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    @property
    def sign(self) -> int:
        """Returns 1 if the interval lies above 0, −1 if it lies below, and 0 otherwise."""
        low, high = self.interval
        return (low > 0) - (high < 0)


Estimates = dict[str, dict[str, dict[str, Estimate]]]  # by family, head and measure


def complete_seeds(results: dict) -> list[int]:
    """Lists the seeds that every head has finished, on both families."""
    found = {(run["head"], run["family"], run["seed"]) for run in results["runs"]}
    seeds = range(results["recipe"]["seeds"])
    complete = [seed for seed in seeds if all((h, f, seed) in found for f in FAMILIES for h in HEADS)]
    if len(complete) < ENOUGH:
        expected = f"expected {ENOUGH} seeds that every head has finished, found {len(complete)}"
        raise ValueError(f"results: {expected}; run the same python -m experiments.context.run again to continue")
    return complete


def estimates(results: dict) -> Estimates:
    """Estimates every measure of every head over the complete seeds."""
    by_run, seeds = {(r["head"], r["family"], r["seed"]): r for r in results["runs"]}, complete_seeds(results)

    def of_head(head: str, family: str) -> dict[str, Estimate]:
        return {m: Estimate(tuple(by_run[head, family, seed][m] for seed in seeds)) for m in MEASURES}

    return {family: {head: of_head(head, family) for head in HEADS} for family in FAMILIES}
