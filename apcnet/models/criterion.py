"""Computes the training losses of logits: a sum of losses of pixels and regions (apcnet.terms), by name.

The losses of pixels share one denominator, which may count the pixels of other processes and parts of a batch too. The
losses of regions are those of the images at hand. Neither stores logits at the target's size.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import apc_kernels
from apcnet import losses
from apcnet.terms import REGIONS, SIGMOID, SMOOTHED, Term, parse

OF_SUMS = {
    "dice": losses.dice_of_sums,
    "jaccard": losses.jaccard_of_sums,
    "tversky": losses.tversky_of_sums,
    "focal_tversky": losses.focal_tversky_of_sums,
    "generalised_dice": losses.generalised_dice_of_sums,
}


@dataclass(frozen=True)
class Criterion:
    """Describes what a model minimises: a sum of losses, and their settings.

    Attributes:
        terms: Sum of losses, such as "cross_entropy+0.5*dice": cross_entropy, focal, ohem, dice, jaccard, tversky,
            focal_tversky and generalised_dice, each with a weight before it or without. Models with one logit take
            binary_cross_entropy and binary_focal instead of the first three.
        focal_gamma: Exponent of focal and binary_focal.
        ohem_threshold: Probability of the label below which ohem keeps a pixel.
        ohem_share: Share of the labelled pixels that ohem keeps at least.
    """

    terms: str = "cross_entropy"
    focal_gamma: float = 2.0
    ohem_threshold: float = 0.7
    ohem_share: float = 0.2

    def of_logits(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        align_corners: bool = False,
        reduction: str = "mean_all",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        denominator: Tensor | float | None = None,
        parts: int = 1,
    ) -> dict[str, Tensor]:
        """Returns the weighted losses of a head's logits (B, K, h, w) by name; the options are those of a Segmentor."""
        terms = parse(self.terms)
        _check_classes(terms, logits.shape[1])
        shared = {"ignore_index": ignore_index, "align_corners": align_corners}
        pixels = {**shared, "weight": weight, "reduction": reduction, "denominator": denominator}
        pair, sums, found = logits, None, {}
        if logits.shape[1] == 1:  # a sigmoid is the softmax of two logits, the first of which is 0
            pair = F.pad(logits, (0, 0, 0, 0, 1, 0))
        for term in terms:
            if term.name in SMOOTHED:
                loss = apc_kernels.upsample_cross_entropy(pair, target, label_smoothing=label_smoothing, **pixels)
            elif term.name in ("focal", "binary_focal"):
                loss = apc_kernels.upsample_cross_entropy(pair, target, focal=self.focal_gamma, **pixels)
            elif term.name == "ohem":
                mined = {"threshold": self.ohem_threshold, "share": self.ohem_share}
                if reduction == "mean":  # over the pixels that are kept here
                    mined["denominator"] = None
                loss = losses.ohem(pair, target, **(pixels | mined)) / (parts if reduction == "mean" else 1)
            else:
                if sums is None:
                    mode = "binary" if logits.shape[1] == 1 else "multiclass"
                    sums = losses.region_sums(logits, target, mode=mode, **shared)
                loss = OF_SUMS[term.name](sums) / parts
            found[term.short] = loss if term.weight == 1 else term.weight * loss
        return found


def _check_classes(terms: tuple[Term, ...], channels: int) -> None:
    binary = [term.name for term in terms if term.name in SIGMOID]
    if binary and channels != 1:
        raise ValueError(f"num_classes: expected 1, a single logit, for {binary[0]}, got {channels}")
    if channels == 1 and not binary and any(term.name not in REGIONS for term in terms):
        raise ValueError(
            "num_classes: expected 2 or more for a softmax cross entropy, which is 0 for a single class, got 1; create "
            "the model with a class for the background too, or train it with loss='binary_cross_entropy' "
            "(apcnet train --loss binary_cross_entropy)"
        )
