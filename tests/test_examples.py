"""Runs the examples as a user does, without arguments of their own data, and checks what they print and write."""

import json
import os
import re
from pathlib import Path

import forked
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def run(program: str | list[str], *arguments: str, cwd: Path) -> str:
    """Runs an example in a process of its own and returns what it prints."""
    command = [EXAMPLES / program] if isinstance(program, str) else program
    done = forked.run([*command, *arguments], cwd, ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return done.stdout


def miou(output: str) -> float:
    return float(re.search(r"mIoU ([\d.]+)%", output)[1])


def test_help_names_every_option(tmp_path):
    """Runs all of them in one process, since PyTorch takes a second to import."""
    programs = [p for p in PROGRAMS if p not in ("lightning_module.py", "predict_on_ray.py")]
    code = f"""
import contextlib, runpy, sys
sys.path.insert(0, {str(EXAMPLES)!r})
for program in {programs!r}:
    sys.argv = [program, "--help"]
    print("PROGRAM")
    with contextlib.suppress(SystemExit):
        runpy.run_path({str(EXAMPLES)!r} + "/" + program, run_name="__main__")
"""
    texts = run(["-c", code], cwd=tmp_path).split("PROGRAM\n")[1:]
    for program, text in zip(programs, texts, strict=True):
        options = re.findall(r'add_argument\("(--[\w-]+)"', (EXAMPLES / program).read_text())
        assert options and all(option in text for option in options), program


def test_folders_are_predicted(tmp_path):
    """Tests the example's own scenes, and then other images with the model that it has trained."""
    output = run("predict_folder.py", "--steps", "40", cwd=tmp_path)
    labels = sorted((tmp_path / "seen").glob("scenes/*.png")) + sorted((tmp_path / "seen").glob("whole-test-*.png"))
    predicted = [path for path in labels if path.parent.name == "seen" and "overlay" not in path.name]
    assert len(predicted) == 4 and output.count(" -> ") == 4
    assert Image.open(predicted[0]).size == (96, 96) and Image.open(predicted[0]).mode == "P"
    (tmp_path / "mine" / "a").mkdir(parents=True)
    Image.new("RGB", (70, 50), (90, 120, 60)).save(tmp_path / "mine" / "a" / "photo.jpg")
    arguments = "mine", "--model", "seen/model/final.safetensors", "--out", "out"
    assert "photo.jpg" in run("predict_folder.py", *arguments, cwd=tmp_path)
    assert Image.open(tmp_path / "out" / "a" / "photo.png").size == (70, 50)


@pytest.mark.slow
def test_a_folder_is_predicted_on_ray(tmp_path):
    pytest.importorskip("ray", reason="needs the package ray")
    output = run("predict_on_ray.py", "--steps", "2", cwd=tmp_path)
    assert "seen: 40 images, 0 failed" in output
    labels = sorted((tmp_path / "seen").glob("whole-test-*.png"))
    assert len(labels) == 40 and Image.open(labels[0]).size == (96, 96)


def test_a_model_is_tuned_to_other_classes(tmp_path):
    output = run("finetune_folder.py", "--steps", "40", cwd=tmp_path)
    assert {"ground", "object", "band"} <= set(output.split()) and miou(output) > 25
    assert (tmp_path / "runs" / "mine" / "run" / "final.safetensors").is_file()


def test_own_parts_train_a_model(tmp_path):
    output = run("own_parts.py", "--steps", "100", cwd=tmp_path)
    assert re.findall(r"after (\d+) steps: discs", output) == ["50", "100"] and miou(output) > 80
    assert (tmp_path / "runs" / "discs" / "report.html").is_file()


def test_kernels_keep_the_loss_and_less_memory(tmp_path):
    output = run("kernel_in_your_model.py", "--size", "128", cwd=tmp_path)
    theirs, ours = map(float, re.search(r"backward: ([\d.]+) MiB with PyTorch, ([\d.]+) with", output).groups())
    assert 0 < 2 * ours < theirs


@pytest.mark.slow
@pytest.mark.parametrize("model", ["apcnet", "pspnet", "fcn"])
def test_a_loop_learns(model, tmp_path):
    output = run("training_loop.py", "--model", model, "--steps", "150", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 2 and miou(output) > 30


def test_a_loop_runs(tmp_path):
    output = run("training_loop.py", "--steps", "30", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] and 0 < miou(output) < 100


def test_lightning_trains(tmp_path):
    pytest.importorskip("lightning", reason="needs `pip install lightning`")
    output = run("lightning_module.py", "--steps", "40", cwd=tmp_path)
    assert "after 40 steps" in output and miou(output) > 5


def test_the_notebook_runs(tmp_path):
    """Every code cell in order, in one process; the last one checks the kernel against the formula."""
    notebook = json.loads((EXAMPLES / "affinities.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell.get("outputs") for cell in notebook["cells"])
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    output = run(["-c", "import os; os.environ['STEPS'] = '30'; exec(open('cells.py').read())"], cwd=tmp_path)
    assert "mIoU" in output and "never stored" in output
