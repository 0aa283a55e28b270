"""Tests that the experiment's probes change what they say, and nothing else."""

from dataclasses import replace

import pytest
import torch

import apcnet
from apcnet.data.sample import IGNORE
from apcnet.data.synthetic import FABRIC, Synthetic
from experiments.context import probes
from experiments.context import run as context
from experiments.context.run import LONG, PROBES, Recipe, Run

MICRO = Recipe("micro", steps=2, seeds=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Reduces the network and the scenes, so that runs are quick."""
    sides, tiny = (48, 48), context.TINY
    data = replace(tiny.data, size=sides, crop=sides, scale=sides)
    monkeypatch.setattr(context, "TINY", replace(tiny, model=replace(tiny.model, width=8, channels=8), data=data))


@pytest.mark.parametrize("index", range(8))
def test_halves_are_told_by_the_side_on_which_fabric_lies(index):
    """Tests fabric at least a twenty-fourth from the cut, which lies as close to the middle."""
    mask = Synthetic("val", "regional")[index].mask
    found = probes.halves(mask)
    fabric = (mask >= FABRIC) & (mask != IGNORE)
    assert torch.equal(found[~fabric], mask[~fabric])
    across = mask[1, -2] != mask[1, 1]  # a band along the top has both cues: the halves are left and right
    side = 96
    place = torch.arange(side).expand(side, side) if across else torch.arange(side)[:, None].expand(side, side)
    assert torch.equal(found[fabric] == FABRIC + 1, place[fabric] >= side // 2)
    assert set(found[fabric].tolist()) <= {FABRIC, FABRIC + 1}


def test_halves_of_a_mirror_image_have_changed_places():
    mask = Synthetic("val", "regional")[next(i for i in range(9) if divided_left_and_right(i))].mask
    fabric = (mask >= FABRIC) & (mask != IGNORE)
    there, mirrored = probes.halves(mask), probes.halves(mask.flip(1)).flip(1)
    assert torch.equal(there[fabric] + mirrored[fabric], torch.full_like(there[fabric], 2 * FABRIC + 1))


def divided_left_and_right(index: int) -> bool:
    mask = Synthetic("val", "regional")[index].mask
    return bool(mask[1, -2] != mask[1, 1])


def test_positions_take_the_place_of_two_channels():
    maps = [torch.rand(2, 4, 3, 5), torch.rand(2, 4, 3, 5)]
    first, last = probes.Placed(torch.nn.Sequential())(maps)
    assert torch.equal(first, maps[0]) and torch.equal(last[:, 2:], maps[1][:, 2:])
    assert last[1, 0, :, 4].tolist() == [-1, 0, 1] and last[0, 1, 2].tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize("run", [run for run in PROBES if run.change != LONG], ids=str)
def test_every_probe_runs_twice_to_the_same(run, threads):
    threads(1)
    found = probes.train(run.config(MICRO), run.change)
    assert found == probes.train(run.config(MICRO), run.change)
    assert 0 <= found["context_miou"] <= 1 and found["step"] == 2


def test_four_times_as_long():
    assert {run.config(MICRO).steps for run in PROBES if run.change == LONG} == {8}


def test_a_probe_that_changes_nothing_is_a_usual_run(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(Synthetic, "context_classes", (0, 3, 4))  # which are found sooner
    config = replace(Run("PSPNet", "regional", 3).config(MICRO), steps=30, eval_every=30)
    scores = apcnet.train(config, tmp_path, device="cpu")
    assert probes.train(config, "nothing")["context_miou"] == scores["context_miou"] > 0
