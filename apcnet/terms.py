"""Reads a sum of training losses such as `cross_entropy+0.5*dice`; apcnet.models.criterion computes it."""

import math
import re
from dataclasses import dataclass

from apcnet.choices import check_choice

SOFTMAX = {"cross_entropy": "ce", "focal": "focal", "ohem": "ohem"}  # losses of pixels, and their names in a log
SIGMOID = {"binary_cross_entropy": "bce", "binary_focal": "focal"}  # the same of models with one logit
REGIONS = ("dice", "jaccard", "tversky", "focal_tversky", "generalised_dice")
NAMES = (*SOFTMAX, *SIGMOID, *REGIONS)
SMOOTHED = ("cross_entropy", "binary_cross_entropy")


@dataclass(frozen=True)
class Term:
    """Holds one loss of a sum, and its weight."""

    name: str
    weight: float = 1.0

    @property
    def short(self) -> str:
        """Returns the name by which the loss is logged, after `loss_`."""
        return {**SOFTMAX, **SIGMOID}.get(self.name, self.name)


def parse(loss: str) -> tuple[Term, ...]:
    """Reads a sum of losses, each with a weight before it or without: `cross_entropy+0.5*dice`."""
    terms = tuple(_term(part.strip(), loss) for part in loss.split("+"))
    names = [term.name for term in terms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"loss: expected every loss once, got {twice} twice in {loss!r}")
    binary, softmax = ([name for name in names if name in kind] for kind in (SIGMOID, SOFTMAX))
    if binary and softmax:
        raise ValueError(
            f"loss: expected either losses of one logit or of a softmax, got {binary[0]} and {softmax[0]} in {loss!r}"
        )
    return terms


def is_binary(loss: str) -> bool:
    """Tells whether a sum of losses trains one logit for two classes."""
    return any(term.name in SIGMOID for term in parse(loss))


def _term(part: str, loss: str) -> Term:
    match = re.fullmatch(r"(?:([^*]*)\*)?\s*(\w+)", part)
    if match is None:
        raise ValueError(f"loss: expected a sum such as cross_entropy+0.5*dice, got {loss!r}")
    factor, name = match.groups()
    check_choice(name, "loss", NAMES)
    try:
        weight = 1.0 if factor is None else float(factor)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"loss: expected a positive weight of {name}, got {factor.strip()!r} in {loss!r}")
    return Term(name, weight)
