"""Tests that every head gets the same data, and that interrupted runs end with the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import apc_kernels
import apcnet
from apcnet.data.stream import Batches
from apcnet.data.synthetic import Synthetic
from apcnet.training.start import augmentation, initial_model
from experiments.context import run as context
from experiments.context.run import HEADS, PUBLISHED, RECIPES, REFERENCE, Recipe, Run

MICRO = Recipe("micro", steps=12, seeds=1, batch_size=4)


@pytest.fixture
def small(monkeypatch):
    """Reduces the network and the scenes, so that runs are quick."""
    sides, tiny = (48, 48), context.TINY
    monkeypatch.setattr(
        context,
        "TINY",
        replace(
            tiny,
            model=replace(tiny.model, width=8, channels=8),
            data=replace(tiny.data, size=sides, crop=sides, scale=sides),
        ),
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def finish(run: Run, out: Path, miou: float = 0.5) -> None:
    """Writes the files of a finished run into its folder."""
    (out / run.path).mkdir(parents=True)
    iou = dict.fromkeys(Synthetic.classes, miou)
    scores = {"step": 12, "miou": miou, "context_miou": miou, "iou": iou}
    (out / run.path / "metrics.json").write_text(json.dumps(scores))


def test_every_head_gets_the_same(small):
    """Tests that scenes, order, augmentation and first weights depend on the seed and the family alone."""
    different = set()
    for seed, family in ((0, "whole"), (1, "whole"), (1, "regional")):
        given = set()
        for head in HEADS:
            config = Run(head, family, seed).config(MICRO)
            data = apcnet.data.open("synthetic", split="train", **config.data.open_options())
            model = initial_model(config, data)
            batches = Batches(data, augmentation(config.data, model), seed, config.batch_size)
            batch, weights = batches[0], next(model.backbone.parameters())
            tensors = (batch.images, batch.masks, weights.detach())
            same = replace(config, model=context.TINY.model)
            given.add((same, *batch.positions, *(t.numpy().tobytes() for t in tensors)))
        assert len(given) == 1
        different |= given
    assert len(different) == 3


def test_heads_differ_in_nothing_else():
    models = [Run(head, "whole", 0).config(RECIPES["full"]).model for head in HEADS]
    backbones = {(m.backbone, m.width, m.channels, m.dropout, m.auxiliary_channels) for m in models}
    assert backbones == {("tiny", 32, 32, 0.0, 0)}
    assert {(m.guide, m.plain) for m in models if m.model != "apcnet"} == {(None, None)}
    assert len({str(m) for m in models}) == len(HEADS)


@pytest.mark.parametrize("size", ["quick", "full"])
def test_runs_go_seed_by_seed(size):
    plan = context.plan(size)
    assert sorted(set(plan)) == sorted(plan)
    assert [run.seed for run in plan] == sorted(run.seed for run in plan)
    assert len(plan) == RECIPES[size].seeds * 2 * len(HEADS) + 1
    assert plan[2 * len(HEADS)] == REFERENCE
    assert len({run.path for run in [*plan, *context.PROBES]}) == len(plan) + len(context.PROBES)


PROGRAM = """
import sys
sys.path[:] = {path!r}  # the same packages as here
from dataclasses import replace
from pathlib import Path
from experiments.context import run as context

def config(run, recipe, usual=context.Run.config):
    found = usual(run, recipe)
    data = replace(found.data, size=(48, 48), crop=(48, 48), scale=(48, 48))
    return replace(found, model=replace(found.model, width=8, channels=8), data=data, save_every=4)

