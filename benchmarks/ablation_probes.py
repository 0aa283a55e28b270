"""Why a head misses what another finds on regional scenes: the ablation's runs once more, each with one thing changed.

python -m benchmarks.ablation_probes [NAME …]      --full's recipe; about an hour on two cores

To label fabric in a picture with two cues, a position has to know which half it lies in, and what is seen in that half.
The probes take the two apart:

- which half: fabric's labels are the two halves instead of the three cues. Only what lies around a position tells.
- position given: two channels of the backbone's last map hold where a position lies, from -1 to 1.
- four times as long, for three seeds: whether a head learns it at all.

They enter none of the ablation's tables; its report shows them by themselves.
"""

import argparse
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import NamedTuple

import torch
from apcnet.evaluation import evaluate
from apcnet.optimisation import Descent
from torch import Tensor, nn

from apc_kernels.dispatch import SlowPathWarning
from apcnet import runs, training
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.stream import Batches
from apcnet.data.synthetic import BAND, FABRIC, Synthetic
from benchmarks.ablation import PUBLISHED, RECIPES, RESULTS, Recipe, earlier, slug

FILE = "probes.json"
HALF, PLACED, LONG = "which half", "position given", "four times as long"


class Probe(NamedTuple):
    kind: str
    head: str
    seed: int = 0


PROBES = [Probe(HALF, "FCN"), Probe(PLACED, PUBLISHED)]
PROBES += [Probe(LONG, head, seed) for seed in range(3) for head in ("FCN", "EncNet", PUBLISHED)]


class Halves:
    """Regional scenes whose fabric is labelled by the half it lies in: two classes where there were three."""

    def __init__(self, scenes: Synthetic):
        self.scenes, self.classes, self.names = scenes, scenes.classes, scenes.names

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.scenes[index]
        return Sample(image, halves(mask), name)


def halves(mask: Tensor) -> Tensor:
    """Fabric becomes class 6 in the half that holds the upper left corner, 7 in the other one."""
    corner = mask[1, 1] - BAND  # the cue of its half: bands lie along the border
    fabric = (mask >= FABRIC) & (mask != IGNORE)
    return torch.where(fabric, FABRIC + (mask - FABRIC != corner), mask).to(mask.dtype)


class Placed(nn.Module):
    """A backbone whose last map says where its positions lie."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        *features, x = self.backbone(images)
        height, width = x.shape[2:]
        rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
        columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
        shape = len(x), 1, height, width
        return [*features, torch.cat([rows.expand(shape), columns.expand(shape), x[:, 2:]], 1)]


def run(probe: Probe, recipe: Recipe) -> dict:
    """Trains a probe as the ablation trains; its row of the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", SlowPathWarning)
    config = recipe.config(probe.head, "regional", probe.seed)
    if probe.kind == LONG:
        config = replace(config, steps=4 * config.steps)
    data, held_out = (runs.open_data(config.data, split) for split in (config.data.split, config.data.val_split))
    model = training.starting_model(config, data)
    transform = training.augmentation(config.data, model)
    if probe.kind == PLACED:
        model.backbone = Placed(model.backbone)
    if probe.kind == HALF:  # after augmentation: in a mirror image the halves have changed places
        augmented, held_out = transform, Halves(held_out)

        def transform(sample: Sample, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            image, mask = augmented(sample, generator)
            return image, halves(mask)

    descent = Descent(model, config)
    batches = Batches(data, transform, config.seed, config.batch_size)
    for step in range(config.steps):
        batch = batches[step]
        descent.step(step, batch.images, batch.masks)
    iou = evaluate(descent.result, held_out, config.evaluation).scores().iou
    fabric = iou[FABRIC : FABRIC + 2] if probe.kind == HALF else iou[list(Synthetic.context_classes)]
    return {
        "probe": probe.kind,
        "head": probe.head,
        "seed": probe.seed,
        "steps": config.steps,
        "context_miou": float(fabric.mean()),
    }


def run_all(chosen: Sequence[Probe], recipe: Recipe) -> None:
    """In processes of one thread, as many at once as there are cores; what each finds joins the results."""
    file = RESULTS / FILE
    found = {(row["probe"], row["head"], row["seed"]): row for row in earlier(recipe, file).get("rows", ())}
    waiting = sorted((probe for probe in chosen if probe not in found), key=lambda probe: probe.kind != LONG)
    os.environ["OMP_NUM_THREADS"], failed = "1", []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, probe, recipe) for probe in waiting]):
            if done.exception():
                failed.append(done)
                continue
            row = done.result()
            name, score = f"{row['probe']}, {row['head']}, seed {row['seed']}", f"{row['context_miou']:.4f}"
            print(f"{name}: {score} after {row['steps']:,} steps", flush=True)
            found[row["probe"], row["head"], row["seed"]] = row
            rows = [found[probe] for probe in PROBES if probe in found]
            runs.write_json(file, earlier(recipe, file) | {"rows": rows})
    for done in failed:
        done.result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation_probes", description=__doc__.split("\n")[0])
    names = {f"{slug(probe.kind)}-{slug(probe.head)}-seed{probe.seed}": probe for probe in PROBES}
    parser.add_argument("probe", nargs="*", help=f"all where none is named: {', '.join(names)}")
    given = parser.parse_args().probe or list(names)
    if unknown := set(given) - set(names):
        parser.error(f"probe: expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
    run_all([names[name] for name in given], RECIPES["full"])


if __name__ == "__main__":
    main()
