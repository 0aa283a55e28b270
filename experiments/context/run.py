"""Tests the paper's claims in miniature: trains every head on scenes whose labels depend on their surroundings.

    python -m experiments.context.run --quick      3 seeds, 800 steps: a quarter of an hour on two cores
    python -m experiments.context.run --full       5 seeds, 2,500 steps: hours; stop and restart it at any time
    python -m experiments.context.run --probes     some runs of --full again, with one change (probes.py)
    python -m experiments.context.report           makes tables and pictures of the results

All heads are trained by one recipe, from the same seeds, and see the same scenes in the same order under the same
augmentation. The recipe was chosen by its duration before heads were compared; no seed is dropped and nothing is tuned
for a head. Runs go seed by seed, so that an interrupted experiment is complete for its first seeds. Each run is
`apcnet train` in a process of one thread with a folder of its own: a finished run is not repeated, and a killed one
resumes from its last checkpoint to the same bits.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import apc_kernels
from apc_kernels.dispatch import SlowPathWarning
from apcnet import training
from apcnet.config import Config
from apcnet.data.synthetic import Synthetic
from apcnet.files import read_json, write_json
from apcnet.presets import preset
from benchmarks import ROOT
from benchmarks.rows import machine
from experiments.context import probes

RUNS, RESULTS = ROOT / "build" / "context", Path(__file__).parent / "results"
TINY = preset("tiny")
FAMILIES = ("whole", "regional")
HEADS = {  # the options of each head
    "FCN": {"model": "fcn"},
    "PSPNet": {"model": "pspnet"},
    "EncNet": {"model": "encnet"},
    "Semantic FPN": {"model": "semantic_fpn", "neck_channels": TINY.model.channels},
    "APCNet {1}": {"scales": (1,)},
    "APCNet {1,2}": {"scales": (1, 2)},
    "APCNet {1,2,3}": {"scales": (1, 2, 3)},
    "APCNet {1,2,3,6}": {},
    "APCNet without guide": {"guide": False},
    "APCNet, plain module": {"plain": True},
}
PUBLISHED = "APCNet {1,2,3,6}"  # the published form
LONG = "four times as long"


class Recipe(NamedTuple):
    """Holds what all runs share, in addition to the preset `tiny`."""

    name: str
    steps: int
    seeds: int
    batch_size: int = TINY.batch_size


class Run(NamedTuple):
    """Describes one training run, and its change if it is a probe."""

    head: str
    family: str
    seed: int
    change: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.head, self.family, f"seed {self.seed}", self.change)))

    @property
    def path(self) -> Path:
        """Returns the path of its folder, relative to the recipe's."""
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.head} {self.change}".lower()).strip("-")
        return Path(f"seed{self.seed}", self.family, name)

    def config(self, recipe: Recipe) -> Config:
        steps = recipe.steps * (4 if self.change == LONG else 1)
        return replace(
            TINY,
            model=replace(TINY.model, **HEADS[self.head]),
            data=replace(TINY.data, family=self.family),
            steps=steps,
            batch_size=recipe.batch_size,
            seed=self.seed,
            eval_every=steps,
            save_every=500,
        )


FULL = Recipe("full", steps=2500, seeds=5)
RECIPES = {"quick": Recipe("quick", steps=800, seeds=3, batch_size=4), "full": FULL, "probes": FULL}
REFERENCE = Run(PUBLISHED, "whole", 0, "reference")  # on plain PyTorch, held beside the same run on the fused path
PROBES = [Run("FCN", "regional", 0, probes.HALF), Run(PUBLISHED, "regional", 0, probes.PLACED)]
PROBES += [Run(head, "regional", seed, LONG) for seed in range(3) for head in ("FCN", "EncNet", PUBLISHED)]


def plan(size: str) -> list[Run]:
    """Lists all runs in their order."""
    if size == "probes":
        return PROBES
    runs = [Run(h, f, s) for s, f, h in itertools.product(range(RECIPES[size].seeds), FAMILIES, HEADS)]
    of_a_seed = len(FAMILIES) * len(HEADS)
    return [*runs[:of_a_seed], REFERENCE, *runs[of_a_seed:]]


