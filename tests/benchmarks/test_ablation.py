"""The ablation's runs: every head gets the same, and a run ends with the same numbers however it got there."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import apc_kernels
from apcnet import logs, runs, training
from apcnet.config import Model
from apcnet.data.synthetic import Synthetic
from apcnet.training.signals import Interrupts
from benchmarks import ablation
from benchmarks.ablation import HEADS, PUBLISHED, RECIPES, REFERENCE, Run

MICRO = replace(RECIPES["quick"], steps=12, side=48, width=8, channels=8, seeds=1, save_every=4)


def nothing(*_) -> None:
    pass


def test_every_head_gets_the_same(tmp_path):
    """Scenes, their order, augmentation, the backbone's first weights: functions of the seed and the family."""
    different = set()
    for seed, family in ((0, "whole"), (1, "whole"), (1, "regional")):
        given = set()
        for head in HEADS:
            config = MICRO.config(head, family, seed)
            folder = tmp_path / str(seed) / family / ablation.slug(head)
            run = training.Run(config, folder, torch.device("cpu"), 0, 1, None, nothing, Interrupts())
            batch, weights = next(run.batches()), next(run.model.backbone.parameters())
            tensors = (batch.images, batch.masks, weights.detach())
            given.add((replace(config, model=Model()), *batch.positions, *(t.numpy().tobytes() for t in tensors)))
        assert len(given) == 1
        different |= given
    assert len(different) == 3


def test_heads_differ_in_nothing_else():
    backbones = {(m.backbone, m.width, m.channels, m.dropout, m.auxiliary_channels) for m in models("full")}
    assert backbones == {("tiny", 32, 32, 0.0, 0)}
    assert {(m.guide, m.plain) for m in models("full") if m.model != "apcnet"} == {(None, None)}
    assert len({str(m) for m in models("full")}) == len(HEADS)


def models(recipe: str) -> list[Model]:
    return [RECIPES[recipe].config(head, "whole", 0).model for head in HEADS]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_runs_go_seed_by_seed(recipe):
    plan = ablation.plan(recipe)
    assert sorted(set(plan)) == sorted(plan)
    assert [run.seed for run in plan] == sorted(run.seed for run in plan)
    assert len(plan) == recipe.seeds * 2 * len(HEADS) + 1
    assert plan[2 * len(HEADS)] == REFERENCE
    assert len({run.path for run in plan}) == len(plan)


