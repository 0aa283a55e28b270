"""Tests the counts of a training step, and that docs/scale.md shows them.

Models are counted in a process of its own: tests fill the memory that the package takes, which meta tensors have not.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import apcnet
from apcnet.presets import preset
from benchmarks import costs

ROOT = Path(__file__).resolve().parents[2]


def output(*words: str) -> str:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_each_gpu_of_a_ring_sends_nearly_twice_the_gradients():
    assert costs.exchanged(1000, 1) == 0 and costs.exchanged(1000, 2) == 4000 and costs.exchanged(1000, 64) == 7875


@pytest.mark.slow
def test_the_counts_are_those_of_the_model():
    program = "import json; from benchmarks import costs; print(json.dumps(costs.counts('encnet-r50-ade20k').__dict__))"
    one = json.loads(output("-c", program))
    model = apcnet.create("encnet", "resnet50", 150, **preset("encnet-r50-ade20k").model.options())
    state = [*model.parameters(), *model.parameters(), *model.buffers()]  # the momentum is as large as the weights
    assert one["parameters"] == sum(p.numel() for p in model.parameters())
    assert one["state"] == sum(t.numel() * t.element_size() for t in state)
    stem = 2 * 256 * 256 * 3 * 9 * 32  # of the first convolution, which has gradients of its weights alone
    assert one["operations"] > 2 * stem


@pytest.mark.slow
def test_the_page_shows_the_tables():
    text = (ROOT / "docs" / "scale.md").read_text()
    tables = output("-m", "benchmarks.costs").strip().split("\n\n")
    assert len(tables) == 2 and all(table in text for table in tables)