def train(run: Run, config: Config, folder: Path) -> None:
    """Trains a run in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", SlowPathWarning)  # a table must not mix backends
    if run.change in (probes.HALF, probes.PLACED):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", probes.train(config, run.change))
        return
    with apc_kernels.backend("reference") if run == REFERENCE else nullcontext():
        training.train(config, folder, device="cpu", progress=False)


def train_all(chosen: Sequence[Run], recipe: Recipe, out: Path, ended: Callable[[Run], None]) -> list[Run]:
    """Trains the unfinished runs, one on each core, and returns those that failed; their errors are printed."""

    def in_a_process(run: Run) -> int | None:
        given = run, run.config(recipe), out / run.path
        process = multiprocessing.get_context("spawn").Process(target=train, args=given)
        process.start()
        process.join()
        return process.exitcode

    os.environ["OMP_NUM_THREADS"], failed = "1", []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {pool.submit(in_a_process, run): run for run in chosen if not finished(run, out)}
        try:
            for done in as_completed(waiting):
                if done.result() == 0:
                    ended(waiting[done])
                else:
                    failed.append(waiting[done])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # it saves a checkpoint first
            raise
    return failed


def finished(run: Run, out: Path) -> bool:
    return (out / run.path / "metrics.json").exists()


def result(run: Run, out: Path) -> dict:
    """Returns the entry of a finished run in the results."""
    metrics = read_json(out / run.path / "metrics.json")
    scores = {"steps": metrics["step"], "context_miou": metrics["context_miou"]}
    if run in PROBES:
        return {"probe": run.change, "head": run.head, "seed": run.seed, **scores}
    context = {Synthetic.classes[i] for i in Synthetic.context_classes}
    others = [iou for name, iou in metrics["iou"].items() if name not in context and iou is not None]
    scores |= {"miou": metrics["miou"], "other_miou": fmean(others), "iou": metrics["iou"]}
    return {"head": run.head, "family": run.family, "seed": run.seed, **scores}


def write_results(size: str, out: Path, file: Path) -> None:
    """Writes all finished runs, and keeps those that the file has already, because folders of runs may be deleted."""
    begun = {"machine": machine() | {"threads": 1}, "recipe": RECIPES[size]._asdict()}
    content = read_json(file) if file.exists() else begun
    for what, given in begun.items():
        if content[what] | given != content[what]:
            raise ValueError(f"out: {file} has results of another {what}, {content[what]}, got {given}")
    key, done = "rows" if size == "probes" else "runs", [run for run in plan(size) if finished(run, out)]
    kept = {Run(r["head"], r.get("family", "regional"), r["seed"], r.get("probe", "")): r for r in content.get(key, ())}
    found = kept | {run: result(run, out) for run in done}
    content[key] = [found[run] for run in plan(size) if run in found and run != REFERENCE]
    if size != "probes":
        content["reference"] = found.get(REFERENCE, content.get("reference"))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def main() -> int:
    about = "Train every head on generated scenes whose labels depend on their surroundings."
    parser = argparse.ArgumentParser(prog="python -m experiments.context.run", description=about)
    sizes = parser.add_mutually_exclusive_group()
    for name, recipe in RECIPES.items():
        about = f"Train {len(plan(name))} runs of {recipe.steps} steps."
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, default="quick", help=about)
    parser.add_argument("--out", type=Path, help="Write runs and results here, not into build/ and results/.")
    given = parser.parse_args()
    recipe, chosen = RECIPES[given.size], plan(given.size)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = (given.out or RUNS).resolve() / recipe.name
    file = (given.out.resolve() if given.out else RESULTS) / f"{given.size}.json"

    def ended(run: Run) -> None:
        write_results(given.size, out, file)
        done, score = sum(finished(other, out) for other in chosen), result(run, out)["context_miou"]
        print(f"{done} of {len(chosen)}  {run}: mIoU of context classes {score:.4f}", flush=True)

    try:
        write_results(given.size, out, file)  # fails now, not after hours of training
    except ValueError as error:
        parser.error(str(error))
    failed = train_all(chosen, recipe, out, ended)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} runs are finished; {file}")
    for run in failed:
        print(f"FAILED: {run} ({out / run.path})")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
