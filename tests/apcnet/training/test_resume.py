"""Tests that an interrupted run goes on with the same bits, and that a folder takes no other run."""

import json
import os
import random
import signal
import time
import warnings

import pytest
import torch
from small_runs import digest, flags, small, start

import apc_kernels
from apc_kernels import info
from apcnet.config import Optimisation, Protocol
from apcnet.training import checkpoint, log, train


def test_killed_three_times_it_ends_with_the_same_bits(root, tmp_path, threads):
    """Tests a run that is killed in processes of one thread against an uninterrupted one in this process."""
    threads(1)
    config, moments = small(root, steps=60, eval_every=25, save_every=7), random.Random(0)
    train(config, tmp_path / "whole", log_every=1)
    killed = tmp_path / "killed"
    for workers in (0, 1, 2):
        run = start(*flags(config), "--workers", workers, "--out", killed)
        reached = checkpoint_step(killed) + moments.randint(3, 15)
        while run.poll() is None and last_step(killed) < reached:
            time.sleep(0.01)
        time.sleep(moments.random() / 50)
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL, "the run finished before it was killed"
    train(config, killed, workers=1, log_every=1)
    models, scores = ("final.safetensors", "best.safetensors"), ("metrics.json", "images.csv")
    for name in (*models, *scores, "preview/000050.png", "preview/000050.npz", "worst.npz"):
        assert digest(killed / name) == digest(tmp_path / "whole" / name), name
    losses = [[r["loss"] for r in log.read(folder) if "loss" in r] for folder in (killed, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def last_step(folder) -> int:
    return max([record["step"] for record in log.read(folder)], default=0) if folder.exists() else 0


def checkpoint_step(folder) -> int:
    state = checkpoint.load(folder) if folder.exists() else None
    return state["step"] if state else 0


@pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, "loss"), (signal.SIGTERM, "evaluating")])
def test_a_signal_stops_a_run_after_its_step_and_it_resumes(root, tmp_path, number, when):
    config, whole, halted = small(root), tmp_path / "whole", tmp_path / "halted"
    train(config, whole)

    def show(record):
        if when in record or record.get("event") == when:
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as stop:
        train(config, halted, log_every=5, progress=show)
    assert stop.value.code == 128 + number
    assert checkpoint.load(halted)["step"] == 6  # the step during which the signal came, or that of the evaluation
    train(config, halted)
    assert digest(halted / "final.safetensors") == digest(whole / "final.safetensors")
    assert [r["step"] for r in log.read(halted) if "miou" in r] == [6, 12]
    (halted / "metrics.json").unlink()
    train(config, halted)
    assert [r["step"] for r in log.read(halted) if "miou" in r] == [6, 12]
    assert digest(halted / "metrics.json") == digest(whole / "metrics.json")


def test_another_config_in_the_same_folder_is_refused(root, out):
    train(small(root, steps=2), out)
    changed = small(root, steps=3, optimisation=Optimisation(lr=0.5, momentum=0.5))
    with pytest.raises(ValueError, match=r"out: .* holds another run, lr: 0.02 → 0.5; momentum: 0.9 → 0.5\. Name"):
        train(changed, out)
    assert train(small(root, steps=2), out)["step"] == 2  # the refused command has changed nothing


def test_a_run_goes_on_with_more_steps_and_keeps_those_it_has_taken(root, out, tmp_path):
    train(small(root, steps=6), out, log_every=1)
    first = log.read(out)
    with pytest.warns(UserWarning, match="steps: 6 → 12; from step 6 on, the learning rate follows the new number"):
        scores = train(small(root, steps=12, eval_every=4, save_every=2), out, log_every=1)
    records = log.read(out)
    assert scores["step"] == 12 and records[:5] == first[:5] and [r["step"] for r in records if "lr" in r][-1] == 12
    train(small(root, steps=12), tmp_path / "whole", log_every=1)
    rates = [[r["lr"] for r in log.read(folder) if "lr" in r][6:] for folder in (out, tmp_path / "whole")]
    assert rates[0] == rates[1]
    assert json.loads((out / "config.json").read_text())["steps"] == 12
    with pytest.raises(ValueError, match=r"steps: expected 12 or more, which the run in .* --steps 12, or add --new"):
        train(small(root, steps=11), out)