def test_a_killed_run_ends_as_one_that_was_not(tmp_path, monkeypatch, threads):
    monkeypatch.setenv("APC_KERNELS_BACKEND", "reference")  # the tests' checkout need not have a compiled library
    run, out = Run(PUBLISHED, "regional", 0), tmp_path / "micro"
    ablation.prepare(MICRO, run, out)
    with ablation.only_one(out) as lock:
        process = ablation.start(MICRO, run, out, lock)
        killer = threading.Thread(target=kill_when_saved, args=(process, out / run.path))
        killer.start()
        threads(1)
        with apc_kernels.backend("reference"):
            training.train(MICRO.config(*run[:3]), tmp_path / "whole", device="cpu")
        killer.join()
    assert process.returncode == -signal.SIGKILL, ablation.output(out, run).read_text()
    assert not ablation.finished(out / run.path)

    ended = []
    assert ablation.execute(MICRO, [run], out, 2, lambda _, run: ended.append(run)) == {}
    assert [run for run in ended if run] == [run]
    scores, others = (runs.read_json(folder / "metrics.json") for folder in (out / run.path, tmp_path / "whole"))
    assert scores == others
    files = [folder / runs.FINAL for folder in (out / run.path, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    log = [record["step"] for record in logs.read(out / run.path)]
    assert log == [10, MICRO.steps, MICRO.steps]

    monkeypatch.setattr(ablation, "start", None)  # nothing is left to do
    assert ablation.execute(MICRO, [run], out, 2, nothing) == {}
    ablation.write_results(MICRO, out, tmp_path / "micro.json")
    (row,) = runs.read_json(tmp_path / "micro.json")["runs"]
    iou = list(scores["iou"].values())
    context, others = (list(map(iou.__getitem__, part)) for part in (Synthetic.context_classes, range(6)))
    assert (row["head"], row["family"], row["seed"], row["steps"]) == (*run[:3], MICRO.steps)
    assert (row["miou"], row["iou"]) == (scores["miou"], scores["iou"])
    assert row["context_miou"] == pytest.approx(sum(context) / len(context))
    assert row["other_miou"] == pytest.approx(sum(others) / len(others))


def kill_when_saved(process: subprocess.Popen, folder: Path) -> None:
    while process.poll() is None and not (folder / "last.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_a_failing_run_is_named_and_keeps_nobody_from_the_end(tmp_path, monkeypatch):
    def instead(recipe, run, out, lock):
        learns = f"open({str(out / run.path / 'metrics.json')!r}, 'w').close()"
        fails = "print('the last words'); raise SystemExit(7)"
        with ablation.output(out, run).open("w") as log:
            return subprocess.Popen([sys.executable, "-c", fails if run.head == "PSPNet" else learns], stdout=log)

    monkeypatch.setattr(ablation, "start", instead)
    chosen, most = [Run(head, "whole", 0) for head in HEADS], []
    failed = ablation.execute(MICRO, chosen, tmp_path, 3, lambda under_way, _: most.append(len(under_way)))
    assert failed == {Run("PSPNet", "whole", 0): "exit status 7: the last words"}
    assert sum(ablation.finished(tmp_path / run.path) for run in chosen) == len(HEADS) - 1
    assert max(most) <= 3


def test_results_stay_when_folders_are_cleared_away(tmp_path):
    file, run = tmp_path / "micro.json", {"seed": 0, "miou": 0.5}
    rows = [{"head": head, "family": "regional", **run} for head in HEADS]
    ablation.write_results(MICRO, tmp_path, file, costs := [{"head": "FCN", "step_ms": 1.0}])
    runs.write_json(file, runs.read_json(file) | {"runs": rows, "reference": run})
    ablation.write_results(MICRO, tmp_path, file)
    kept = runs.read_json(file)
    assert (kept["costs"], kept["runs"], kept["reference"]) == (costs, rows, run)
    with pytest.raises(ValueError, match=r"results of another recipe, .*'steps': 12.*, here it is .*'steps': 13"):
        ablation.write_results(replace(MICRO, steps=13), tmp_path, file)
    runs.write_json(file, kept | {"machine": {"name": "another"}})
    with pytest.raises(ValueError, match=r"results of another machine, \{'name': 'another'\}"):
        ablation.write_results(MICRO, tmp_path, file)


def test_a_folder_belongs_to_one_recipe(tmp_path):
    ablation.prepare(MICRO, REFERENCE, tmp_path)
    ablation.prepare(MICRO, REFERENCE, tmp_path)
    with pytest.raises(ValueError, match=r"holds another run, steps: 12 → 13"):
        ablation.prepare(replace(MICRO, steps=13), REFERENCE, tmp_path)


def test_one_at_a_time(tmp_path):
    with ablation.only_one(tmp_path), pytest.raises(ValueError, match="under way already"):
        ablation.execute(MICRO, [], tmp_path, 1, nothing)
    assert ablation.execute(MICRO, [], tmp_path, 1, nothing) == {}


def test_the_reference_run_alone_is_told_its_backend(tmp_path, monkeypatch):
    monkeypatch.delenv("APC_KERNELS_BACKEND", raising=False)
    told = {}

    def instead(command, env, **_):
        told[command[-1]] = env.get("APC_KERNELS_BACKEND"), env["OMP_NUM_THREADS"]

    monkeypatch.setattr(ablation.subprocess, "Popen", instead)
    for run in (REFERENCE, Run(*REFERENCE[:3])):
        ablation.prepare(MICRO, run, tmp_path)
        ablation.start(MICRO, run, tmp_path, lock=-1)
    assert list(told.values()) == [("reference", "1"), (None, "1")]
    assert "APC_KERNELS_BACKEND" not in os.environ


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--seeds", "3"], ["--only", "apc"], ["--quick", "--full"]])
def test_wrong_flags(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablation", *(["--quick"] if "--quick" not in flags else []), *flags])
    with pytest.raises(SystemExit) as stopped:
        ablation.main()
    assert stopped.value.code == 2
    assert "--" in capsys.readouterr().err.splitlines()[-1]
