"""The probes of the ablation: what they change is what they say, and nothing else."""

from dataclasses import replace

import pytest
import torch

from apcnet import runs, training
from apcnet.data.sample import IGNORE
from apcnet.data.synthetic import FABRIC, Synthetic
from benchmarks import ablation_probes as probes
from benchmarks.ablation import RECIPES

MICRO = replace(RECIPES["full"], steps=2, side=48, width=8, channels=8)


@pytest.mark.parametrize("index", range(8))
def test_halves_are_told_by_the_side_on_which_fabric_lies(index):
    """A cut lies within a twenty-fourth of the middle, and fabric as far from the cut as that."""
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


@pytest.mark.parametrize("probe", [p for p in probes.PROBES if p.seed == 0], ids=lambda p: f"{p.kind}, {p.head}")
def test_every_probe_runs_twice_to_the_same(probe, threads):
    threads(1)
    found = probes.run(probe, MICRO)
    assert found == probes.run(probe, MICRO)
    assert 0 <= found["context_miou"] <= 1
    assert found["steps"] == (8 if probe.kind == probes.LONG else 2)


def test_a_probe_that_changes_nothing_is_the_ablations_run(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(Synthetic, "context_classes", (0, 3, 4))  # which are found sooner
    recipe = replace(MICRO, steps=30)
    scores = training.train(recipe.config("PSPNet", "regional", 3), tmp_path, device="cpu")
    assert probes.run(probes.Probe("nothing", "PSPNet", 3), recipe)["context_miou"] == scores["context_miou"] > 0


def test_results_are_joined(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "RESULTS", tmp_path / "new")
    half, file = probes.Probe(probes.HALF, "FCN"), tmp_path / "new" / probes.FILE
    probes.run_all([half], MICRO)
    content = runs.read_json(file)
    (row,) = content["rows"]
    assert (row["head"], row["steps"]) == ("FCN", 2)
    assert "which half, FCN, seed 0: 0." in capsys.readouterr().out
    kept = {"probe": probes.LONG, "head": "FCN", "seed": 0, "steps": 8, "context_miou": 0.5}
    runs.write_json(file, content | {"rows": [kept]})
    probes.run_all([half, probes.Probe(probes.LONG, "FCN")], MICRO)  # the second is there
    assert runs.read_json(file) == content | {"rows": [row, kept]}
    with pytest.raises(ValueError, match="results of another recipe"):
        probes.run_all([half], RECIPES["quick"])
