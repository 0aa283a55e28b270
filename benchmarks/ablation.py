"""The paper's claims in miniature: every head, on generated scenes whose labels depend on their surroundings.

python -m benchmarks.ablation --quick      2 seeds, 800 steps: ten minutes on two cores
python -m benchmarks.ablation --full       5 seeds, 2,500 steps: hours; stop it and start it again as you like
python -m benchmarks.ablation --gpu        256×256 scenes, ResNet-50-D8 from scratch
python -m benchmarks.ablation_report       what came of it, as tables and pictures

All heads are trained by one recipe, from the same seeds, and see the same scenes in the same order under the same
augmentation. The recipe was settled by the time that it takes, before heads were compared under it; no seed is dropped
and nothing is tuned for a head. Runs go seed by seed, so that one that is stopped is complete for the seeds it has
come to. Each is a process of one thread with a folder of its own; a finished one is not repeated, a killed one goes on
from its last checkpoint to the same bits.
"""

import argparse
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from apc_kernels.dispatch import SlowPathWarning
from apcnet import runs, training
from apcnet.config import Config, Data, Model, Optimisation, differences
from apcnet.data.synthetic import Synthetic
from benchmarks import ROOT
from benchmarks.rows import machine

RUNS, RESULTS = ROOT / "build" / "ablation", ROOT / "benchmarks" / "results" / "ablation"
FAMILIES = ("whole", "regional")
HEADS = {
    "FCN": {"model": "fcn"},
    "PSPNet": {"model": "pspnet"},
    "EncNet": {"model": "encnet"},
    "Semantic FPN": {"model": "semantic_fpn"},
    "APCNet {1}": {"model": "apcnet", "scales": (1,)},
    "APCNet {1,2}": {"model": "apcnet", "scales": (1, 2)},
    "APCNet {1,2,3}": {"model": "apcnet", "scales": (1, 2, 3)},
    "APCNet {1,2,3,6}": {"model": "apcnet"},
    "APCNet without guide": {"model": "apcnet", "guide": False},
    "APCNet, plain module": {"model": "apcnet", "plain": True},
}
PUBLISHED = "APCNet {1,2,3,6}"  # the published form
GPU_RUNS = 4  # at once on a GPU; on a CPU one for each core


@dataclass(frozen=True)
class Recipe:
    """What all runs have in common."""

    name: str
    steps: int
    seeds: int
    side: int = 96
    """Of the scenes, in pixels."""
    backbone: str = "tiny"
    width: int | None = 32
    """Channels of the backbone; None: as many as it has by itself."""
    channels: int = 32
    """Of every head, and of Semantic FPN's neck."""
    lr: float = 0.05
    batch_size: int = 8
    save_every: int = 500
    precision: str = "float32"
    channels_last: bool = False
    device: str = "cpu"
    workers: int = 0
    """Processes of every run that make batches."""

    def config(self, head: str, family: str, seed: int) -> Config:
        """Of a run; to its head alone belongs what stands in HEADS."""
        sides = (self.side, self.side)
        options = dict(HEADS[head])
        if options["model"] == "semantic_fpn":
            options["neck_channels"] = self.channels
        return Config(
            Model(
                backbone=self.backbone,
                from_scratch=self.backbone != "tiny",
                width=self.width,
                channels=self.channels,
                dropout=0.0,
                auxiliary_channels=0,
                **options,
            ),
            Data("synthetic", family=family, size=sides, crop=sides, scale=sides, ratio=(1.0, 1.0), cat_max_ratio=1.0),
            Optimisation(lr=self.lr, min_lr=1e-4, weight_decay=5e-4),
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
            eval_every=self.steps,
            save_every=self.save_every,
            precision=self.precision,
            channels_last=self.channels_last,
        )


RECIPES = {
    "quick": Recipe("quick", steps=800, seeds=2, batch_size=4),
    "full": Recipe("full", steps=2500, seeds=5),
    "gpu": Recipe(  # has been run on no GPU yet
        "gpu",
        steps=600,
        seeds=1,
        side=256,
        backbone="resnet50",
        width=None,
        channels=128,
        precision="bfloat16",
        channels_last=True,
        device="cuda",
        workers=3,
    ),
}


