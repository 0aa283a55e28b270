"""Tests the benchmark of engines: what it compares before it measures, and how it takes turns."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import engines


def test_outputs_are_compared_first():
    images, logits = torch.zeros(1, 3, 32, 40), torch.randn(1, 5, 4, 5)
    labels = F.interpolate(logits, (32, 40), mode="bilinear").argmax(1)
    engines.check("same", engines.LOGITS, logits, logits, images)
    engines.check("same", engines.LABELS, labels.byte(), logits, images)
    for way in engines.TO_LABELS.values():
        engines.check("resized", engines.LABELS, way(logits, images), logits, images)
    with pytest.raises(RuntimeError, match="other: logits are off by"):
        engines.check("other", engines.LOGITS, logits + 0.1, logits, images)
    with pytest.raises(RuntimeError, match="other: labels are off by"):
        engines.check("other", engines.LABELS, (labels + 1) % 5, logits, images)
    with pytest.raises(RuntimeError, match="NaN: logits are off by nan"):
        engines.check("NaN", engines.LOGITS, logits * float("nan"), logits, images)


def test_sides_take_turns():
    order = []
    found = [engines.Side(name, lambda x, name=name: order.append(name)) for name in "abc"]
    times = engines.measured(found, torch.zeros(1), 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3, "c": 3}
