"""Compares the labels of two programs for one model: they may differ only where the two best scores tie in rounding."""

import torch
from torch import Tensor

ROUNDING = 1e-5  # of the largest logit


def assert_same_but_ties(actual: Tensor, expected: Tensor, logits: Tensor) -> None:
    """Checks that labels (H, W) differ only where the scores of both, in logits (K, H, W), are within rounding."""
    assert actual.shape == expected.shape == logits.shape[1:] and actual.dtype == expected.dtype
    one, other = (logits.gather(0, labels[None].long())[0] for labels in (actual, expected))
    apart = (one - other).abs() > ROUNDING * logits.abs().max()
    assert not apart.any(), f"{int(apart.sum())} of {apart.numel()} labels differ, and no tie explains it"
    assert (actual != expected).double().mean() <= 0.01  # a constant picture would tie everywhere
    assert len(torch.unique(expected)) > 1  # or there is nothing to compare