def test_another_protocol_chooses_the_best_model_anew(root, out):
    before = train(small(root), out)
    after = train(small(root, evaluation=Protocol(flip=True)), out)
    assert after["step"] == after["best"]["step"] == 12 and after["best"]["miou"] == after["miou"]
    assert next(r["step"] for r in log.read(out) if "miou" in r) == 6 and before["step"] == 12


def test_another_choice_of_the_best_model_chooses_anew(root, out):
    train(small(root), out)
    assert "loss" in train(small(root, best_by="loss"), out)["best"]


def test_temporary_files_of_a_killed_process_are_removed(root, out):
    train(small(root, steps=2), out)
    (out / ".last.pt.abc.tmp").write_bytes(b"half")
    train(small(root, steps=2), out)
    assert not list(out.glob(".*"))


def test_two_runs_in_one_folder_are_refused(root, out):
    """Tests that the second run ends with an error, and the first one continues."""
    config, refused = small(root), []

    def show(record):
        if record.get("step") == 3 and not refused:
            second = start(*flags(config), "--out", out, "--workers", 0)
            refused.append((second.communicate()[1], second.returncode))

    train(config, out, log_every=3, progress=show)
    assert refused == [
        (f"apcnet: out: another process is training in {out}; wait for it, or name another folder with --out\n", 2)
    ]


def test_a_checkpoint_of_another_run_is_refused(root, out):
    """Tests that a checkpoint is refused if config.json is missing or the data have changed."""
    train(small(root, steps=4), out)
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match="holds another run, seed: 0 → 9"):
        train(small(root, steps=4, seed=9), out)
    assert not (out / "config.json").exists()
    image, mask = (next((root / kind / "train").iterdir()) for kind in ("images", "masks"))
    for path in (image, mask):
        path.with_stem("one-more").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="holds another run, images: 7 → 8"):
        train(small(root, steps=4), out)


def test_a_renamed_sample_is_refused_and_another_size_is_told(root, out):
    train(small(root, steps=1), out)
    image, other = sorted((root / "images" / "train").iterdir())[:2]
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.warns(UserWarning, match=rf"{out}: results may no longer be bit-identical, training files: \w+ → \w+"):
        train(small(root, steps=1), out)
    for path in (other, root / "masks" / "train" / other.name):
        path.rename(path.with_stem("renamed"))
    with pytest.raises(ValueError, match=r"holds another run, sample_names: \w+ → \w+"):
        train(small(root, steps=1), out)


def test_each_change_of_what_the_bits_depend_on_is_told(root, out, monkeypatch, threads):
    """Tests threads, variables and the backend; a run that goes on without a change says nothing."""
    threads(1)
    train(small(root, steps=1), out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(small(root, steps=1), out)
    before = info.kernels("cpu")["backend"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with apc_kernels.backend("reference"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(small(root, steps=1), out)
    expected = {"threads: 1 → 2", "MKL_CBWR: unset → COMPATIBLE", "ONEDNN_MAX_CPU_ISA: unset → AVX2"}
    expected |= {f"backend: {before} → reference"} if before != "reference" else set()
    start = f"{out}: results may no longer be bit-identical, "
    assert {str(one.message).removeprefix(start) for one in told} == expected


def test_repeated_signals_to_all_processes_stop_a_run_once(root, tmp_path):
    config = small(root, steps=400, eval_every=400, save_every=400)
    run = start(*flags(config), "--workers", 1, "--out", tmp_path / "run", start_new_session=True)
    while last_step(tmp_path / "run") < 5:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.001)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "stopped after step" in out, err
    assert 5 <= checkpoint.load(tmp_path / "run")["step"] < 400