if __name__ == "__main__":
    context.Run.config = config
    run, recipe = context.Run(context.PUBLISHED, "regional", 0), context.Recipe("micro", 12, 1, 4)
    failed = context.train_all([run], recipe, Path(sys.argv[1]), lambda run: print(f"ended: {{run}}"))
    print(f"failed: {{failed}}")
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(small, tmp_path, threads):
    run, out = Run(PUBLISHED, "regional", 0), tmp_path / "out"
    program, folder = tmp_path / "program.py", out / run.path
    program.write_text(PROGRAM.format(path=sys.path))
    environment = os.environ | {"APC_KERNELS_BACKEND": "reference"}  # the checkout need not have a compiled library
    start = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, str(program), str(out)], **start) as process:
        while process.poll() is None and not (folder / "last.pt").exists():
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert (folder / "last.pt").exists() and not context.finished(run, out)

    for text in (f"ended: {run}\nfailed: []\n", "failed: []\n"):  # the second time nothing is left to do
        ended = subprocess.run([sys.executable, str(program), str(out)], **start)
        assert ended.stdout == text
    threads(1)
    with apc_kernels.backend("reference"):
        apcnet.train(replace(run.config(MICRO), save_every=4), tmp_path / "whole", device="cpu")
    for name in ("metrics.json", "final.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    scores, row = read(folder / "metrics.json"), context.result(run, out)
    iou = list(scores["iou"].values())
    assert (row["head"], row["family"], row["seed"], row["steps"]) == (*run[:3], MICRO.steps)
    assert (row["miou"], row["iou"]) == (scores["miou"], scores["iou"])
    assert row["context_miou"] == pytest.approx(sum(iou[i] for i in Synthetic.context_classes) / 3)
    assert row["other_miou"] == pytest.approx(sum(iou[:6]) / 6)


class Process:
    """Replaces a process; PSPNet's fails."""

    def __init__(self, target, args):
        self.run, _, self.folder = args

    def start(self):
        self.exitcode = 7 if self.run.head == "PSPNet" else 0
        if not self.exitcode:
            finish(self.run, self.folder.parents[len(self.run.path.parts) - 1])

    def join(self):
        pass


def test_a_failing_run_is_named_and_keeps_nobody_from_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(context.multiprocessing, "get_context", lambda how: SimpleNamespace(Process=Process))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chosen, ended = [Run(head, "whole", 0) for head in HEADS], []
    failed = context.train_all(chosen, MICRO, tmp_path, ended.append)
    assert failed == [Run("PSPNet", "whole", 0)]
    assert set(ended) == set(chosen) - set(failed) == {run for run in chosen if context.finished(run, tmp_path)}


def test_results_stay_when_folders_are_cleared_away(tmp_path, monkeypatch):
    file, out = tmp_path / "quick.json", tmp_path / "out"
    chosen = [Run("FCN", "whole", 0), REFERENCE, Run("EncNet", "regional", 1)]
    for run in chosen:
        finish(run, out)
    context.write_results("quick", out, file)
    first = read(file)
    assert [(r["head"], r["seed"]) for r in first["runs"]] == [("FCN", 0), ("EncNet", 1)]
    assert first["reference"]["head"] == PUBLISHED
    finish(Run("PSPNet", "whole", 0), tmp_path / "new")
    context.write_results("quick", tmp_path / "new", file)
    assert read(file) == first | {"runs": [first["runs"][0], read(file)["runs"][1], first["runs"][1]]}
    for what, other in (("recipe", {"steps": 13}), ("machine", {"name": "another"})):
        file.write_text(json.dumps(first | {what: first[what] | other}))
        with pytest.raises(ValueError, match=rf"results of another {what}, .*'{next(iter(other))}'"):
            context.write_results("quick", out, file)


def test_probes_have_results_of_their_own(tmp_path):
    file, probe = tmp_path / "probes.json", context.PROBES[0]
    finish(probe, tmp_path / "out", miou=0.25)
    context.write_results("probes", tmp_path / "out", file)
    row = {"probe": "which half", "head": "FCN", "seed": 0, "steps": 12, "context_miou": 0.25}
    assert read(file)["rows"] == [row]
    context.write_results("probes", tmp_path / "none", file)
    assert read(file)["rows"] == [row]


def test_the_committed_results_are_gone_on_with(tmp_path, monkeypatch):
    """Tests that other entries of a file of results are kept, and that its recipe is the current one."""
    for size in ("full", "probes"):
        committed = read(context.RESULTS / f"{size}.json")
        monkeypatch.setattr(context, "machine", lambda committed=committed: committed["machine"])
        file = tmp_path / f"{size}.json"
        file.write_text(json.dumps(committed))
        context.write_results(size, tmp_path / "none", file)
        assert read(file) == committed


def test_the_reference_run_alone_is_on_the_reference(tmp_path, monkeypatch, threads):
    threads(1)
    forced, trained = [], []
    monkeypatch.setattr(context.apc_kernels, "backend", lambda name: forced.append(name) or nullcontext())
    monkeypatch.setattr(context.training, "train", lambda config, *_, **__: trained.append(config))
    monkeypatch.setattr(context.warnings, "simplefilter", lambda *_: None)
    for run in (REFERENCE, Run(*REFERENCE[:3])):
        context.train(run, run.config(MICRO), tmp_path)
    assert forced == ["reference"] and trained[0] == trained[1]


@pytest.mark.parametrize("flags", [["--quick", "--full"], ["--seeds", "3"], ["--full=1"]])
def test_wrong_flags(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", *flags])
    with pytest.raises(SystemExit) as stopped:
        context.main()
    assert stopped.value.code == 2
    assert "--" in capsys.readouterr().err.splitlines()[-1]