class Run(NamedTuple):
    """One training. Its backend is reference in the one that is held beside the same run on the fused path."""

    head: str
    family: str
    seed: int
    backend: str = "auto"

    def __str__(self) -> str:
        return f"{self.head}, {self.family}, seed {self.seed}{', reference' if self.backend == 'reference' else ''}"

    @property
    def path(self) -> Path:
        """Of its folder, in that of its recipe."""
        suffix = "-reference" if self.backend == "reference" else ""
        return Path(f"seed{self.seed}", self.family, slug(self.head) + suffix)


REFERENCE = Run(PUBLISHED, "whole", 0, "reference")


def slug(head: str) -> str:
    """A head's name for paths and flags: apcnet-1-2-3-6."""
    return re.sub(r"[^a-z0-9]+", "-", head.lower()).strip("-")


def plan(recipe: Recipe) -> list[Run]:
    """All runs in their order."""
    everything = [Run(h, f, s) for s, f, h in itertools.product(range(recipe.seeds), FAMILIES, HEADS)]
    of_a_seed = len(FAMILIES) * len(HEADS)
    return [*everything[:of_a_seed], REFERENCE, *everything[of_a_seed:]]


def finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def execute(recipe: Recipe, chosen: Sequence[Run], out: Path, at_once: int, update: Callable) -> dict[Run, str]:
    """Trains what is not finished yet, so many runs at once.

    Args:
        out: the folder that holds the runs' folders.
        update: is called with the runs that are under way again and again, and with the one that has just ended.

    Returns:
        the runs that failed, and what each of them said last.
    """
    waiting = deque(run for run in chosen if not finished(out / run.path))
    for run in waiting:
        prepare(recipe, run, out)
    under_way, failed = {}, {}
    with only_one(out) as lock:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < at_once:
                    run = waiting.popleft()
                    under_way[run] = start(recipe, run, out, lock)
                time.sleep(0.2)
                ended = [run for run, process in under_way.items() if process.poll() is not None]
                for run in ended:
                    code = under_way.pop(run).returncode
                    if code:
                        failed[run] = f"exit status {code}: {last_line(output(out, run))}"
                    update(under_way, run)
                update(under_way, None)
        finally:
            for process in under_way.values():
                process.terminate()  # it saves the step that it has come to
            for process in under_way.values():
                process.wait()
    return failed


def prepare(recipe: Recipe, run: Run, out: Path) -> None:
    """Puts the config of a run into its folder: that is how its process knows what to train."""
    folder, config = out / run.path, recipe.config(*run[:3])
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(folder / "config.json", config.to_json())
    elif changed := differences(runs.read_config(folder), config):  # said now, not when hours have gone by
        raise ValueError(f"out: {folder} holds another run, {'; '.join(changed)}. Name another folder")


def start(recipe: Recipe, run: Run, out: Path, lock: int) -> subprocess.Popen:
    """The process of a run; a session of its own, so that Ctrl-C reaches it through this process alone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if run.backend != "auto":
        environment["APC_KERNELS_BACKEND"] = run.backend
    command = [sys.executable, "-m", "benchmarks.ablation", f"--{recipe.name}", "--train", str(out / run.path)]
    with output(out, run).open("w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )


def train(folder: Path, device: str, workers: int) -> None:
    """Trains the run in a folder, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", SlowPathWarning)  # half a table from one backend, half from another: rather none
    training.train(runs.read_config(folder), folder, device=device, workers=workers, log_every=10)


def output(out: Path, run: Run) -> Path:
    """What the process of a run prints."""
    return out / run.path / "output.txt"


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


