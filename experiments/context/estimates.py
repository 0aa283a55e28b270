"""What a few runs, one for each seed, say about a mean: standard deviation and Student's confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from experiments.context.run import FAMILIES, HEADS

MEASURES = {"miou": "all classes", "context_miou": "context classes", "other_miou": "other classes"}
ENOUGH = 3  # seeds; of fewer an interval says nothing
# Below which Student's distribution has the probability 0.975, by degrees of freedom.
STUDENT = {2: 4.302652729749, 3: 3.182446305284, 4: 2.776445105198}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, from the value of each."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation."""
        return stdev(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the mean lies at 95 % confidence."""
        half = STUDENT[len(self.values) - 1] * self.deviation / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies above or below 0; 0 where it does not."""
        low, high = self.interval
        return (low > 0) - (high < 0)


Estimates = dict[str, dict[str, dict[str, Estimate]]]  # by family, head and measure


def paired(ours: Sequence[float], other: Sequence[float]) -> Estimate:
    """Of the differences, value by value: what both sides share, such as the data's order, cancels."""
    return Estimate(tuple(a - b for a, b in zip(ours, other, strict=True)))


def complete_seeds(results: dict) -> list[int]:
    """Those that every head has come to the end of, on both families."""
    found = {(run["head"], run["family"], run["seed"]) for run in results["runs"]}
    seeds = range(results["recipe"]["seeds"])
    complete = [seed for seed in seeds if all((h, f, seed) in found for f in FAMILIES for h in HEADS)]
    if len(complete) < ENOUGH:
        raise ValueError(
            f"results: expected {ENOUGH} seeds that every head has come to the end of, found {len(complete)}; "
            "the same python -m experiments.context.run goes on with them"
        )
    return complete


def estimates(results: dict) -> Estimates:
    """Every measure of every head over the complete seeds."""
    by_run, seeds = {(r["head"], r["family"], r["seed"]): r for r in results["runs"]}, complete_seeds(results)

    def of_head(head: str, family: str) -> dict[str, Estimate]:
        return {m: Estimate(tuple(by_run[head, family, seed][m] for seed in seeds)) for m in MEASURES}

    return {family: {head: of_head(head, family) for head in HEADS} for family in FAMILIES}


def difference(found: Estimates, family: str, head: str, other: str, measure: str) -> Estimate:
    return paired(found[family][head][measure].values, found[family][other][measure].values)