@contextmanager
def only_one(out: Path) -> Iterator[int]:
    """Keeps a second invocation out of a folder, and one that comes while processes of a killed one still train."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:  # the processes of runs inherit it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: runs in {out} are under way already; wait for them, or name another folder"
            ) from None
        yield lock.fileno()


def result(run: Run, out: Path) -> dict:
    """A finished run as it stands in the results."""
    metrics = runs.read_json(out / run.path / "metrics.json")
    context = {Synthetic.classes[i] for i in Synthetic.context_classes}
    others = [iou for name, iou in metrics["iou"].items() if name not in context and iou is not None]
    return {
        "head": run.head,
        "family": run.family,
        "seed": run.seed,
        "steps": metrics["step"],
        "miou": metrics["miou"],
        "context_miou": metrics["context_miou"],
        "other_miou": fmean(others),
        "iou": metrics["iou"],
    }


def earlier(recipe: Recipe, path: Path) -> dict:
    """What a file of results has, which has to be of this machine and recipe; or the beginning of one."""
    begun = {"machine": machine() | {"threads": 1}, "recipe": asdict(recipe)}
    kept = runs.read_json(path) if path.exists() else {}
    for what, given in begun.items():
        if kept.get(what, given) != given:
            raise ValueError(f"out: {path} has results of another {what}, {kept[what]}, here it is {given}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return kept or begun


def write_results(recipe: Recipe, out: Path, path: Path, costs: list[dict] | None = None) -> None:
    """All that is finished, and all that the file has already: folders of runs are cleared away, results stay."""
    content = earlier(recipe, path)
    found = {(row["head"], row["family"], row["seed"]): row for row in content.get("runs", ())}
    found |= {run[:3]: result(run, out) for run in plan(recipe) if run.backend == "auto" and finished(out / run.path)}
    content["runs"] = [found[run[:3]] for run in plan(recipe) if run.backend == "auto" and run[:3] in found]
    done = finished(out / REFERENCE.path)
    content["reference"] = result(REFERENCE, out) if done else content.get("reference")
    content["costs"] = costs or content.get("costs")
    runs.write_json(path, content)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n")[0])
    sizes = parser.add_mutually_exclusive_group()
    for name, recipe in RECIPES.items():
        about = f"{recipe.seeds} seeds of {recipe.steps} steps, {recipe.side}×{recipe.side}, {recipe.backbone}"
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=about)
    parser.add_argument("--out", type=Path, help="runs and results go here, not into build/ and benchmarks/results/")
    parser.add_argument("--seeds", type=int, help="only the first so many seeds")
    parser.add_argument("--only", choices=[slug(head) for head in HEADS], action="append", help="only this head")
    parser.add_argument("--measure", action="store_true", help="only measure a step of every head, on a quiet machine")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # what each run's process is told
    given = parser.parse_args()
    recipe = RECIPES[given.size or ("gpu" if torch.cuda.is_available() else "quick")]
    if given.train:
        train(given.train, recipe.device, recipe.workers)
        return 0
    seeds = recipe.seeds if given.seeds is None else given.seeds
    if not 1 <= seeds <= recipe.seeds:
        parser.error(f"--seeds: expected 1 to {recipe.seeds}, got {seeds}")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU that PyTorch can use")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    out = (given.out or RUNS).resolve() / recipe.name
    results = (given.out.resolve() if given.out else RESULTS) / f"{recipe.name}.json"
    chosen = [run for run in plan(recipe) if run.seed < seeds and (not given.only or slug(run.head) in given.only)]
    try:
        return measure(recipe, out, results) if given.measure else train_all(recipe, chosen, out, results)
    except ValueError as error:
        parser.error(str(error))


def train_all(recipe: Recipe, chosen: Sequence[Run], out: Path, results: Path) -> int:
    """Trains what is left of the chosen runs; the exit status."""
    from benchmarks.ablation_display import Display  # not above: it is built on what stands here

    write_results(recipe, out, results)  # if it cannot be done, that is said now
    display = Display(recipe, chosen, out, results)
    with display.bar or nullcontext():
        failed = execute(recipe, chosen, out, GPU_RUNS if recipe.device == "cuda" else os.cpu_count() or 1, display)
    write_results(recipe, out, results)
    print(f"{display.done()} of {len(chosen)} runs are finished; {results}")
    for run, reason in failed.items():
        print(f"FAILED: {run} ({output(out, run)}): {reason}")
    return int(bool(failed))


def measure(recipe: Recipe, out: Path, results: Path) -> int:
    from benchmarks import ablation_costs  # not above, as before

    write_results(recipe, out, results, ablation_costs.measure(recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
